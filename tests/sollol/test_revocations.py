"""Lists of revoked certificates: as they are read, verified, taken over and kept."""

import base64
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from cryptography import x509
from sollol import revocations
from sollol import tls as module
from sollol.errors import Reason, SollolError
from sollol.tls import TlsFiles
from structlog.testing import capture_logs

from sollold.pki import authority as signing
from tests.certificates import authority, replace_file, revoke, revoked_list, write_identity

SERIALS = ("1", "80", "ff00", "7a2f" * 10)


@pytest.fixture
def ours():
    return authority()


@pytest.fixture
def files(tmp_path, ours):
    return TlsFiles(write_identity(tmp_path / "n1", ours, "agent", "n1"))


@pytest.fixture
def bad(tmp_path, ours):
    return write_identity(tmp_path / "bad", ours, "agent", "bad")


@pytest.mark.parametrize("serials", [(), SERIALS[:1], SERIALS, tuple(f"{number:x}" for number in range(1, 2000))])
@pytest.mark.parametrize("number", [1, 127, 128, 1_764_000_000, 2**62])
def test_what_is_read_is_what_cryptography_reads(ours, serials, number):
    pem = signing.revocations(ours, serials, number)
    known, found = x509.load_pem_x509_crl(pem), revocations.read(pem)
    assert found.serials == {f"{each.serial_number:x}" for each in known} == set(serials)
    assert found.number == known.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number == number
    assert revocations.verified(pem, ours.certificate) == found


@pytest.mark.parametrize("pem", [b"", b"agent/n1\n", b"-----BEGIN X509 CRL-----\nMAA=\n-----END X509 CRL-----\n"])
def test_what_is_no_list_is_a_value_error_and_refused(ours, pem):
    with pytest.raises(ValueError, match="list of revoked certificates"):
        revocations.read(pem)
    with pytest.raises(SollolError) as raised:
        revocations.verified(pem, ours.certificate)
    assert raised.value.refusal.reason is Reason.INVALID_REQUEST


def test_a_list_of_another_version_is_refused_like_any_other_that_is_none(ours):
    pem = signing.revocations(ours, SERIALS, 1)
    der = bytearray(x509.load_pem_x509_crl(pem).public_bytes(signing.serialization.Encoding.DER))
    at = bytes(der).index(b"\x02\x01\x01")  # version 2 is written as 1
    der[at + 2] = 7
    body = base64.encodebytes(der)
    with pytest.raises(SollolError, match="not a valid CRL version") as raised:
        revocations.verified(b"-----BEGIN X509 CRL-----\n" + body + b"-----END X509 CRL-----\n", ours.certificate)
    assert raised.value.refusal.reason is Reason.INVALID_REQUEST


def forged(pem):
    """The same list with one bit of a serial number changed."""
    der = bytearray(x509.load_pem_x509_crl(pem).public_bytes(signing.serialization.Encoding.DER))
    at = bytes(der).index(bytes.fromhex("7a2f" * 10))
    der[at] ^= 1
    crl = x509.load_der_x509_crl(bytes(der))
    return crl.public_bytes(signing.serialization.Encoding.PEM)


def test_a_list_that_our_authority_has_not_signed_is_refused(ours):
    good = signing.revocations(ours, SERIALS, 5)
    for pem in (signing.revocations(authority(), SERIALS, 5), forged(good)):
        with pytest.raises(SollolError) as raised:
            revocations.verified(pem, ours.certificate)
        assert raised.value.refusal.reason is Reason.FOREIGN_CERTIFICATE
    with pytest.raises(SollolError, match="at most"):
        revocations.verified(good + b"x" * (1 << 20), ours.certificate)


def test_while_an_authority_is_replaced_lists_of_both_count(ours):
    next_one = authority()
    both = ours.certificate + next_one.certificate
    for signer in (ours, next_one):
        assert revocations.verified(signing.revocations(signer, SERIALS, 5), both).number == 5


def test_only_what_was_signed_is_kept_of_what_came(files, ours, bad):
    """Another list before or behind the signed one must not be the one that is read later."""
    good, other = revoked_list(ours, bad, number=5), signing.revocations(authority(), (), 9)
    files.take_revoked(b"who\n" + good + other, peer="head h")
    assert (files.directory / "revoked").read_bytes() == files.current().revoked.pem
    assert TlsFiles(files.directory).current().revoked.number == 5
    with pytest.raises(SollolError):
        files.take_revoked(other + good, peer="head h")


def test_a_newer_list_is_taken_and_kept_an_older_one_is_refused(files, ours, bad):
    assert files.take_revoked(revoked_list(ours, bad, number=5), peer="head h").number == 5
    assert TlsFiles(files.directory).current().revoked == files.current().revoked
    assert files.take_revoked(revoked_list(ours, bad, number=5), peer="head h") is None
    with pytest.raises(SollolError, match="older than 5") as raised:
        files.take_revoked(revoked_list(ours, number=4), peer="head h")
    assert raised.value.refusal.reason is Reason.INVALID_REQUEST
    assert len(files.current().revoked.serials) == 1
    assert files.take_revoked(revoked_list(ours, number=6), peer="head h").serials == frozenset()


def test_an_older_file_or_none_at_all_brings_nobody_back_while_it_runs(files, ours, bad):
    revoke(files.directory, ours, bad, number=5)
    assert len(files.current().revoked.serials) == 1
    with capture_logs() as logs:
        revoke(files.directory, ours, number=4)
        assert len(files.current().revoked.serials) == 1
        (files.directory / "revoked").unlink()
        assert len(files.current().revoked.serials) == 1
    assert [entry["event"] for entry in logs] == ["revoked_list_older"] * 2


def test_a_list_that_cannot_be_kept_counts_all_the_same(files, ours, bad):
    (files.directory / ".revoked.taken").mkdir()  # as good as a directory that is read-only, for root too
    with capture_logs() as logs:
        files.take_revoked(revoked_list(ours, bad, number=5), peer="head h")
        assert files.current().revoked.number == 5
    assert [entry["event"] for entry in logs] == ["revoked_list_taken", "revoked_list_not_kept"]
    replace_file(files.directory / "ca.pem", ours.certificate)
    assert files.current().revoked.number == 5


@pytest.mark.parametrize("meanwhile", [0, 6])
def test_a_list_is_on_the_disk_before_it_is_in_place_and_a_slow_disk_holds_nobody_up(
    files, ours, bad, monkeypatch, meanwhile
):
    writing, go_on, sync = threading.Event(), threading.Event(), module.os.fsync

    def slow(descriptor):
        writing.set()
        assert go_on.wait(10)
        sync(descriptor)

    monkeypatch.setattr(module.os, "fsync", slow)
    with ThreadPoolExecutor(2) as others:
        taken = others.submit(files.take_revoked, revoked_list(ours, bad, number=5), peer="head h")
        try:
            assert writing.wait(10)
            assert not (files.directory / "revoked").exists()
            assert others.submit(files.current).result(10).revoked.number == 5
            if meanwhile:
                revoke(files.directory, ours, bad, number=meanwhile)
        finally:
            go_on.set()
        assert taken.result(10).number == 5
    assert revocations.read((files.directory / "revoked").read_bytes()).number == max(5, meanwhile)


def test_a_file_that_is_no_list_is_not_taken_for_an_empty_one(files):
    replace_file(files.directory / "revoked", b"agent/n1\n")
    with pytest.raises(SollolError, match="no list of revoked certificates") as raised:
        TlsFiles(files.directory)
    assert raised.value.refusal.reason is Reason.CERTIFICATE_UNREADABLE
