"""The authority's store, and `sollol pki`: what is made, renewed, revoked, and with which permissions."""

import os
import pwd
import shutil
import ssl
import stat
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sollol import certificates, revocations
from sollol.contexts import load_chain
from sollol.errors import Reason, SollolError
from sollol.identity import Role, checked
from sollol.tls import TlsFiles, admitted

from sollold.pki.authority import fingerprint, issue_requested, new_key, request
from sollold.pki.store import Store, place
from tests.certificates import authority, revoked_list
from tests.sollol_command import sollol


@pytest.fixture
def store(tmp_path):
    made = Store(tmp_path / "pki")
    made.init("lab")
    return made


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def serial(directory):
    return certificates.read((directory / "node.pem").read_bytes()).serial


def trusts(files, other):
    """Whether a TLS handshake between the two succeeds: openssl's own verification."""
    done = subprocess.run(
        ("openssl", "verify", "-CAfile", files / "ca.pem", other / "node.pem"), capture_output=True, check=False
    )
    return done.returncode == 0


async def test_init_makes_an_authority_a_head_and_an_operator_and_keys_are_private(tmp_path):
    base = tmp_path / "pki"
    status, out, err = await sollol("pki", "init", "--cluster", "lab", "--head-id", "h1", "--dir", str(base))
    assert (status, err) == (0, "")
    assert "sollol pki invite" in out
    assert TlsFiles(base / "head").identity == checked("lab", "head", "h1")
    assert TlsFiles(base / "admin").identity.role is Role.ADMIN
    for key in (base / "authority" / "ca.key", base / "head" / "node.key", base / "admin" / "node.key"):
        assert mode(key) == 0o600
    assert {mode(folder) for folder in (base / "authority", base / "head", base / "admin")} == {0o700}
    assert (
        3640
        < (certificates.read((base / "authority" / "ca.pem").read_bytes()).not_after_s - time.time()) / 86400
        < 3651
    )

    before = (base / "authority" / "ca.key").read_bytes()
    status, _, err = await sollol("pki", "init", "--dir", str(base))
    assert status == 2
    assert "has an authority already" in err
    assert (base / "authority" / "ca.key").read_bytes() == before


async def test_what_is_issued_is_shown_renewed_with_a_new_key_and_revoked(tmp_path):
    base, out_dir = tmp_path / "pki", tmp_path / "n1"
    at = ("--dir", str(base))
    assert (await sollol("pki", "init", *at))[0] == 0
    assert (await sollol("pki", "issue", "agent", "n1", "--days", "3", *at))[0] == 0
    assert (await sollol("pki", "issue", "agent", "n2", "--out", str(out_dir), *at))[0] == 0
    n1 = base / "issued" / "agent-n1"
    status, out, _ = await sollol("pki", "show", *at)
    assert status == 0
    assert ["n1", "agent", "home"] in [line.split()[:3] for line in out.splitlines()]
    assert "(3 days)" in out

    key, former = (n1 / "node.key").read_bytes(), serial(n1)
    assert (await sollol("pki", "rotate", *at))[0] == 0
    assert (await sollol("pki", "rotate", str(out_dir), *at))[0] == 0
    assert (n1 / "node.key").read_bytes() != key
    assert serial(n1) != former
    assert TlsFiles(n1).identity == checked("home", "agent", "n1")

    assert (await sollol("pki", "revoke", "n1", *at))[0] == 0
    head = TlsFiles(base / "head").current()
    assert {former, serial(n1)} <= head.revoked.serials
    with pytest.raises(SollolError, match="CERTIFICATE_REVOKED"):
        admitted(certificates.read((n1 / "node.pem").read_bytes()), head, now_s=time.time())
    assert "revoked" in (await sollol("pki", "show", *at))[1]
    status, _, err = await sollol("pki", "revoke", "nobody", *at)
    assert status == 2
    assert "nobody has a certificate as agent nobody" in err


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("issue", "agent", "a/b"), 2, "cannot stand in a certificate"),
        (("issue", "root", "a"), 2, "invalid choice"),
        (("issue", "agent", "a", "--days", "0"), 2, "not a number of days"),
        (("rotate", "/nonexistent"), 2, "/nonexistent"),
        (("rotate", "--authority", "drop"), 2, "no former authority"),
        (("rotate", "--authority", "switch"), 2, "begin with"),
        (("invite", "--ttl", "soon"), 2, "not a time such as"),
        (("invite", "--port", "70000"), 2, "argument --port: '70000' is not a port, 1 to 65535"),
        (("invite", "--port", "x"), 2, "'x' is not a port"),
    ],
)
async def test_what_cannot_be_done_is_said_and_changes_nothing(tmp_path, store, words, status, said):
    before = sorted((path, path.read_bytes()) for path in store.base.rglob("*") if path.is_file())
    done, _, err = await sollol("pki", *words, "--dir", str(store.base))
    assert done == status
    assert said in err
    assert sorted((path, path.read_bytes()) for path in store.base.rglob("*") if path.is_file()) == before


async def test_without_an_authority_the_message_says_where_one_is_made(tmp_path):
    status, _, err = await sollol("pki", "issue", "agent", "a", "--dir", str(tmp_path))
    assert status == 2
    assert "`sollol pki init` makes one" in err


def test_an_authority_is_replaced_in_three_steps_and_all_trust_each_other_on_the_way(store, tmp_path):
    store.issue(Role.HEAD, "h", store.base / "head")
    remote = tmp_path / "remote"  # a machine that joined: renewed by joining again, not by `rotate`
    store.issue(Role.AGENT, "n1", remote)
    head = store.base / "head"

    store.add_authority()
    assert trusts(head, remote)
    assert trusts(remote, head)
    store.issue(Role.AGENT, "n1", remote)
    store.switch_authority()
    store.rotate([head])
    assert trusts(head, remote)
    assert trusts(remote, head)
    with pytest.raises(SollolError, match="would lock them out: agent n1 of lab"):
        store.drop_authority()
    store.issue(Role.AGENT, "n1", remote)
    store.drop_authority()
    assert trusts(head, remote)
    assert trusts(remote, head)
    assert (store.directory / "ca.pem").read_bytes() == (head / "ca.pem").read_bytes()


async def test_an_authority_is_not_dropped_while_that_would_lock_somebody_out(tmp_path):
    base = tmp_path / "pki"
    at = ("--dir", str(base))
    assert (await sollol("pki", "init", *at))[0] == 0
    store = Store(base)
    remote = tmp_path / "remote"
    store.issue(Role.AGENT, "n1", remote)
    store.issue(Role.AGENT, "stolen", tmp_path / "stolen")
    store.revoke(Role.AGENT, "stolen")
    assert (await sollol("pki", "rotate", "--authority", "add", *at))[0] == 0
    store.issue(Role.AGENT, "n1", remote)  # as `add` says; still signed by the former authority
    status, out, _ = await sollol("pki", "rotate", "--authority", "switch", *at)
    assert status == 0
    assert "once more" in out

    status, _, err = await sollol("pki", "rotate", "--authority", "drop", *at)
    assert status == 2
    assert "would lock them out: agent n1 of home." in err
    assert trusts(base / "head", remote)
    store.issue(Role.AGENT, "n1", remote)
    status, out, _ = await sollol("pki", "rotate", "--authority", "drop", *at)
    assert status == 0
    assert trusts(base / "head", remote)
    assert not trusts(base / "head", tmp_path / "stolen")
    assert trusts(remote, tmp_path / "stolen"), "nobody has told that machine yet"
    assert "Every other machine does until it renews" in out
    store.issue(Role.AGENT, "n1", remote)
    assert not trusts(remote, tmp_path / "stolen")


async def test_whoever_is_revoked_is_renewed_by_name_only(store):
    at = ("--dir", str(store.base))
    shut_out, head = store.base / "agent", store.base / "head"
    store.issue(Role.HEAD, "h", head)
    store.issue(Role.AGENT, "n1", shut_out)
    store.revoke(Role.AGENT, "n1")
    before = serial(shut_out), serial(head)

    status, out, _ = await sollol("pki", "rotate", *at)

    assert status == 0
    assert "left alone, since it is revoked: agent n1 of lab" in out
    assert serial(shut_out) == before[0]
    assert serial(head) != before[1]
    assert (await sollol("pki", "rotate", *at, str(shut_out)))[0] == 0
    assert serial(shut_out) not in store.revoked().serials


async def test_an_authority_is_dropped_by_force_whoever_is_locked_out(store, tmp_path):
    at = ("--dir", str(store.base))
    store.issue(Role.HEAD, "h", store.base / "head")
    store.issue(Role.AGENT, "n1", tmp_path / "remote")
    store.add_authority()
    assert (await sollol("pki", "rotate", "--authority", "switch", *at))[0] == 0

    assert (await sollol("pki", "rotate", "--authority", "drop", "--force", *at))[0] == 0

    assert not trusts(store.base / "head", tmp_path / "remote")


async def test_a_user_whose_name_cannot_stand_in_a_certificate_is_the_operator(tmp_path, monkeypatch):
    monkeypatch.setenv("SUDO_USER", "CORP\\alice")

    assert (await sollol("pki", "init", "--dir", str(tmp_path / "pki")))[0] == 0

    assert TlsFiles(tmp_path / "pki" / "admin").identity == checked("home", "admin", "operator")


async def test_an_authority_is_only_made_when_its_first_names_can_be(tmp_path):
    status, _, err = await sollol("pki", "init", "--head-id", "a/b", "--dir", str(tmp_path / "pki"))

    assert (status, "cannot stand in a certificate" in err) == (2, True)
    assert not (tmp_path / "pki").exists()


def test_a_name_that_differs_in_case_only_is_taken(store, tmp_path):
    store.issue(Role.AGENT, "bigbox", tmp_path / "n")

    assert store.is_taken(checked("lab", "agent", "BigBox"))
    assert not store.is_taken(checked("lab", "agent", "big-box"))
    assert not store.is_taken(checked("lab", "head", "bigbox"))


@pytest.mark.skipif("os.geteuid() != 0", reason="only root gives files away")
def test_daemons_get_their_own_files_and_nobody_elses_and_links_are_not_followed(store, tmp_path, monkeypatch):
    monkeypatch.setattr("sollold.pki.store.SERVICE_USER", "nobody")
    nobody = pwd.getpwnam("nobody").pw_uid
    victim = tmp_path / "victim"
    victim.write_text("root's")
    store.issue(Role.AGENT, "n1", store.base / "agent")
    (store.base / "agent" / "link").symlink_to(victim)

    store.rotate([store.base / "agent"])
    store.issue(Role.AGENT, "n2", store.base / "issued" / "agent-n2")

    assert (store.base / "agent" / "node.key").stat().st_uid == nobody
    assert victim.stat().st_uid == 0
    assert {path.stat().st_uid for path in (store.base / "issued").rglob("*")} == {0}


def test_whoever_is_revoked_stays_so_in_each_newer_list_under_a_new_authority_and_where_more_is_issued(store, tmp_path):
    remote = {name: tmp_path / name for name in ("n1", "n2")}
    for name, directory in remote.items():
        store.issue(Role.AGENT, name, directory)
    gone, numbers = {name: serial(directory) for name, directory in remote.items()}, []
    for name in remote:
        store.revoke(Role.AGENT, name)
        numbers.append(store.revoked().number)
    assert store.revoked().serials == set(gone.values())
    store.add_authority()
    store.switch_authority()
    numbers.append(store.revoked().number)
    assert numbers == sorted(set(numbers))
    assert revocations.verified(store.revoked().pem, store.authority().certificate).serials == set(gone.values())
    store.issue(Role.AGENT, "n1", tmp_path / "again")
    files = TlsFiles(tmp_path / "again").current()
    assert files.revoked == store.revoked()
    assert files.certificate.serial not in files.revoked.serials


def test_an_authority_that_was_restored_from_a_copy_brings_nobody_back(store, tmp_path):
    head, gone = store.base / "head", {}
    store.issue(Role.HEAD, "h", head)
    for name in ("n1", "n2"):
        gone[name] = store.issue(Role.AGENT, name, tmp_path / name).serial
    shutil.copytree(store.directory, tmp_path / "copy")
    store.revoke(Role.AGENT, "n1")
    shutil.rmtree(store.directory)
    shutil.copytree(tmp_path / "copy", store.directory)

    store.rotate([head])
    assert revocations.read((head / "revoked").read_bytes()).serials == {gone["n1"]}
    store.revoke(Role.AGENT, "n2")
    assert store.revoked().serials == set(gone.values())
    assert revocations.read((head / "revoked").read_bytes()).serials == set(gone.values())


def test_a_list_beside_a_certificate_counts_only_when_an_authority_of_ours_signed_it(store):
    store.issue(Role.HEAD, "h", store.base / "head")
    for bad in (b"no list", revoked_list(authority("lab"), store.base / "head", number=2**40)):
        (store.base / "head" / "revoked").write_bytes(bad)
        assert store.revoked().number == 0


def test_a_list_that_cannot_be_read_is_not_replaced_by_a_shorter_one(store, tmp_path):
    store.issue(Role.AGENT, "n1", tmp_path / "n1")
    (store.directory / "revoked").write_text("a serial number\n")
    with pytest.raises(SollolError, match="no list of revoked certificates"):
        store.revoke(Role.AGENT, "n1")


def test_a_half_replaced_authority_is_not_replaced_again(store):
    store.add_authority()
    with pytest.raises(SollolError, match="being replaced already"):
        store.add_authority()


def test_a_daemon_never_uses_a_key_and_a_certificate_that_do_not_belong_together(store, tmp_path, monkeypatch):
    """It looks after every file that is replaced: only the last one makes another identity of them."""
    store.issue(Role.AGENT, "n1", tmp_path / "n1")
    files = TlsFiles(tmp_path / "n1")
    former, seen, really_replace = files.current(), [], Path.replace

    def replace(path, target):
        really_replace(path, target)
        seen.append((target.name, files.current()))
        load_chain(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), seen[-1][1].chain, seen[-1][1].key)
        return target

    monkeypatch.setattr(Path, "replace", replace)
    store.issue(Role.AGENT, "n1", tmp_path / "n1")

    (*_, (name, newest)) = at = [(name, used) for name, used in seen if name in ("ca.pem", "node.key", "node.pem")]
    assert (len(at), name) == (3, "node.pem")
    assert {used.certificate.serial for _, used in at[:-1]} == {former.certificate.serial}
    assert newest.certificate.serial == serial(tmp_path / "n1") != former.certificate.serial


def test_files_that_are_replaced_never_widen_their_permissions(store, tmp_path):
    directory = tmp_path / "x"
    for _ in range(2):
        place(directory, Role.AGENT, key=new_key(), chain=b"c", ca=b"a")
        assert mode(directory / "node.key") == 0o600
    assert [path.name for path in directory.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    "asked", [b"", b"not a request", b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"]
)
def test_a_signing_request_that_is_none_is_refused(store, asked):
    with pytest.raises(SollolError) as raised:
        issue_requested(store.authority(), checked("lab", "agent", "n"), asked)
    assert raised.value.refusal.reason is Reason.INVALID_REQUEST


def test_a_certificate_that_was_asked_for_fits_the_key_that_asked(store, tmp_path):
    key = new_key()
    chain = issue_requested(store.authority(), checked("lab", "agent", "n"), request(key))
    place(tmp_path / "n", Role.AGENT, key=key, chain=chain, ca=store.bundle())
    assert TlsFiles(tmp_path / "n").identity.node_id == "n"
    assert len(fingerprint(store.authority().certificate)) == 32


def test_what_was_issued_is_on_the_disk_before_anybody_has_it_and_half_a_line_of_it_stops_nothing(store, monkeypatch):
    store.issue(Role.AGENT, "n1", store.base / "n1")
    with (store.directory / "issued").open("a") as file:
        file.write("7f00 spiffe://sollol/l")  # power was lost
    synced = []

    def fsync(descriptor):
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        synced.append((path.name, (store.base / "n2" / "node.pem").exists()))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        store.issue(Role.AGENT, "n2", store.base / "n2")

    assert ("issued", False) in synced
    assert [each.identity.node_id for each in store.issued()] == ["n1", "n2"]
    assert len(store.revoke(Role.AGENT, "n2")) == 1


def test_of_several_who_revoke_at_the_same_time_each_is_heard(store):
    names = [f"n{at}" for at in range(6)]
    for name in names:
        store.issue(Role.AGENT, name, store.base / name)

    with ThreadPoolExecutor(len(names)) as threads:
        revoked = {
            serial for serials in threads.map(lambda name: store.revoke(Role.AGENT, name), names) for serial in serials
        }

    assert store.revoked().serials == revoked
    assert len(revoked) == len(names)
    for name in names:
        assert (store.base / name / "revoked").read_bytes() == store.revoked().pem
