"""The thin loop around `survey.due`, over agents behind real gRPC."""

import asyncio
import contextlib

import pytest
from sollol.errors import Reason, refuse
from structlog.testing import capture_logs

from sollold import nodes as nodes_module
from sollold import surveyor as module
from sollold.nodes import Nodes
from sollold.surveyor import NOT_AGAIN_FOR_S, Surveyor
from tests.fakes.fake_agent import FakeAgent
from tests.random_clusters import RPC
from tests.waiting import wait_until


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(nodes_module, "REGISTRY_POLL_S", 0.05)
    monkeypatch.setattr(module, "PAUSE_S", 0.02)
    monkeypatch.setattr(module, "LOOK_AGAIN_S", 0.02)


class Head:
    """A head's nodes and surveyor; its clock stands until it is moved."""

    def __init__(self, *agents):
        self.nodes = Nodes(None, static_addresses=[each.address for each in agents], forget_after_s=60)
        self.now_s = 0.0
        self.surveyor = Surveyor(self.nodes, clock=lambda: self.now_s)

    @contextlib.asynccontextmanager
    async def running(self):
        tasks = [asyncio.create_task(self.nodes.run())]
        try:
            await wait_until(lambda: len(self.nodes.statuses()) == 2, what="both agents are seen")
            tasks.append(asyncio.create_task(self.surveyor.run()))
            yield self
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def links(self):
        return [(each.report.node_id, link.node_id) for each in self.nodes.statuses() for link in each.report.links]


@pytest.fixture
async def agents(quick, ports):
    async with contextlib.AsyncExitStack() as stack:
        both = [FakeAgent(name, ports()) for name in "ab"]
        for agent in both:
            agent.tell(engine=RPC)
            await stack.enter_async_context(agent.running())
        yield both


async def test_each_agent_is_asked_once_and_all_heads_see_the_results(agents):
    async with Head(*agents).running() as one, Head(*agents).running() as other:
        for head in (one, other):
            await wait_until(lambda head=head: head.links() == [("a", "b"), ("b", "a")], what="both links are known")
        asked = [len(agent.pools("MeasureLink")) for agent in agents]
        assert all(1 <= each <= 2 for each in asked)  # two heads may ask at the same moment
        seen = [status.report.sequence for status in one.nodes.statuses()]
        for _ in range(3):  # reports go on and on
            for agent in agents:
                agent.tell()
            newest = [agent.report.sequence for agent in agents]
            await wait_until(
                lambda newest=newest: [each.report.sequence for each in one.nodes.statuses()] == newest, what="reported"
            )
        assert seen < newest
        assert [len(agent.pools("MeasureLink")) for agent in agents] == asked


async def test_an_agent_that_refuses_is_left_alone_for_a_while(agents):
    a, b = agents
    a.refusals["MeasureLink"] = refuse(Reason.INTERNAL, "of another version").refusal
    with capture_logs() as logs:
        async with Head(a, b).running() as head:
            await wait_until(lambda: head.links() == [("b", "a")], what="the other direction is measured")
            for _ in range(3):
                b.tell(links=())
                await wait_until(lambda: head.links() == [("b", "a")], what="measured again")
            assert a.pools("MeasureLink") == ["b"]
            head.now_s += NOT_AGAIN_FOR_S
            await wait_until(lambda: a.pools("MeasureLink") == ["b", "b"], what="it is asked again, in vain")
            a.refusals.clear()

            def measured_later():
                head.now_s += NOT_AGAIN_FOR_S  # each time: the head may hear of the refusal only after the first
                return head.links() == [("a", "b"), ("b", "a")]

            await wait_until(measured_later, what="it is asked again")
    refused = [entry for entry in logs if entry["event"] == "link_not_measured"]
    assert [(entry["node"], entry["peer"]) for entry in refused] == [("a", "b")]
