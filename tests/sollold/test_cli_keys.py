"""`sollol keys` as operators run it: a process, its two outputs, the file that it leaves."""

import json
import os

import pytest

from sollold.key_file import KeyFile
from sollold.keys import Standing, matching
from tests.sollol_command import sollol


@pytest.fixture
def home(tmp_path):
    """A home directory, and the environment of its owner."""
    without = {name: value for name, value in os.environ.items() if not name.startswith(("SOLLOL", "XDG", "STATE_"))}
    return tmp_path, {**without, "HOME": str(tmp_path), "SOLLOL_HEAD_KEYS_FILE": str(tmp_path / "keys.json")}


async def added(home, name, *limits):
    _, environ = home
    status, out, err = await sollol("keys", "add", name, *limits, env=environ)
    assert status == 0, err
    assert out.startswith("sk-sollol-")
    assert out.strip() not in err
    return out.strip()


async def listed(home):
    status, out, err = await sollol("keys", "list", "--json", env=home[1])
    assert (status, err) == (0, "")
    return json.loads(out)["keys"]


async def test_a_key_is_shown_once_and_kept_as_a_hash(home):
    token = await added(home, "alice")
    assert len(token) == len("sk-sollol-") + 43  # 256 bits in base64
    assert token not in (home[0] / "keys.json").read_text()
    assert matching(KeyFile(home[0] / "keys.json").current(), token).name == "alice"
    assert await added(home, "bob") != token


async def test_limits_are_kept_and_listed_without_hashes(home):
    await added(home, "alice", "--models", "llama*", "qwen*", "--concurrency", "2", "--tokens-per-minute", "6000")
    await added(home, "ci", "--expires", "30")
    alice, ci = await listed(home)
    assert (alice["models"], alice["concurrency"], alice["tokens_per_minute"]) == (["llama*", "qwen*"], 2, 6000)
    assert ci["expires_unix_s"] == pytest.approx(ci["created_unix_s"] + 30 * 86_400)
    assert "sha256" not in alice
    status, table, _ = await sollol("keys", "list", env=home[1])
    assert status == 0
    for text in ("alice", "active", "llama*, qwen*", "6000", "ci", "all"):
        assert text in table
    assert "sk-sollol" not in table


async def test_a_revoked_key_stays_listed_and_its_name_can_be_given_again(home):
    token = await added(home, "alice")
    status, out, err = await sollol("keys", "revoke", "alice", env=home[1])
    assert (status, out) == (0, "")
    assert "alice is revoked" in err
    newer = await added(home, "alice")
    assert [key["state"] for key in await listed(home)] == ["revoked", "active"]
    found = KeyFile(home[0] / "keys.json").current()
    assert matching(found, token).standing(0.0) is Standing.REVOKED
    assert matching(found, newer).standing(0.0) is Standing.ACTIVE


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("add", "alice"), "there is a key alice"),
        (("add", "no name"), "name 'no name'"),
        (("add", "bob", "--models", "a b"), "models 'a b'"),
        (("add", "bob", "--concurrency", "0"), "0 is not a whole number"),
        (("add", "bob", "--expires", "soon"), "soon is not a whole number"),
        (("revoke", "bob"), "there is no key bob"),
    ],
)
async def test_what_makes_no_sense_is_refused_and_changes_nothing(home, words, message):
    await added(home, "alice")
    before = (home[0] / "keys.json").read_bytes()
    status, out, err = await sollol("keys", *words, env=home[1])
    assert (status, out) == (2, "")
    assert message in err
    assert (home[0] / "keys.json").read_bytes() == before


async def test_a_garbled_file_is_told_of_and_never_replaced(home):
    (home[0] / "keys.json").write_text("garbled")
    for words in (("add", "alice"), ("list",), ("revoke", "alice")):
        status, out, err = await sollol("keys", *words, env=home[1])
        assert (status, out) == (3, "")
        assert "KEYS_UNREADABLE" in err
        assert "keys.json" in err
    assert (home[0] / "keys.json").read_text() == "garbled"


async def test_before_the_first_key_there_are_none(home):
    assert await sollol("keys", "list", env=home[1]) == (0, "", "no keys\n")


async def test_another_file_can_be_named(home):
    other = home[0] / "deep" / "other.json"
    await added(home, "alice", "--file", str(other))
    assert [key.name for key in KeyFile(other).current()] == ["alice"]
    assert not (home[0] / "keys.json").exists()
