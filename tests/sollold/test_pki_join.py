"""Joining with a token: one line on each side, once, in time, and only with the authority that invited."""

import asyncio
import contextlib
import stat
import sys

import pytest
from sollol.errors import Reason, SollolError
from sollol.identity import Role, checked
from sollol.tls import TlsFiles
from structlog.testing import capture_logs

from sollold.pki.invitations import Invitation
from sollold.pki.invite import Invited, Inviter
from sollold.pki.join import join
from sollold.pki.store import Store
from sollold.pki.token import PREFIX, Token, decode, encode
from tests.sollol_command import sollol


@pytest.fixture
def store(tmp_path):
    made = Store(tmp_path / "pki")
    made.init("lab")
    return made


class Clock:
    now_s = 1e9

    def __call__(self):
        return self.now_s


@pytest.fixture
def inviting(store, ports):
    def make(node="", *, clock=None, ttl_s=60, role=Role.AGENT, of=store):
        terms = Invited(host="127.0.0.1", port=ports(), ttl_s=ttl_s, days=2, redis_url="redis://r:1/0")
        invitation = Invitation(secret_hash="", expires_s=0, role=role, node_id=node)
        return Inviter(of, invitation, terms, **({"clock": clock} if clock else {}))

    return make


async def refused(token, node_id="n1", **more):
    with pytest.raises(SollolError) as raised:
        await join(token, node_id, **more)
    return raised.value.refusal


async def test_one_line_on_each_side_makes_a_node_of_a_machine(tmp_path, ports):
    here, there = tmp_path / "here" / "pki", tmp_path / "there" / "pki"
    assert (await sollol("pki", "init", "--cluster", "lab", "--dir", str(here)))[0] == 0
    inviter = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "sollold.cli", "pki", "invite", "--dir", str(here), "--address", "127.0.0.1"),
        *("--port", str(ports()), "--node", "n1", "--redis-url", "redis://127.0.0.1:6379/3"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        line = (await asyncio.wait_for(inviter.stdout.readline(), 20)).decode()
        program, *words = line.split()
        assert (program, words[0]) == ("sollol", "join")
        status, out, err = await sollol(*words, "--dir", str(there))
        assert (status, err) == (0, "")
        _, told = await asyncio.wait_for(inviter.communicate(), 20)
    finally:
        if inviter.returncode is None:
            inviter.kill()
            await inviter.wait()
    assert inviter.returncode == 0
    assert b"agent n1 of lab has joined" in told
    assert TlsFiles(there / "agent").identity == checked("lab", "agent", "n1")
    assert stat.S_IMODE((there / "agent" / "node.key").stat().st_mode) == 0o600
    assert "sollol-agent" in out
    settings = tmp_path / "there" / "agent.toml"
    assert stat.S_IMODE(settings.stat().st_mode) & 0o007 == 0, "a registry's address may hold a password"
    assert settings.read_text() == (
        'node_id = "n1"\nhost = "127.0.0.1"\nlisten = "127.0.0.1"\nredis_url = "redis://127.0.0.1:6379/3"\n'
    )


async def test_a_file_of_settings_is_filled_when_it_has_none_and_left_alone_when_it_has_some(tmp_path, inviting):
    for content, kept in (("# node_id = 'x'\n", False), ("port = 7999\n", True)):
        home = tmp_path / str(kept)
        home.mkdir()
        (home / "agent.toml").write_text(content)
        async with inviting(f"n-{kept}".lower()) as inviter:
            status, out, _ = await sollol("join", inviter.token, "--dir", str(home / "pki"))
        assert status == 0
        written = (home / "agent.toml").read_text()
        assert (written == content) is kept
        assert ('node_id = "n-' in written) is not kept
        assert ("left as it is" in out) is kept


async def test_a_token_counts_once_and_is_logged_when_it_comes_again(inviting, store):
    async with inviting() as inviter:
        answer, _ = await join(inviter.token, "n1")
        assert (answer.node_id, answer.role, answer.cluster) == ("n1", "agent", "lab")
        assert await inviter.joined() == checked("lab", "agent", "n1")
        with capture_logs() as logs:
            again = await refused(inviter.token, "n2")
    assert again.reason is Reason.INVITATION_USED
    assert [(entry["event"], entry["reason"], entry["peer"]) for entry in logs] == [
        ("join_refused", "INVITATION_USED", "127.0.0.1")
    ]
    assert [each.identity.node_id for each in store.issued()] == ["n1"]


async def test_of_two_machines_with_one_token_one_joins(inviting):
    async with inviting() as inviter:
        results = await asyncio.gather(*(join(inviter.token, f"n{at}") for at in range(5)), return_exceptions=True)
    assert sum(not isinstance(result, SollolError) for result in results) == 1
    assert {result.refusal.reason for result in results if isinstance(result, SollolError)} == {Reason.INVITATION_USED}


async def test_a_token_that_is_over_is_refused_on_both_sides(inviting):
    clock = Clock()
    async with inviting(clock=clock, ttl_s=60) as inviter:
        clock.now_s += 61
        assert (await refused(inviter.token, clock=clock)).reason is Reason.INVITATION_EXPIRED
        with capture_logs() as logs:  # a machine whose clock is behind asks all the same
            assert (await refused(inviter.token, clock=lambda: clock.now_s - 1000)).reason is Reason.INVITATION_EXPIRED
    assert [entry["reason"] for entry in logs if entry["event"] == "join_refused"] == ["INVITATION_EXPIRED"]


async def test_a_garbled_token_is_refused_before_anybody_is_asked(inviting):
    async with inviting() as inviter:
        token = inviter.token
    garbled = [
        token[:-1],
        token[:40],
        token.removeprefix(PREFIX),
        PREFIX,
        "",
        token[:20] + ("A" if token[20] != "A" else "B") + token[21:],
    ]
    for word in garbled:
        assert (await refused(word)).reason is Reason.INVITATION_INVALID, word


async def test_an_invented_secret_is_refused_and_logged(inviting):
    async with inviting() as inviter:
        whole = decode(inviter.token)
        invented = encode(
            Token(
                host=whole.host,
                port=whole.port,
                expires_s=whole.expires_s,
                fingerprint=whole.fingerprint,
                secret=b"x" * 16,
            )
        )
        with capture_logs() as logs:
            assert (await refused(invented)).reason is Reason.INVITATION_INVALID
    assert [entry["reason"] for entry in logs if entry["event"] == "join_refused"] == ["INVITATION_INVALID"]


async def test_a_token_of_another_authority_is_told_nothing(inviting, tmp_path):
    other = Store(tmp_path / "other")
    other.init("lab")
    async with inviting() as ours, inviting(of=other) as theirs:
        mine, their = decode(ours.token), decode(theirs.token)
        mixed = encode(
            Token(
                host=mine.host,
                port=mine.port,
                expires_s=mine.expires_s,
                fingerprint=their.fingerprint,
                secret=their.secret,
            )
        )
        refusal = await refused(mixed)
    assert refusal.reason is Reason.INVITATION_INVALID
    assert "not of the authority" in refusal.message
    assert list(other.issued()) == []


async def test_when_nobody_invites_any_more_the_message_says_so(inviting):
    async with inviting() as inviter:
        token = inviter.token
    refusal = await refused(token)
    assert refusal.reason is Reason.AGENT_UNREACHABLE
    assert "nobody invites" in refusal.message


async def test_nobody_can_take_the_name_of_a_node_that_has_a_certificate(inviting, store, tmp_path):
    store.issue(Role.AGENT, "n1", tmp_path / "n1")
    async with inviting() as inviter:
        refusal = await refused(inviter.token, "n1")
        assert refusal.reason is Reason.INVALID_REQUEST
        assert "sollol pki invite --node n1" in refusal.message
        assert (await refused(inviter.token, "../n2")).reason is Reason.INVALID_REQUEST
        answer, _ = await join(inviter.token, "n2")  # none of this has used the invitation up
        assert answer.node_id == "n2"
    async with inviting("n1") as inviter:
        answer, _ = await join(inviter.token, "whatever-it-says")
        assert answer.node_id == "n1"


async def test_strangers_that_send_anything_else_are_cut_off_and_the_invitation_stays_open(inviting):
    async with inviting() as inviter:
        where = decode(inviter.token)
        for sent in (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00\x05hello", b""):
            _, writer = await asyncio.open_connection(where.host, where.port)
            writer.write(sent)
            with contextlib.suppress(ConnectionError):
                await writer.drain()
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
        assert (await join(inviter.token, "n1"))[0].node_id == "n1"


async def test_an_invitation_that_nobody_takes_ends(inviting):
    async with inviting(ttl_s=0.05) as inviter:
        assert await inviter.joined() is None


async def test_a_port_that_is_taken_is_named(inviting):
    async with inviting() as first:
        port = decode(first.token).port
        second = inviting()
        second._terms = Invited(host="127.0.0.1", port=port, ttl_s=9, days=1, redis_url="")
        with pytest.raises(SollolError, match="PORT_TAKEN"):
            async with second:
                pass
