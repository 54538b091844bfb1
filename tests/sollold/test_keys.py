import hmac
from types import SimpleNamespace

import pytest

from sollold import keys
from sollold.keys import Standing, matching, parse, problem_of, render
from tests.fakes.fake_keys import key_of, token_of

ALICE, BOB, CAROL = key_of("alice"), key_of("bob"), key_of("carol")


@pytest.mark.parametrize("name", ["alice", "bob", "carol"])
def test_a_token_is_found_wherever_its_key_stands(name):
    assert matching((ALICE, BOB, CAROL), token_of(name)) == key_of(name)


@pytest.mark.parametrize("token", ["", "sk-sollol-", "alice", "sk-sollol-alice ", "sk-sollol-Alice", "\udcff", "é"])
def test_any_other_token_is_nobodys(token):
    assert matching((ALICE, BOB, CAROL), token) is None


@pytest.mark.parametrize("name", ["alice", "bob", "carol", "nobody"])
def test_every_key_is_compared_in_constant_time_however_early_one_matches(monkeypatch, name):
    compared = []

    def compare(one, other):
        compared.append(one)
        return hmac.compare_digest(one, other)

    monkeypatch.setattr(keys, "hmac", SimpleNamespace(compare_digest=compare))
    matching((ALICE, BOB, CAROL), token_of(name))
    assert compared == [ALICE.sha256, BOB.sha256, CAROL.sha256]


@pytest.mark.parametrize(
    ("limits", "now", "standing"),
    [
        ({}, 1e12, Standing.ACTIVE),
        ({"expires_unix_s": 100.0}, 99.9, Standing.ACTIVE),
        ({"expires_unix_s": 100.0}, 100.0, Standing.EXPIRED),
        ({"revoked_unix_s": 5.0}, 1.0, Standing.REVOKED),
        ({"revoked_unix_s": 5.0, "expires_unix_s": 3.0}, 10.0, Standing.REVOKED),
    ],
)
def test_a_key_is_good_until_it_expires_or_is_revoked(limits, now, standing):
    assert key_of("a", **limits).standing(now) is standing


@pytest.mark.parametrize(
    ("patterns", "model", "covered"),
    [
        ((), "llama3.1:8b", True),
        (("llama3.1:*",), "llama3.1:8b", True),
        (("qwen*", "llama*"), "llama3.1:8b", True),
        (("qwen*",), "llama3.1:8b", False),
        (("Llama*",), "llama3.1:8b", False),
        (("llama",), "llama3.1:8b", False),
        (("org/*:Q4_K_M",), "org/repo:Q4_K_M", True),
    ],
)
def test_a_key_covers_the_models_that_its_patterns_name(patterns, model, covered):
    assert key_of("a", models=patterns).covers(model) is covered


def test_what_is_written_is_what_is_read():
    written = (ALICE, key_of("b", models=("x*",), concurrency=2, tokens_per_minute=60, expires_unix_s=1.5))
    assert parse(render(written)) == written


def test_a_file_never_has_the_token():
    assert token_of("alice").encode() not in render((ALICE,))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"version": 1}',
        b'{"version": 2, "keys": []}',
        b'{"version": 1, "keys": [], "more": 1}',
        render((ALICE,))[:-20],
        render((ALICE,)).replace(b'"sha256"', b'"sha265"'),
        render((ALICE,)).replace(ALICE.sha256.encode(), b"00"),
        render((key_of("a", concurrency=2),)).replace(b'"concurrency": 2', b'"concurrency": 0'),
    ],
)
def test_anything_else_is_no_file_of_keys(raw):
    with pytest.raises(ValueError, match=r"\S"):
        parse(raw)


@pytest.mark.parametrize("name", ["a", "alice", "ci-runner.2", "alice@home", "a" * 63])
def test_such_names_are_good(name):
    assert problem_of(name, ("llama*", "org/repo:Q4_K_M", "[ab]?")) is None


@pytest.mark.parametrize("name", ["", " ", "-a", "a-", "a b", "a/b", "a\n", "é", "a" * 64])
def test_such_names_are_refused(name):
    assert "name" in (problem_of(name, ()) or "")


@pytest.mark.parametrize("pattern", ["", "a b", "a\n", "$(x)", "x" * 201])
def test_such_patterns_are_refused(pattern):
    assert "models" in (problem_of("alice", (pattern,)) or "")
