"""A loader in front of fake agents, each behind real gRPC."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from datetime import timedelta

import pytest
from sollol.errors import Refusal, SollolError
from sollol.report import Decision, NodeStatus, PlacementWish

from sollold.agent_link import AgentLink
from sollold.loading import Loader
from sollold.numbers import PoolNumbers
from sollold.placement import PlacementDefaults, decide
from sollold.reaping import Reaper
from sollold.starting import Starter
from tests.fakes.fake_agent import FakeAgent

M = "tiny:8b"
WISH = PlacementWish(model=M)
DEFAULTS = PlacementDefaults(
    policy="fit", strategy="pack", context_per_slot=512, parallel=2, kv_type="f16", stale_after_s=8.0
)


class Setup:
    """`statuses` is what the loader sees of the cluster: what the agents report now."""

    def __init__(self, agents, load_timeout_s):
        self.agents = agents
        self.links = {agent.report.node_id: AgentLink(agent.address) for agent in agents}
        self.decisions: list[Decision] = []
        self.progress = []
        self.forgotten, self.doubted = [], []
        self.numbers = PoolNumbers(self)
        lost = Reaper(self, on_lost=lambda *_: None)
        self.starter = Starter(self, lost=lost, pools=self, numbers=self.numbers, reservation_ttl=timedelta(seconds=5))
        self.loader = Loader(
            self,
            self.starter,
            decide=lambda wish, nodes: decide(wish, nodes, DEFAULTS),
            record=self.decisions.append,
            lost=lost,
            load_timeout_s=load_timeout_s,
        )

    def statuses(self):
        return tuple(
            NodeStatus(report=agent.report, report_age_s=agent.silent_s, connected=agent.is_up) for agent in self.agents
        )

    def status(self, node_id):
        return next((status for status in self.statuses() if status.report.node_id == node_id), None)

    def forget(self, instance_id):
        self.forgotten.append(instance_id)

    def doubt(self, instance_id):
        self.doubted.append(instance_id)

    def link(self, node_id):
        return self.links[node_id]

    async def load(self, wish=WISH, number=0):
        return await self.loader.load(wish, number, self.progress.append)

    def begin(self, number=0):
        return asyncio.create_task(self.load(number=number))

    async def failure(self) -> Refusal:
        with pytest.raises(SollolError) as caught:
            await self.load()
        return caught.value.refusal


@contextlib.asynccontextmanager
async def setups(ports: Callable[[], int]) -> AsyncIterator[Callable[..., object]]:
    """Yield what makes a `Setup` of agents with these names."""
    async with contextlib.AsyncExitStack() as stack:

        async def made(*names, load_timeout_s=10.0):
            agents = [await stack.enter_async_context(FakeAgent(name, ports()).running()) for name in names]
            setup = Setup(agents, load_timeout_s)
            for link in setup.links.values():
                stack.push_async_callback(link.close)
            stack.push_async_callback(setup.starter.close)
            return setup

        yield made
