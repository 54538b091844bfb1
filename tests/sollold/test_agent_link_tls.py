"""The head's link to an agent with certificates: who it takes reports from, and how it renews its connection."""

import asyncio
import contextlib

import pytest
from sollol.certified import follow
from sollol.errors import Reason, Retry, SollolError
from sollol.tls import TlsFiles

from sollold.agent_link import AgentLink
from tests.certificates import authority, replace_file, write_identity
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


async def test_a_renewed_certificate_moves_the_watch_while_a_call_goes_on_where_it_was(tmp_path, ours, head, ports):
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
        assert not slow.done()
        release.set()
        await slow
        await wait_until(lambda: not link._draining, what="the former connection is closed")


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
        replace_file(tmp_path / "head" / "revoked", b"agent/n1\n")
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
