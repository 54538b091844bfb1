import errno

import pytest
from sollol import kept
from structlog.testing import capture_logs

from agent.cordon import FILE_NAME, Cordon


def said(cordon):
    return cordon.cordoned, cordon.draining


def test_a_node_that_nobody_cordoned_has_no_file(tmp_path):
    assert said(Cordon(tmp_path)) == (False, False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("asked", "kept_as"), [((True, False), (True, False)), ((True, True), (True, True)), ((False, True), (True, True))]
)
def test_what_was_said_holds_after_a_restart(tmp_path, asked, kept_as):
    Cordon(tmp_path).set(cordoned=asked[0], draining=asked[1])
    again = Cordon(tmp_path)
    assert said(again) == kept_as
    again.set(cordoned=False, draining=False)
    assert said(again) == said(Cordon(tmp_path)) == (False, False)


@pytest.mark.parametrize("content", [b"", b"{", b"null", b'{"version": 9, "content": {}}', b'{"version": 1}'])
def test_a_file_that_cannot_be_understood_is_a_cordon_and_is_said(tmp_path, content):
    (tmp_path / FILE_NAME).write_bytes(content)
    with capture_logs() as lines:
        assert said(Cordon(tmp_path)) == (True, False)
    assert "cordon_assumed" in [line["event"] for line in lines]
    assert said(Cordon(tmp_path)) == (True, False)
    Cordon(tmp_path).set(cordoned=False, draining=False)
    assert said(Cordon(tmp_path)) == (False, False)


def test_what_cannot_be_kept_is_not_done(tmp_path, monkeypatch):
    def full(*_args, **_more):
        raise OSError(errno.ENOSPC, "no space left")

    cordon = Cordon(tmp_path)
    monkeypatch.setattr(kept, "save", full)
    with pytest.raises(OSError, match="no space"):
        cordon.set(cordoned=True, draining=False)
    assert said(cordon) == (False, False)


def test_saying_it_again_writes_nothing(tmp_path):
    cordon = Cordon(tmp_path)
    cordon.set(cordoned=True, draining=False)
    before = (tmp_path / FILE_NAME).stat().st_ino
    cordon.set(cordoned=True, draining=False)
    assert (tmp_path / FILE_NAME).stat().st_ino == before
