"""The head's link to an agent with certificates: who it takes reports from, and how it renews its connection."""

import asyncio
import contextlib

import grpc
import pytest
from sollol.certified import follow
from sollol.channels import open_channel
from sollol.errors import Reason, Retry, SollolError
from sollol.tls import TlsFiles
from sollol.v1 import agent_pb2 as pb
from sollol.v1 import agent_pb2_grpc as rpc
from structlog.testing import capture_logs

from sollold import agent_line
from sollold.agent_link import AgentLink
from tests.certificates import authority, revoke, revoked_list, write_identity
from tests.fakes.fake_agent import FakeAgent
from tests.waiting import wait_until


@pytest.fixture
def ours():
    return authority()


@pytest.fixture
def head(tmp_path, ours):
    return TlsFiles(write_identity(tmp_path / "head", ours, "head", "h"))


@contextlib.asynccontextmanager
async def linked(agent, tls):
    await agent.start()
    link = AgentLink(agent.address, tls)
    try:
        yield link
    finally:
        await link.close()
        await agent.stop()


async def first(link):
    async with contextlib.aclosing(link.watch_report()) as reports:
        return await anext(reports)


async def reason(link):
    with pytest.raises(SollolError) as raised:
        await asyncio.wait_for(first(link), 10)
    return raised.value.refusal


async def test_an_agent_is_taken_at_its_certificates_word_and_not_its_own(tmp_path, ours, head, ports):
    tls = TlsFiles(write_identity(tmp_path / "n1", ours, "agent", "n1"))
    async with linked(FakeAgent("n1", ports(), tls=tls), head) as link:
        assert (await first(link)).node_id == "n1"
        await link.release("p")
    async with linked(FakeAgent("n2", ports(), tls=tls), head) as link:
        refusal = await reason(link)
        assert refusal.reason is Reason.WRONG_NODE
        assert "reports as node n2" in refusal.message


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("a client", Reason.WRONG_ROLE),
        ("expired", Reason.CERTIFICATE_EXPIRED),
        ("foreign", Reason.FOREIGN_CERTIFICATE),
    ],
)
async def test_what_is_no_agent_of_ours_is_not_watched(tmp_path, head, ports, ours, *, what, why):
    signed_by, role = authority() if what == "foreign" else ours, "client" if what == "a client" else "agent"
    directory = write_identity(
        tmp_path / "x", signed_by, role, "n1", expired=what == "expired", trusts=ours.certificate
    )
    async with linked(FakeAgent("n1", ports(), tls=TlsFiles(directory)), head) as link:
        assert (await reason(link)).reason is why


async def test_an_agent_of_a_cluster_of_another_name_is_not_watched(tmp_path, ours, head, ports):
    tls = TlsFiles(write_identity(tmp_path / "x", ours, "agent", "n1", cluster="other"))
    async with linked(FakeAgent("n1", ports(), tls=tls), head) as link:
        assert (await reason(link)).reason is Reason.FOREIGN_CERTIFICATE


async def test_an_agent_in_plaintext_is_not_watched_and_the_reason_says_what_to_look_for(head, ports):
    async with linked(FakeAgent("n1", ports()), head) as link:
        refusal = await reason(link)
        assert refusal.reason is Reason.NO_CERTIFICATE, refusal
        assert "has it a tls_dir?" in refusal.message


async def test_an_agent_that_does_not_admit_us_says_so(tmp_path, ours, head, ports):
    tls = TlsFiles(write_identity(tmp_path / "n1", ours, "agent", "n1", trusts=authority().certificate))
    async with linked(FakeAgent("n1", ports(), tls=tls), head) as link:
        refusal = await reason(link)
    assert refusal.reason is Reason.FOREIGN_CERTIFICATE
    assert "refuses our certificate" in refusal.message


async def test_before_it_has_been_seen_nothing_can_be_asked_of_it(head, ports):
    link = AgentLink(f"127.0.0.1:{ports()}", head)
    with pytest.raises(SollolError, match="has not been reached yet"):
        await link.release("p")
    assert (await reason(link)).reason is Reason.AGENT_UNREACHABLE
    await link.close()


async def test_a_renewed_certificate_moves_the_watch_while_a_call_goes_on_where_it_was(
    tmp_path, ours, head, ports, monkeypatch
):
    monkeypatch.setattr(agent_line, "DRAIN_POLL_S", 0.01)
    tls = TlsFiles(write_identity(tmp_path / "n1", ours, "agent", "n1"))
    agent, release = FakeAgent("n1", ports(), tls=tls), asyncio.Event()
    agent.hooks["Release"] = lambda _: release.wait()
    async with linked(agent, head) as link, contextlib.aclosing(link.watch_report()) as reports:
        await anext(reports)
        former = link._line
        slow = asyncio.create_task(link.release("p"))
        await wait_until(lambda: ("Release", "p") in agent.calls, what="the call has arrived")
        write_identity(tmp_path / "head", ours, "head", "h")
        agent.tell(cpu_count=2)
        assert (await anext(reports)).cpu_count == 2
        agent.tell(cpu_count=3)
        assert (await anext(reports)).cpu_count in {2, 3}
        assert link._line is not former
        await asyncio.wait({slow}, timeout=0.3)
        assert not slow.done()
        assert not is_closed(former)
        release.set()
        await slow
        await wait_until(lambda: is_closed(former), what="the former connection is closed")


def is_closed(line):
    return line._channel.get_state() is grpc.ChannelConnectivity.SHUTDOWN


class Relaying(FakeAgent):
    async def Relay(self, _requests, context):  # noqa: N802 - gRPC's name
        await self._called("Relay", "", context)


async def test_an_agent_that_is_revoked_is_let_go_of_at_once_with_all_that_runs_there(tmp_path, ours, head, ports):
    tls = TlsFiles(write_identity(tmp_path / "n1", ours, "agent", "n1"))
    agent = Relaying("n1", ports(), tls=tls)
    agent.hooks["Release"] = agent.hooks["Relay"] = lambda _: asyncio.Event().wait()
    async with linked(agent, head) as link, contextlib.aclosing(link.watch_report()) as reports:
        await anext(reports)
        slow = asyncio.create_task(link.release("p"))
        stream = link.relay.open("i", "POST", "/v1/completions", {}, b"{}")
        await wait_until(lambda: {("Release", "p"), ("Relay", "")} <= set(agent.calls), what="both have arrived")
        following = asyncio.create_task(follow(head))
        revoke(tmp_path / "head", ours, tmp_path / "n1")
        for waiting in (slow, stream.response(), anext(reports)):
            with pytest.raises(SollolError, match=r"is cut off: the certificate .* has been revoked") as raised:
                await asyncio.wait_for(waiting, 5)
            assert raised.value.refusal.reason is Reason.AGENT_UNREACHABLE
            assert raised.value.refusal.retry is Retry.RETRYABLE
        with pytest.raises(SollolError, match="has not been reached yet"):
            link.relay.open("i", "POST", "/v1/completions", {}, b"{}")
        assert (await reason(link)).reason is Reason.CERTIFICATE_REVOKED
        await wait_until(lambda: agent.watchers == 0, what="the agent is not watched")
        following.cancel()


@contextlib.asynccontextmanager
async def watching(link, tls):
    """A head that watches an agent, as `Nodes` does."""

    async def watch():
        async with contextlib.aclosing(link.watch_report()) as reports:
            async for _ in reports:
                pass

    tasks = [asyncio.create_task(watch()), asyncio.create_task(follow(tls))]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def revoked_by(tls):
    return tls.current().revoked.number


async def test_a_list_goes_from_one_head_to_an_agent_and_from_there_to_another_head(tmp_path, ours, head, ports):
    agents, bad = TlsFiles(write_identity(tmp_path / "n1", ours, "agent", "n1")), tmp_path / "bad"
    write_identity(bad, ours, "agent", "bad")
    other = TlsFiles(write_identity(tmp_path / "other", ours, "head", "other"))
    agent = FakeAgent("n1", ports(), tls=agents)
    following = asyncio.create_task(follow(agents))
    async with linked(agent, head) as link, watching(link, head):
        second = AgentLink(agent.address, other)
        async with watching(second, other):
            await wait_until(lambda: agent.watchers == 2, what="both heads watch it")
            with capture_logs() as logs:
                revoke(tmp_path / "head", ours, bad, number=7)
                await wait_until(lambda: revoked_by(agents) == revoked_by(other) == 7, what="both have the list")
                await wait_until(lambda: taken(logs) == ["agent " + agent.address, "head h of test"], what="it is told")
            revoke(tmp_path / "other", ours, number=8)
            await wait_until(lambda: revoked_by(agents) == revoked_by(head) == 8, what="the other way, too")
        await second.close()
    following.cancel()


def taken(logs):
    return sorted(entry["peer"] for entry in logs if entry["event"] == "revoked_list_taken")


async def test_a_head_that_comes_later_is_told_and_an_agent_that_knows_less_is_told(tmp_path, ours, head, ports):
    agents = TlsFiles(write_identity(tmp_path / "n1", ours, "agent", "n1"))
    revoke(tmp_path / "n1", ours, number=3)
    async with linked(FakeAgent("n1", ports(), tls=agents), head) as link:
        async with watching(link, head):
            await wait_until(lambda: revoked_by(head) == 3, what="the head is told")
        revoke(tmp_path / "head", ours, number=4)
        async with watching(link, head):
            await wait_until(lambda: revoked_by(agents) == 4, what="the agent is told")


async def test_an_agent_that_is_told_that_it_is_revoked_itself_is_let_go_of(tmp_path, ours, head, ports):
    agents = TlsFiles(write_identity(tmp_path / "n1", ours, "agent", "n1"))
    agent = FakeAgent("n1", ports(), tls=agents)
    async with linked(agent, head) as link, watching(link, head):
        await wait_until(lambda: agent.watchers == 1, what="it is watched")
        revoke(tmp_path / "head", ours, tmp_path / "n1")
        await wait_until(lambda: agent.watchers == 0, what="it is let go of")
        assert (await reason(link)).reason is Reason.CERTIFICATE_REVOKED


@pytest.mark.parametrize(
    ("what", "why"),
    [("another authority's", "FOREIGN_CERTIFICATE"), ("older", "INVALID_REQUEST"), ("garbled", "INVALID_REQUEST")],
)
async def test_a_list_that_must_not_count_is_refused_and_told_of(tmp_path, ours, ports, what, why):
    agents = TlsFiles(write_identity(tmp_path / "n1", ours, "agent", "n1"))
    revoke(tmp_path / "n1", ours, tmp_path / "n1", number=5)
    sent = {
        "another authority's": revoked_list(authority(), number=9),
        "older": revoked_list(ours, number=4),
        "garbled": b"nobody",
    }[what]
    agent = FakeAgent("n1", ports(), tls=agents)
    head = TlsFiles(write_identity(tmp_path / "h", ours, "head", "h"))
    async with agent.running(), open_channel(agent.address, head.current()) as channel:
        call = rpc.RevocationServiceStub(channel).ExchangeRevoked()
        with capture_logs() as logs:
            await call.write(pb.ExchangeRevokedRequest(number=9, revoked=sent))
            await wait_until(lambda: any(entry["event"] == "revoked_list_refused" for entry in logs), what="it says so")
        (line,) = [entry for entry in logs if entry["event"] == "revoked_list_refused"]
        assert (line["reason"], line["peer"]) == (why, "head h of test")
        assert (await call.read()).number == 5
        call.cancel()
    assert revoked_by(agents) == 5
    assert TlsFiles(tmp_path / "n1").current().revoked.number == 5
