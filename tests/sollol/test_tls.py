"""Certificates as daemons read them, and contexts and credentials that follow the files."""

import asyncio
import errno
import ssl
import time

import grpc.aio
import pytest
from cryptography import x509
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from sollol import certificates
from sollol import tls as module
from sollol.channels import bind, new_server, open_channel
from sollol.errors import Reason, SollolError
from sollol.identity import Role, checked, parse, role_name
from sollol.tls import TlsFiles, admitted
from structlog.testing import capture_logs

from tests.certificates import authority, revoke, write_identity


@pytest.fixture
def ours():
    return authority()


@pytest.mark.parametrize(
    ("cluster", "role", "node_id"),
    [("home", "agent", "node-21"), ("a", "head", "H_1.example"), ("x" * 63, "admin", "o"), ("0-0", "client", "z" * 63)],
)
def test_a_name_survives_the_way_into_a_certificate_and_back(cluster, role, node_id):
    identity = checked(cluster, role, node_id)
    assert parse(identity.uri) == identity
    assert (identity.cluster, identity.role, identity.node_id) == (cluster, role, node_id)


@pytest.mark.parametrize(
    ("cluster", "role", "node_id"),
    [
        ("Home", "agent", "a"), ("home", "root", "a"), ("home", "agent", ""), ("home", "agent", "a/b"), ("home", "agent", "-a"),
        ("home", "agent", "a" * 64), ("", "agent", "a"), ("home", "agent", "a\n"), ("home", "agent", "é"),
    ],
)  # fmt: skip
def test_a_name_that_cannot_stand_in_a_certificate_is_refused(cluster, role, node_id):
    with pytest.raises(ValueError, match="cannot stand in a certificate"):
        checked(cluster, role, node_id)


def test_the_fields_read_are_those_that_cryptography_reads(tmp_path, ours):
    for number, days in enumerate((1, 90, 3650, 12_000)):  # validity after 2049 is written in another form
        pem = (write_identity(tmp_path / str(number), ours, "agent", "n1", days=days) / "node.pem").read_bytes()
        known, read = x509.load_pem_x509_certificate(pem), certificates.read(pem)
        assert read.serial == f"{known.serial_number:x}"
        assert read.not_before_s == known.not_valid_before_utc.timestamp()
        assert read.not_after_s == known.not_valid_after_utc.timestamp()
        assert read.identity == checked("test", "agent", "n1")
        signer = known.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
        assert (read.signed_by, read.key_id) == (signer.hex(), "")
        assert certificates.read(ours.certificate).key_id == signer.hex()


def test_a_certificate_cut_off_anywhere_is_a_value_error(tmp_path, ours):
    der = ssl.PEM_cert_to_DER_cert((write_identity(tmp_path, ours, "agent", "n1") / "node.pem").read_text())
    for length in range(len(der)):
        with pytest.raises(ValueError, match=r"X\.509"):
            certificates.read_der(der[:length])


def test_an_authority_names_nobody(ours):
    assert certificates.read(ours.certificate).identity is None


@pytest.mark.parametrize("missing", ["ca.pem", "node.pem", "node.key"])
def test_a_missing_file_is_named(tmp_path, ours, missing):
    (write_identity(tmp_path, ours, "agent", "n1") / missing).unlink()
    with pytest.raises(SollolError, match=missing) as raised:
        TlsFiles(tmp_path)
    assert raised.value.refusal.reason is Reason.CERTIFICATE_UNREADABLE


@pytest.mark.parametrize("name", ["ca.pem", "node.pem", "node.key"])
def test_a_file_that_holds_something_else_is_refused(tmp_path, ours, name, monkeypatch):
    monkeypatch.setattr(module, "_SETTLED_WITHIN_S", 0.0)
    write_identity(tmp_path, ours, "agent", "n1")
    (tmp_path / name).write_bytes(b"not PEM")
    with pytest.raises(SollolError) as raised:
        TlsFiles(tmp_path)
    assert raised.value.refusal.reason is Reason.CERTIFICATE_UNREADABLE


def test_a_key_of_another_certificate_is_refused(tmp_path, ours, monkeypatch):
    monkeypatch.setattr(module, "_SETTLED_WITHIN_S", 0.05)
    other = write_identity(tmp_path / "other", ours, "agent", "n2")
    mine = write_identity(tmp_path / "mine", ours, "agent", "n1")
    (other / "node.key").replace(mine / "node.key")
    with pytest.raises(SollolError, match="belongs to it"):
        TlsFiles(mine)


def test_who_starts_in_the_middle_of_a_rotation_waits_for_its_end(tmp_path, ours, monkeypatch):
    directory = write_identity(tmp_path, ours, "agent", "n1")
    newer = write_identity(tmp_path / "newer", ours, "agent", "n1")
    (newer / "node.key").replace(directory / "node.key")
    waited = []

    def rotated(pause_s):
        waited.append(pause_s)
        (newer / "node.pem").replace(directory / "node.pem")

    monkeypatch.setattr(module.time, "sleep", rotated)
    assert TlsFiles(directory).identity == checked("test", "agent", "n1")
    assert len(waited) == 1


def test_files_that_change_are_followed(tmp_path, ours):
    files = TlsFiles(write_identity(tmp_path, ours, "agent", "n1"))
    before = files.current()
    assert files.current() is before
    write_identity(tmp_path, ours, "agent", "n1")
    after = files.current()
    assert after.certificate.serial != before.certificate.serial
    assert after.identity == before.identity


def test_a_half_finished_rotation_leaves_the_former_content_in_use_and_is_logged(tmp_path, ours):
    files = TlsFiles(write_identity(tmp_path, ours, "agent", "n1"))
    before = files.current()
    other = write_identity(tmp_path / "new", ours, "agent", "n1")
    (other / "node.key").replace(tmp_path / "node.key")
    with capture_logs() as logs:
        assert files.current() is before
        assert files.current() is before
    assert [entry["event"] for entry in logs] == ["certificate_not_followed"]
    (other / "node.pem").replace(tmp_path / "node.pem")
    assert files.current().certificate.serial != before.certificate.serial


def test_a_change_that_cannot_be_read_at_this_moment_is_taken_in_the_next(tmp_path, ours, monkeypatch):
    directory = write_identity(tmp_path / "n1", ours, "agent", "n1")
    bad = write_identity(tmp_path / "bad", ours, "agent", "bad")
    files = TlsFiles(directory)

    def full(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    revoke(directory, ours, bad)
    with capture_logs() as logs, monkeypatch.context() as patched:
        patched.setattr(module.os, "memfd_create", full)
        for _ in range(3):
            assert files.current().revoked.number == 0
    assert [entry["event"] for entry in logs] == ["certificate_not_followed"]
    assert files.current().revoked.number == 1


def test_what_is_revoked_foreign_or_expired_is_not_admitted(tmp_path, ours):
    files = TlsFiles(write_identity(tmp_path / "head", ours, "head", "h"))
    peer = certificates.read((write_identity(tmp_path / "n1", ours, "agent", "n1") / "node.pem").read_bytes())
    other = write_identity(tmp_path / "o", ours, "agent", "n1", cluster="other")

    def refused(certificate, *, now_s=None):
        with pytest.raises(SollolError) as raised:
            admitted(certificate, files.current(), now_s=now_s or time.time())
        return raised.value.refusal.reason

    assert admitted(peer, files.current(), now_s=time.time()) == checked("test", "agent", "n1")
    assert refused(certificates.read((other / "node.pem").read_bytes())) is Reason.FOREIGN_CERTIFICATE
    assert refused(certificates.read(ours.certificate)) is Reason.FOREIGN_CERTIFICATE
    assert refused(peer, now_s=peer.not_after_s + 1) is Reason.CERTIFICATE_EXPIRED
    revoke(tmp_path / "head", ours, tmp_path / "n1")
    assert refused(peer) is Reason.CERTIFICATE_REVOKED


class Tls:
    """A TLS listener that answers with who asked."""

    def __init__(self, files):
        self.files = files

    async def __aenter__(self):
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.files.server_context())
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_):
        self.server.close()
        await self.server.wait_closed()

    async def _serve(self, _reader, writer):
        try:
            writer.write(self.files.peer(writer.get_extra_info("ssl_object")).uri.encode())
            await writer.drain()
        finally:
            writer.close()

    async def ask(self, files, name="n1.agent.sollol"):
        """What it answers; empty when it refuses us, which TLS 1.3 tells after our side of the handshake."""
        context = files.client_context()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, ssl=context, server_hostname=name)
        try:
            return (await reader.read()).decode()
        except (ConnectionError, ssl.SSLError):
            return ""
        finally:
            writer.close()


async def test_a_listener_admits_certificates_of_its_authority_and_follows_its_files(tmp_path, ours):
    theirs = authority()
    head = TlsFiles(write_identity(tmp_path / "head", ours, "head", "h"))
    expired = TlsFiles(write_identity(tmp_path / "old", ours, "head", "h", expired=True))
    foreign = TlsFiles(write_identity(tmp_path / "foreign", theirs, "head", "h", trusts=ours.certificate))
    async with Tls(TlsFiles(write_identity(tmp_path / "n1", ours, "agent", "n1"))) as listener:
        assert await listener.ask(head) == "spiffe://sollol/test/head/h"
        assert await listener.ask(head, "agent.sollol") == "spiffe://sollol/test/head/h"
        assert await listener.ask(expired) == ""
        assert await listener.ask(foreign) == ""
        for name in ("n2.agent.sollol", "head.sollol"):
            with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
                await listener.ask(head, name)

        write_identity(tmp_path / "n1", theirs, "agent", "n1")
        with pytest.raises(ssl.SSLCertVerificationError, match="verify failed"):
            await listener.ask(head)
        write_identity(tmp_path / "head", theirs, "head", "h")
        assert await listener.ask(head) == "spiffe://sollol/test/head/h"


async def _health(port, files, name):
    async with open_channel(f"127.0.0.1:{port}", files and files.current(), name=name) as channel:
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)


async def test_grpc_admits_certificates_of_its_authority_and_follows_its_files(tmp_path, ours):
    theirs, any_agent = authority(), role_name(Role.AGENT)
    head = TlsFiles(write_identity(tmp_path / "head", ours, "head", "h"))
    foreign = TlsFiles(write_identity(tmp_path / "foreign", theirs, "head", "h", trusts=ours.certificate))
    expired = TlsFiles(write_identity(tmp_path / "old", ours, "head", "h", expired=True))
    server = new_server()
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    port = bind(server, "127.0.0.1:0", TlsFiles(write_identity(tmp_path / "n1", ours, "agent", "n1")))
    await server.start()
    try:
        await _health(port, head, "n1.agent.sollol")
        for asking, name in (
            (foreign, any_agent),
            (expired, any_agent),
            (None, any_agent),
            (head, "n2.agent.sollol"),
            (head, role_name(Role.HEAD)),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await _health(port, asking, name)
            assert raised.value.code() is grpc.StatusCode.UNAVAILABLE

        write_identity(tmp_path / "n1", theirs, "agent", "n1")
        with pytest.raises(grpc.aio.AioRpcError):
            await _health(port, head, any_agent)
        write_identity(tmp_path / "head", theirs, "head", "h")
        await _health(port, head, any_agent)
    finally:
        await server.stop(0)
