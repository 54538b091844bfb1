"""Starting a pool under its number, next to other heads that do the same; and what queues hear of a start gone wrong."""

import asyncio

import pytest
from sollol.errors import Reason, refuse
from sollol.report import Instance, InstanceState

from sollold import away, starting
from sollold.numbers import GaveWayError
from tests.loader import M, setups
from tests.waiting import wait_until

STARTING, READY = InstanceState.STARTING, InstanceState.READY


@pytest.fixture
async def setup(ports):
    async with setups(ports) as made:
        yield made


def other(state=STARTING, pool_id="0", number=1):
    """Another head's pool; the id is lower than any that a load makes for this model."""
    return Instance(instance_id=pool_id, model=M, state=state, pool_number=number)


async def test_the_decision_the_plan_and_the_pool_have_the_number(setup):
    it = await setup("a")

    pool = await it.load(number=3)

    assert [plan.pool_number for plan in it.agents[0].plans] == [3]
    assert [decision.plan.pool_number for decision in it.decisions] == [3], "the record says so too"
    assert pool.instance.pool_number == 3


async def test_a_start_keeps_its_number_on_the_next_node(setup):
    it = await setup("a", "b")
    it.agents[0].refusals["StartCoordinator"] = refuse(Reason.ENGINE_START_FAILED, "no").refusal

    pool = await it.load(number=1)

    assert (pool.node_id, pool.instance.pool_number) == ("b", 1)


async def test_a_start_that_gives_way_is_stopped_released_and_tried_nowhere_else(setup):
    it = await setup("a", "b")
    starting, elsewhere = it.agents
    starting.states = [STARTING]
    load = it.begin(number=1)
    await wait_until(lambda: starting.pools("WatchInstance"), what="loading")

    elsewhere.tell(instances=(other(),))
    it.numbers.on_node_changed("b")
    with pytest.raises(GaveWayError):
        await asyncio.wait_for(load, 5)

    assert starting.pools("Stop") == starting.pools("Release") == starting.pools("Reserve")
    assert not starting.reserved
    assert not elsewhere.calls
    assert it.forgotten == starting.pools("Stop")


async def test_a_start_whose_number_is_taken_when_it_begins_reserves_nothing(setup):
    it = await setup("a", "b")
    it.agents[1].tell(instances=(other(READY),))

    with pytest.raises(GaveWayError):
        await it.load(number=1)

    assert not it.agents[0].pools("Reserve")


async def test_two_loads_of_different_numbers_do_not_disturb_each_other(setup):
    it = await setup("a", "b")
    it.agents[1].tell(instances=(other(READY, number=0),))

    assert (await it.load(number=1)).instance.pool_number == 1


async def test_nobody_waits_for_a_pool_whose_start_failed(setup):
    it = await setup("a")
    it.agents[0].states, it.agents[0].failure = [InstanceState.FAILED], refuse(Reason.ENGINE_DIED, "boom").refusal

    assert (await it.failure()).reason is Reason.ENGINE_DIED

    assert it.forgotten == it.agents[0].pools("Reserve")
    assert not it.doubted


async def test_a_pool_on_an_agent_out_of_reach_may_yet_show_up_and_be_used(setup, monkeypatch):
    monkeypatch.setattr(starting, "RELEASE_PAUSES_S", ())
    monkeypatch.setattr(away, "LOST_AFTER_S", 0.3)
    it = await setup("a")

    async def vanish(_context):
        asyncio.get_running_loop().create_task(it.agents[0].stop())
        await asyncio.Event().wait()

    it.agents[0].hooks["StartCoordinator"] = vanish

    assert (await it.failure()).reason is Reason.AGENT_UNREACHABLE

    assert it.forgotten  # what older reports say of it counts no more
    await wait_until(lambda: it.doubted == it.forgotten, what="its agent's next report decides")


async def test_a_failed_start_that_cannot_be_stopped_is_left_to_its_agents_word(setup):
    it = await setup("a")
    it.agents[0].states, it.agents[0].failure = [InstanceState.FAILED], refuse(Reason.ENGINE_DIED, "boom").refusal

    async def break_down(_context):
        raise RuntimeError("a bug of the agent")

    it.agents[0].hooks["Stop"] = break_down

    await it.failure()

    assert it.doubted == it.forgotten == it.agents[0].pools("Reserve")
