"""A node that is drained gets no new requests, and each of its pools ends after its last stream."""

import asyncio
import contextlib

import pytest
from sollol.errors import Reason, refuse
from sollol.report import DeviceShare, Instance, InstanceKind, InstanceState, Pool

from sollold import draining
from sollold.drain import left_on, to_stop
from sollold.draining import Drainer
from tests.placement_cases import MODEL as M
from tests.placement_cases import node
from tests.pool_cluster import Cluster, instance, settle
from tests.waiting import wait_until

ON_B = (DeviceShare(device_id="CPU", layers=2), DeviceShare(node_id="b", device_id="CPU", layers=4))
LENT = Instance(instance_id="p0.backend", pool_id="p0", model="", state=InstanceState.READY, kind=InstanceKind.BACKEND)
SPLIT = instance("p0", shares=ON_B)


def ids(pools):
    return [(pool.node_id, pool.instance.instance_id) for pool in pools]


def test_what_is_left_are_the_nodes_engines_and_the_pools_it_lends_to():
    statuses = (node("a", instances=(SPLIT, instance("p1"))), node("b", instances=(LENT,)), node("c"))
    assert ids(left_on("b", statuses)) == [("a", "p0"), ("b", "p0.backend")]
    assert ids(left_on("a", statuses)) == [("a", "p0"), ("a", "p1")]
    assert left_on("c", statuses) == ()


@pytest.mark.parametrize("state", InstanceState)
def test_what_has_a_process_is_left_and_nothing_else(state):
    without = (InstanceState.STOPPED, InstanceState.FAILED, InstanceState.BACKOFF)
    left = left_on("a", (node("a", instances=(instance("p0", state=state),)),))
    assert len(left) == (state not in without)


def test_pools_with_a_part_on_a_draining_node_are_to_stop_and_no_others():
    a, c = node("a", instances=(SPLIT, instance("p1"))), node("c", instances=(instance("p2"),))
    assert to_stop((a, node("b", instances=(LENT,)), c)) == ()
    assert to_stop((a, node("b", instances=(LENT,), cordoned=True), c)) == ()
    assert ids(to_stop((a, node("b", instances=(LENT,), draining=True), c))) == [("a", "p0")]


@pytest.mark.parametrize(("state", "stops"), [("STARTING", 0), ("READY", 1), ("BACKOFF", 0), ("FAILED", 0)])
def test_what_still_starts_is_let_become_ready_first(state, stops):
    statuses = (node("a", instances=(instance("p0", state=InstanceState(state)),), draining=True),)
    assert len(to_stop(statuses)) == stops


@pytest.fixture
def cluster():
    return Cluster()


async def test_a_request_for_a_model_on_a_draining_node_loads_it_elsewhere(cluster):
    cluster.report(instance("p0"))
    running = await cluster.pools.acquire(M, lambda _: None)
    cluster.report(instance("p0"), draining=True)
    asking = cluster.ask()
    ended = await cluster.loading()

    assert cluster.pools.in_use("p0") == 1
    assert cluster.numbers == [1]  # the draining pool keeps its own
    ended.set_result(Pool(node_id="n1", instance=instance("p1")))
    assert (await asking).instance_id == "p1"
    running.release()
    assert cluster.pools.in_use("p0") == 0


@pytest.mark.parametrize("first", ["n0", "lender"])
async def test_so_does_one_for_a_pool_that_a_draining_node_lends_to(cluster, first):
    shares = (DeviceShare(node_id="lender", device_id="CPU", layers=4),)
    reports = {"n0": (instance("p0", shares=shares),), "lender": ()}
    for node_id in (first, *(other for other in reports if other != first)):
        cluster.report(*reports[node_id], node_id=node_id, draining=node_id == "lender")
    asking = cluster.ask()
    await cluster.loading()
    cluster.report(node_id="lender")

    assert (await asyncio.wait_for(asking, 5)).instance_id == "p0"
    await cluster.pools.close()


async def test_whoever_waits_is_served_when_the_drain_is_called_off(cluster):
    cluster.report(instance("p0"), draining=True)
    asking = cluster.ask()
    await settle()
    assert not asking.done()
    cluster.report(instance("p0"))
    assert (await asyncio.wait_for(asking, 5)).instance_id == "p0"
    await cluster.pools.close()


async def test_streams_of_other_heads_are_still_counted(cluster):
    cluster.report(instance("p0"))
    lease = await cluster.pools.acquire(M, lambda _: None)
    cluster.report(instance("p0", active_streams=3), draining=True)
    (pool,) = cluster.pools.all()
    assert pool.instance.active_streams == 3
    lease.release()


class Agents:
    """Nodes whose pools are stopped when they are idle; `busy` has those that are not."""

    def __init__(self, *statuses):
        self.nodes = {status.report.node_id: status for status in statuses}
        self.busy, self.asked, self.stopped, self.fails = set(), [], [], 0

    def statuses(self):
        return tuple(self.nodes.values())

    def status(self, node_id):
        return self.nodes.get(node_id)

    def link(self, node_id):
        agents = self

        class Link:
            async def stop_when_idle(self, instance_id):
                agents.asked.append(instance_id)
                if agents.fails:
                    agents.fails -= 1
                    raise refuse(Reason.AGENT_UNREACHABLE, "gone for a moment")
                if instance_id in agents.busy:
                    return False
                agents.stopped.append((node_id, instance_id))
                agents.nodes[node_id] = node(node_id, draining=agents.nodes[node_id].report.draining)
                return True

        return Link()


@contextlib.asynccontextmanager
async def drained(agents, used=()):
    """A running drainer that has heard of every node; yields what it forgot."""
    forgotten = []
    drainer = Drainer(agents, in_use=lambda instance_id: instance_id in used, forget=forgotten.append)
    running = asyncio.create_task(drainer.run())
    for node_id in agents.nodes:
        drainer.on_node_changed(node_id)
    try:
        yield forgotten
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(draining, "LOOK_AGAIN_S", 0.01)


async def test_an_idle_pool_is_stopped_and_forgotten():
    agents = Agents(node("a", instances=(instance("p0"),), draining=True), node("b", instances=(instance("p1"),)))
    async with drained(agents) as forgotten:
        await wait_until(lambda: agents.stopped, what="the pool is stopped")
    assert (agents.stopped, forgotten) == ([("a", "p0")], ["p0"])


async def test_a_split_pool_is_stopped_where_its_coordinator_is():
    agents = Agents(node("a", instances=(SPLIT,)), node("b", instances=(LENT,), draining=True))
    async with drained(agents):
        await wait_until(lambda: agents.stopped, what="the pool is stopped")
    assert agents.stopped == [("a", "p0")]


async def test_a_pool_is_asked_again_until_its_last_stream_has_ended():
    agents = Agents(node("a", instances=(instance("p0"),), draining=True))
    agents.busy.add("p0")
    async with drained(agents) as forgotten:
        await wait_until(lambda: len(agents.asked) > 3, what="it was asked several times")
        assert forgotten == []
        agents.busy.clear()
        await wait_until(lambda: agents.stopped, what="the pool is stopped")


async def test_a_pool_that_this_head_uses_is_not_even_asked():
    agents = Agents(node("a", instances=(instance("p0"), instance("p1", model="m")), draining=True))
    async with drained(agents, used={"p0"}):
        await wait_until(lambda: agents.asked, what="the other one is asked")
    assert set(agents.asked) == {"p1"}


async def test_an_agent_that_fails_is_asked_again():
    agents = Agents(node("a", instances=(instance("p0"),), draining=True))
    agents.fails = 2
    async with drained(agents):
        await wait_until(lambda: agents.stopped, what="the pool is stopped")
    assert len(agents.asked) == 3


async def test_a_node_that_is_not_drained_is_left_alone():
    agents = Agents(node("a", instances=(instance("p0"),), cordoned=True))
    async with drained(agents):
        await settle()
    assert agents.asked == []
