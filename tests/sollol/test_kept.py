"""What outlives a restart, and what does not."""

import os
from pathlib import Path

import pytest
from msgspec import Struct
from sollol.kept import load, save
from structlog.testing import capture_logs


class Shelf(Struct):
    books: tuple[str, ...]


SHELF = Shelf(("Emma", "Ulysses"))


def test_what_was_saved_is_there_after_a_restart(tmp_path: Path):
    path = tmp_path / "shelf.json"
    assert load(path, Shelf, version=1) is None
    save(path, SHELF, version=1)
    assert load(path, Shelf, version=1) == SHELF
    assert [each.name for each in tmp_path.iterdir()] == ["shelf.json"]


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"nonsense",
        b'{"version": 1}',
        b'{"version": 1, "content": {"books": 3}}',
        b'{"version": 2, "content": {"books": []}}',
        b'{"version": 1, "content": {"books": ["Em',
    ],
)
def test_a_file_that_cannot_be_understood_is_set_aside_and_told_of(tmp_path: Path, damaged: bytes):
    path = tmp_path / "shelf.json"
    path.write_bytes(damaged)
    with capture_logs() as told:
        assert load(path, Shelf, version=1) is None
    assert not path.exists()
    (aside,) = tmp_path.glob("shelf.json.bad-*")
    assert aside.read_bytes() == damaged
    assert [(line["event"], line["path"]) for line in told] == [("kept_file_set_aside", str(path))]
    save(path, SHELF, version=1)
    assert load(path, Shelf, version=1) == SHELF


def test_a_file_that_cannot_be_read_or_set_aside_keeps_nobody_from_starting(tmp_path: Path):
    (tmp_path / "a directory").mkdir()
    with capture_logs() as told:
        assert load(tmp_path / "a directory", Shelf, version=1) is None
    assert [line["event"] for line in told] == ["kept_file_unreadable"]


def test_when_writing_fails_what_was_kept_before_stays(tmp_path: Path):
    path = tmp_path / "shelf.json"
    save(path, SHELF, version=1)
    (tmp_path / "shelf.json.new").mkdir()
    with pytest.raises(OSError, match="directory"):
        save(path, Shelf(()), version=1)
    assert load(path, Shelf, version=1) == SHELF


@pytest.mark.parametrize("durable", [True, False])
def test_what_shall_outlive_a_loss_of_power_is_on_the_disk_with_its_name(
    tmp_path: Path, durable: bool, monkeypatch: pytest.MonkeyPatch
):
    path, synced = tmp_path / "shelf.json", []

    def fsync(descriptor: int) -> None:
        synced.append((Path(f"/proc/self/fd/{descriptor}").readlink(), path.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    save(path, SHELF, version=1, durable=durable)
    assert synced == ([(tmp_path / "shelf.json.new", False), (tmp_path, True)] if durable else [])


@pytest.mark.parametrize("durable", [True, False])
def test_what_is_kept_is_for_this_user_s_eyes_only(tmp_path: Path, durable: bool):
    path = tmp_path / "shelf.json"
    save(path, SHELF, version=1, durable=durable)
    assert path.stat().st_mode & 0o777 == 0o600
    assert load(path, Shelf, version=1) == SHELF
