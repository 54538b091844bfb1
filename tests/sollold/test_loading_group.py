"""Starting a pool over several agents behind real gRPC: all of them or none, and the next plan without the guilty one."""

import asyncio

import pytest
from msgspec.structs import replace
from sollol.engine import Engine, EngineSource
from sollol.errors import Reason, refuse
from sollol.report import Instance, InstanceKind, InstanceState

from sollold import away
from sollold.placement import decide
from tests.loader import DEFAULTS, WISH, setups
from tests.placement_cases import GIB, cpu, model
from tests.waiting import wait_until

ENGINE = Engine(source=EngineSource.BUILT, path="llama-server", build="b1", rpc=True, rpc_protocol="7.0")
MEMORY_SHORT = refuse(
    Reason.MEMORY_SHORT, "CPU has 5 bytes free", retryable=True, numbers={"needed_bytes": 9, "free_bytes": 5}
).refusal
STARTING, READY, FAILED = InstanceState.STARTING, InstanceState.READY, InstanceState.FAILED


@pytest.fixture
async def setup(ports):
    """Nodes a, b, c (and d) of 5 GiB each for a model of 9, which only a has: any two that lend beside it will do."""
    async with setups(ports) as made:

        async def of_small_nodes(*names, free=5 * GIB, **options):
            it = await made(*names, **options)
            for agent in it.agents:
                models = (model(),) if agent.report.node_id == "a" else ()
                agent.report = replace(agent.report, devices=(cpu(free=free),), engine=ENGINE, models=models)
            return it

        yield of_small_nodes


def nodes_of(decision):
    return {share.node_id or decision.coordinator for share in decision.plan.shares}


def nothing_is_left(it):
    return all(not agent.reserved and not agent.admitted for agent in it.agents)


async def test_a_group_is_reserved_on_every_node_then_lends_then_starts(setup):
    it = await setup("a", "b", "c")

    pool = await it.load()

    a, b, c = it.agents
    assert pool.node_id == "a"
    lending = [agent for agent in it.agents if agent.pools("StartBackend")]
    assert {agent.report.node_id for agent in lending} == nodes_of(it.decisions[0])
    for agent in lending:
        names = [name for name, _ in agent.calls]
        assert names.index("Reserve") < names.index("StartBackend")
        assert set(agent.admitted.values()) == {(a.report.host,)}
    assert {endpoint.node_id for endpoint in a.plans[0].backends} == {agent.report.node_id for agent in lending}
    assert b.pools("StartCoordinator") == c.pools("StartCoordinator") == []


@pytest.mark.parametrize("call", ["Reserve", "StartBackend"])
async def test_one_lenders_refusal_releases_all_and_leaves_only_that_lender_out(setup, call):
    it = await setup("a", "b", "c", "d")
    first = nodes_of(decision_of(it))
    guilty = max(first - {"a"})
    agents = {agent.report.node_id: agent for agent in it.agents}
    agents[guilty].refusals[call] = MEMORY_SHORT

    pool = await it.load()

    assert nodes_of(it.decisions[0]) == first
    assert guilty not in nodes_of(it.decisions[1])
    assert pool.node_id == "a", "the coordinator is not at fault"
    (first_try,) = agents[guilty].pools("Reserve")
    for name in first:
        assert first_try in agents[name].pools("Release")
    assert all(held == {pool.instance.instance_id} for held in (agents["a"].reserved, agents["b"].reserved))
    assert not agents[guilty].reserved


def decision_of(it):
    return decide(WISH, it.statuses(), DEFAULTS)


async def test_without_another_plan_the_refusal_of_the_node_is_the_answer_with_its_numbers(setup):
    it = await setup("a", "b", free=7 * GIB)
    it.agents[1].refusals["Reserve"] = MEMORY_SHORT

    refusal = await it.failure()

    assert refusal.reason is Reason.MEMORY_SHORT
    assert refusal.numbers == {"needed_bytes": 9, "free_bytes": 5}
    assert nothing_is_left(it)


async def test_a_lender_that_vanishes_between_reserve_and_start_is_left_out(setup):
    it = await setup("a", "b", "c", "d")
    guilty = max(nodes_of(decision_of(it)) - {"a"})
    agent = next(agent for agent in it.agents if agent.report.node_id == guilty)

    async def vanish(_context):
        asyncio.get_running_loop().create_task(agent.stop())
        await asyncio.Event().wait()

    agent.hooks["StartBackend"] = vanish

    pool = await it.load()

    assert pool.node_id == "a"
    assert guilty not in nodes_of(it.decisions[1])
    assert all(
        other.reserved <= {pool.instance.instance_id} and set(other.admitted) <= {pool.instance.instance_id}
        for other in it.agents
        if other is not agent
    )


async def test_a_refused_coordinator_ends_the_backends_that_had_started(setup):
    it = await setup("a", "b", "c")
    it.agents[0].refusals["StartCoordinator"] = refuse(Reason.INVALID_REQUEST, "no").refusal

    refusal = await it.failure()

    assert refusal.reason is Reason.INVALID_REQUEST
    assert any(agent.pools("StartBackend") for agent in it.agents)
    assert nothing_is_left(it)


async def test_a_coordinator_that_loses_a_backend_is_planned_again_without_the_lender(setup):
    it = await setup("a", "b", "c", "d")
    guilty = max(nodes_of(decision_of(it)) - {"a"})
    agents = {agent.report.node_id: agent for agent in it.agents}
    own = agents["a"]
    own.states, own.failure = [STARTING, FAILED], refuse(Reason.ENGINE_DIED, "Remote RPC server crashed").refusal

    async def lose_it_once(_context):
        pool_id, *later = own.pools("WatchInstance")
        if later:
            own.states = [STARTING, READY]
        for agent in it.agents:
            if agent.report.node_id != guilty and pool_id in agent.admitted:
                agent.tell(instances=(backend(pool_id),))

    own.hooks["WatchInstance"] = lose_it_once

    await it.load()

    assert guilty not in nodes_of(it.decisions[1])


async def test_a_coordinators_node_that_goes_away_is_at_fault_also_when_its_lenders_were_already_ended(
    setup, monkeypatch
):
    monkeypatch.setattr(away, "LOST_AFTER_S", 0.3)
    it = await setup("a", "b", "c")
    own = it.agents[0]

    async def vanish(_context):
        asyncio.get_running_loop().create_task(own.stop())
        await asyncio.Event().wait()

    async def explained(_pool_id, _refusal):
        return refuse(Reason.ENGINE_DIED, "its coordinator's node is lost").refusal

    own.hooks["WatchInstance"] = vanish
    monkeypatch.setattr(it.starter._lost, "explained", explained)

    refusal = await it.failure()

    assert refusal.reason is Reason.AGENT_UNREACHABLE
    assert "c: " not in refusal.message
    assert "b: " not in refusal.message
    assert not it.agents[1].reserved | it.agents[2].reserved


def backend(pool_id):
    return Instance(instance_id=f"{pool_id}.backend", pool_id=pool_id, model="", state=READY, kind=InstanceKind.BACKEND)


@pytest.mark.parametrize("call", ["Reserve", "StartBackend", "StartCoordinator", "WatchInstance"])
async def test_a_cancelled_load_has_released_on_every_node_when_it_ends(setup, call):
    it = await setup("a", "b", "c")
    slow = it.agents[0] if call in ("StartCoordinator", "WatchInstance") else lender_of(it)
    slow.states = [STARTING]
    if call != "WatchInstance":
        slow.hooks[call] = lambda _: asyncio.Event().wait()
    task = it.begin()
    await wait_until(lambda: slow.pools(call), what=f"in {call}")

    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert nothing_is_left(it)
    for agent in it.agents:
        assert agent.pools("Stop") == agent.pools("Release")
        assert set(agent.pools("Reserve")) <= set(agent.pools("Release"))


def lender_of(it):
    guilty = max(nodes_of(decision_of(it)) - {"a"})
    return next(agent for agent in it.agents if agent.report.node_id == guilty)
