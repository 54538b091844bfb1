import errno
import os
import stat
import threading
from pathlib import Path

import pytest
from sollol.errors import Reason, SollolError
from structlog.testing import capture_logs

from sollold.key_file import KeyFile, change, keys_path, read
from sollold.keys import render
from tests.fakes.fake_keys import key_of

ALICE, BOB = key_of("alice"), key_of("bob")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "head" / "keys.json"


def add(path, *keys):
    return change(path, lambda present: (*present, *keys))


def unreadable(file: KeyFile) -> str:
    with pytest.raises(SollolError) as caught:
        file.current()
    assert caught.value.refusal.reason is Reason.KEYS_UNREADABLE
    return caught.value.refusal.message


def test_no_file_is_no_keys(path):
    assert KeyFile(path).current() == ()
    assert read(path) == ()


def test_a_head_sees_each_change_with_the_next_request(path):
    file = KeyFile(path)
    assert file.current() == ()
    add(path, ALICE)
    assert file.current() == (ALICE,)
    add(path, BOB)
    assert file.current() == (ALICE, BOB)
    change(path, lambda present: present[1:])
    assert file.current() == (BOB,)


def test_only_its_owner_may_read_the_file(path):
    add(path, ALICE)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [entry.name for entry in path.parent.iterdir()] == ["keys.json"]


def test_a_change_is_on_the_disk_with_its_name_before_it_is_said_to_hold(path, monkeypatch):
    add(path, key_of("alice"))
    synced, before = [], path.stat().st_ino

    def fsync(descriptor):
        synced.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, path.stat().st_ino != before))

    monkeypatch.setattr(os, "fsync", fsync)
    add(path, key_of("bob"))
    assert synced == [(f"{path.name}.new", False), (path.parent.name, True)]


def test_a_change_that_is_refused_leaves_the_file_as_it_was(path):
    add(path, ALICE)
    before = path.read_bytes()

    def refused(_present):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        change(path, refused)
    assert path.read_bytes() == before


def test_changes_made_at_the_same_time_are_all_there_afterwards(path):
    names = [f"key-{at}" for at in range(12)]
    threads = [threading.Thread(target=add, args=(path, key_of(name))) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(key.name for key in read(path)) == sorted(names)


@pytest.mark.parametrize("content", [b"", b"garbage", render((ALICE,))[:40], b'{"version": 9, "keys": []}'])
def test_a_file_that_is_garbled_admits_nobody_until_it_is_repaired(path, content):
    file = KeyFile(path)
    add(path, ALICE)
    file.current()
    with capture_logs() as lines:
        path.write_bytes(content)
        unreadable(file)
        assert str(path) not in unreadable(file)
    assert [line["event"] for line in lines] == ["keys_unreadable"]
    path.write_bytes(render((ALICE,)))
    assert file.current() == (ALICE,)


def test_a_file_that_is_garbled_from_the_start_admits_nobody(path):
    path.parent.mkdir()
    path.write_bytes(b"garbage")
    unreadable(KeyFile(path))
    with pytest.raises(SollolError, match=r"keys\.json.*repair it"):
        read(path)
    with pytest.raises(SollolError):
        add(path, ALICE)
    assert path.read_bytes() == b"garbage"


def test_a_file_that_cannot_be_opened_admits_nobody(path):
    path.mkdir(parents=True)  # root may read any file, but no directory as one
    unreadable(KeyFile(path))


@pytest.mark.parametrize("call", ["stat", "read_bytes"])
@pytest.mark.parametrize("known_before", [True, False])
def test_an_error_that_passes_refuses_everybody_only_while_it_lasts(path, monkeypatch, call, known_before):
    file = KeyFile(path)
    add(path, ALICE)
    if known_before:
        file.current()
    add(path, BOB)

    def fail(_path):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(type(path), call, fail)
        with capture_logs() as lines:
            unreadable(file)
            unreadable(file)
    assert [line["event"] for line in lines] == ["keys_unreadable"]
    assert file.current() == (ALICE, BOB)


def test_an_error_that_passes_where_there_never_was_a_file_leaves_no_trace(path, monkeypatch):
    file = KeyFile(path)

    def fail(_path):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(type(path), "stat", fail)
        unreadable(file)
    assert file.current() == ()


def test_a_file_that_vanishes_does_not_open_the_head(path):
    file = KeyFile(path)
    add(path, ALICE)
    file.current()
    path.unlink()
    unreadable(file)
    unreadable(file)
    add(path, BOB)
    assert file.current() == (BOB,)


def test_auto_is_the_state_directory_of_the_service_or_of_the_user(tmp_path):
    service, home = tmp_path / "service", {"HOME": str(tmp_path / "home")}
    users = tmp_path / "home" / ".local" / "state" / "sollol" / "head" / "keys.json"
    assert keys_path("auto", "auto", home, service) == users
    service.mkdir()
    assert keys_path("auto", "auto", home, service) == service / "keys.json"
    assert (
        keys_path("auto", "auto", {**home, "STATE_DIRECTORY": "/x/head:/y"}, service).as_posix() == "/x/head/keys.json"
    )
    assert keys_path("auto", "/s", home, service).as_posix() == "/s/keys.json"
    assert keys_path("/k.json", "/s", home, service).as_posix() == "/k.json"


def test_root_writes_for_the_user_whose_directory_it_is(path):
    path.parent.mkdir()
    owner = (1234, 2345) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    os.chown(path.parent, *owner)
    add(path, ALICE)
    assert (path.stat().st_uid, path.stat().st_gid) == owner
