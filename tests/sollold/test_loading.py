"""Starting a pool on agents behind real gRPC: elsewhere when one cannot, and nothing left behind when it ends early."""

import asyncio

import pytest
from msgspec.structs import replace
from sollol.errors import Reason, Retry, SollolError, refuse
from sollol.report import InstanceState, Reservation

from sollold import away, loading, starting
from sollold.starting import new_pool_id
from tests.loader import M, setups
from tests.placement_cases import model
from tests.waiting import wait_until

STARTING, READY, FAILED = InstanceState.STARTING, InstanceState.READY, InstanceState.FAILED


@pytest.fixture
async def setup(ports):
    async with setups(ports) as made:
        yield made


async def test_a_ready_pool_has_been_placed_reserved_started_and_watched(setup):
    it = await setup("a")

    pool = await it.load()

    names = [name for name, _ in it.agents[0].calls]
    assert names == ["Reserve", "StartCoordinator", "WatchInstance"]
    assert pool.node_id == "a"
    assert pool.instance.state is READY
    assert [progress.state for progress in it.progress] == ["placing", "loading"]
    assert len(it.decisions) == 1


async def test_the_engine_is_started_under_the_name_that_was_asked_for(setup):
    """Nodes name a file differently: under its own name there, the pool would never be found by those who wait."""
    it = await setup("a")
    it.agents[0].report = replace(it.agents[0].report, models=(model("other-name", aliases=(M,)),))

    pool = await it.load()

    assert pool.instance.model == M


@pytest.mark.parametrize("call", ["Reserve", "StartCoordinator"])
@pytest.mark.parametrize("reason", [Reason.MEMORY_SHORT, Reason.MODEL_UNSUPPORTED, Reason.BACKING_OFF, Reason.INTERNAL])
async def test_a_refusing_node_is_left_out_and_the_next_one_takes_it(setup, call, reason):
    it = await setup("a", "b")
    it.agents[0].refusals[call] = refuse(reason, "no").refusal

    pool = await it.load()

    assert pool.node_id == "b"
    assert not it.agents[0].reserved
    assert [node.node_id for node in it.decisions[1].nodes] == ["b"]


async def test_an_engine_that_dies_at_start_is_stopped_released_and_tried_elsewhere(setup):
    it = await setup("a", "b")
    it.agents[0].states, it.agents[0].failure = [STARTING, FAILED], refuse(Reason.ENGINE_START_FAILED, "boom").refusal

    pool = await it.load()

    assert pool.node_id == "b"
    assert it.agents[0].pools("Stop") == it.agents[0].pools("Reserve")
    assert not it.agents[0].reserved


async def test_an_engine_that_failed_without_a_word_is_not_waited_for(setup):
    it = await setup("a")
    it.agents[0].states = [STARTING, FAILED]

    refusal = await it.failure()

    assert refusal.reason is Reason.ENGINE_START_FAILED, "its agent is there, and will tell no more"
    assert len(it.agents[0].pools("WatchInstance")) == 1


async def test_when_no_node_is_left_the_last_one_has_the_word_and_the_others_are_named(setup):
    it = await setup("a", "b")
    it.agents[0].refusals["Reserve"] = refuse(Reason.MEMORY_SHORT, "short").refusal
    it.agents[1].refusals["Reserve"] = refuse(Reason.BACKING_OFF, "it keeps dying", retryable=True).refusal

    refusal = await it.failure()

    assert refusal.reason is Reason.BACKING_OFF
    assert refusal.retry is Retry.RETRYABLE
    assert "b: it keeps dying" in refusal.message
    assert "a: MEMORY_SHORT" in refusal.message


async def test_what_would_fail_everywhere_is_not_tried_again(setup):
    it = await setup("a", "b")
    it.agents[0].refusals["StartCoordinator"] = refuse(Reason.INVALID_REQUEST, "no").refusal

    assert (await it.failure()).reason is Reason.INVALID_REQUEST
    assert not it.agents[1].calls
    assert not it.agents[0].reserved


async def test_attempts_are_bounded(setup):
    it = await setup("a", "b", "c", "d", "e")
    for agent in it.agents:
        agent.refusals["Reserve"] = refuse(Reason.MEMORY_SHORT, "short").refusal

    await it.failure()

    assert len(it.decisions) == loading.MAX_ATTEMPTS


async def test_an_agent_that_vanishes_between_reserve_and_start_costs_no_wait(setup):
    it = await setup("a", "b")

    async def vanish(_context):
        asyncio.get_running_loop().create_task(it.agents[0].stop())
        await asyncio.Event().wait()

    it.agents[0].hooks["StartCoordinator"] = vanish
    loop = asyncio.get_running_loop()
    began = loop.time()

    pool = await it.load()

    assert pool.node_id == "b"
    assert loop.time() - began < 4, "a node that may be back is waited for 5 s, but not where another one will do"


async def test_an_agent_out_of_reach_for_a_moment_is_still_asked_to_clean_up(setup, monkeypatch):
    monkeypatch.setattr(starting, "RELEASE_PAUSES_S", (0.1,) * 20)
    monkeypatch.setattr(away, "LOST_AFTER_S", 0.3)
    it = await setup("a")
    agent = it.agents[0]

    async def vanish(_context):
        asyncio.get_running_loop().create_task(agent.stop())
        await asyncio.Event().wait()

    agent.hooks["WatchInstance"] = vanish
    assert (await it.failure()).reason is Reason.AGENT_UNREACHABLE
    assert it.forgotten == agent.pools("StartCoordinator"), "an old report of it keeps nobody waiting"

    await agent.start()

    await wait_until(lambda: agent.pools("Release"), what="stopped and released")
    assert not agent.reserved


async def test_a_load_goes_on_when_its_agent_was_only_restarted(setup):
    it = await setup("a", "b")
    agent = it.agents[0]

    async def vanish(_context):
        del agent.hooks["WatchInstance"]
        it.restart = asyncio.create_task(returns(it, agent))
        await asyncio.Event().wait()

    agent.hooks["WatchInstance"] = vanish

    assert (await it.load()).node_id == "a"
    assert len(agent.pools("StartCoordinator")) == 1
    assert not it.agents[1].pools("StartCoordinator")
    await it.restart


async def test_an_agent_that_lost_the_instance_is_not_a_404_of_the_model(setup):
    it = await setup("a", "b")

    async def forget(_context):
        it.agents[0]._models.clear()

    it.agents[0].hooks["WatchInstance"] = forget

    assert (await it.load()).node_id == "b"


@pytest.mark.parametrize("call", ["Reserve", "StartCoordinator", "WatchInstance"])
async def test_a_cancelled_load_has_stopped_and_released_when_it_ends(setup, call):
    it = await setup("a")
    agent = it.agents[0]
    if call == "WatchInstance":
        agent.states = [STARTING]
    else:
        agent.hooks[call] = lambda _: asyncio.Event().wait()
    task = it.begin()
    await wait_until(lambda: agent.pools(call), what=f"in {call}")

    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert agent.pools("Stop") == agent.pools("Release") == agent.pools("Reserve")
    assert not agent.reserved


async def test_cancelling_again_does_not_end_the_cleaning_up(setup):
    it = await setup("a")
    agent, go_on = it.agents[0], asyncio.Event()
    agent.states = [STARTING]
    agent.hooks["Stop"] = lambda _: go_on.wait()
    task = it.begin()
    await wait_until(lambda: agent.pools("WatchInstance"), what="loading")
    task.cancel()
    await wait_until(lambda: agent.pools("Stop"), what="stopping")

    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert agent.reserved
    go_on.set()

    await wait_until(lambda: not agent.reserved, what="released all the same")


async def test_a_load_that_takes_too_long_is_stopped_and_says_so(setup):
    it = await setup("a", load_timeout_s=0.3)
    it.agents[0].states = [STARTING]

    refusal = await it.failure()

    assert refusal.reason is Reason.LOAD_TIMEOUT
    assert it.agents[0].pools("Stop")
    assert not it.agents[0].reserved


async def test_a_pool_stopped_by_somebody_while_it_loads_is_not_started_elsewhere(setup):
    it = await setup("a", "b")
    it.agents[0].states = [STARTING, InstanceState.STOPPED]

    assert (await it.failure()).reason is Reason.STOPPED
    assert not it.agents[1].calls


async def test_an_agent_that_starts_another_model_is_told_to_stop_it(setup):
    """Its pool would be found by nobody who waits, and the model would be loaded again and again."""
    it = await setup("a")

    async def confuse(_context):
        it.agents[0]._models = dict.fromkeys(it.agents[0]._models, "another")

    it.agents[0].hooks["WatchInstance"] = confuse

    assert (await it.failure()).reason is Reason.INTERNAL
    assert it.agents[0].pools("Stop")


async def returns(it, agent):
    """What an agent's restart looks like: it is gone, there again, and reports over a link that is up."""

    def asked():
        return len(agent.pools("Reserve")) + len(agent.pools("WatchInstance"))

    await agent.stop()
    await agent.start()
    await wait_until(lambda: reached(it, agent), what="the link is up again, as when the head gets a report over it")
    before = asked()
    await wait_until(lambda: agent.tell() or asked() > before, what="the load goes on")


async def reached(it, agent):
    try:
        await it.links[agent.report.node_id].release("another pool")
    except SollolError:
        return False
    return True


@pytest.mark.parametrize("call", ["Reserve", "StartCoordinator"])
async def test_a_load_waits_for_the_only_node_while_its_agent_is_restarted(setup, call):
    it = await setup("a")
    agent = it.agents[0]

    async def restart_once(_context):
        del agent.hooks[call]
        it.restart = asyncio.create_task(returns(it, agent))
        await asyncio.Event().wait()

    agent.hooks[call] = restart_once

    pool = await it.load()

    assert pool.node_id == "a"
    await it.restart


async def test_a_load_waits_for_an_agent_that_says_it_is_shutting_down(setup):
    it = await setup("a")
    agent = it.agents[0]
    agent.refusals["Reserve"] = refuse(Reason.SHUTTING_DOWN, "going", retryable=True).refusal
    load = it.begin()
    await wait_until(lambda: len(it.decisions) == 2, what="refused, and nobody else is left")
    assert not load.done()

    agent.refusals.clear()
    await returns(it, agent)

    assert (await load).node_id == "a"


async def test_a_node_that_was_away_before_is_waited_for_when_nobody_else_will_do(setup):
    it = await setup("a", "b")
    away, other = it.agents
    other.report = replace(other.report, models=())
    await away.stop()
    load = it.begin()
    await wait_until(lambda: it.decisions, what="there is no plan without it")
    assert not load.done()

    await returns(it, away)

    assert (await load).node_id == "a"


async def test_a_node_that_is_away_is_not_waited_for_where_another_will_do_or_it_could_not_help(setup):
    it = await setup("a", "b")
    await it.agents[0].stop()
    assert (await it.load()).node_id == "b"
    assert len(it.decisions) == 1

    it.agents[0].report = replace(it.agents[0].report, models=())
    it.agents[1].refusals["Reserve"] = refuse(Reason.MEMORY_SHORT, "short", retryable=True).refusal
    assert (await it.failure()).reason is Reason.MEMORY_SHORT
    assert len(it.decisions) == 3


async def test_the_next_plan_is_made_from_reports_that_no_longer_have_what_failed(setup):
    it = await setup("a", "b")
    first, second = it.agents
    first.refusals["StartCoordinator"] = refuse(Reason.ENGINE_START_FAILED, "boom").refusal
    plain = first.report

    async def report_it(_context):
        (pool_id,) = first.pools("Reserve")
        first.tell(reservations=(Reservation(pool_id=pool_id, bytes={"CPU": 1}),))

    async def report_it_no_longer(_context):
        it.later = asyncio.get_running_loop().call_later(0.2, lambda: first.tell(reservations=()))

    first.hooks["StartCoordinator"], first.hooks["Release"] = report_it, report_it_no_longer
    seen = []
    second.hooks["Reserve"] = lambda _: seen.append(first.report.reservations) or asyncio.sleep(0)

    assert (await it.load()).node_id == "b"
    assert seen == [()]
    assert plain.reservations == ()


FATAL = refuse(Reason.MODEL_CORRUPT, "cut off").refusal
LATER = refuse(Reason.MEMORY_SHORT, "short", retryable=True).refusal


@pytest.mark.parametrize(
    ("failed", "nothing_left", "reason"),
    [
        ({"a": LATER, "b": FATAL}, None, Reason.MEMORY_SHORT),
        ({"a": FATAL, "b": LATER}, None, Reason.MEMORY_SHORT),
        ({"a": FATAL}, refuse(Reason.NO_FIT, "full", retryable=True).refusal, Reason.NO_FIT),
        ({"a": LATER}, refuse(Reason.NO_FIT, "full", retryable=True).refusal, Reason.MEMORY_SHORT),
        ({"a": FATAL}, refuse(Reason.NO_FIT, "too large").refusal, Reason.MODEL_CORRUPT),
        ({"a": FATAL}, refuse(Reason.NO_NODES, "no other", retryable=True).refusal, Reason.MODEL_CORRUPT),
        ({}, refuse(Reason.NO_NODES, "none", retryable=True).refusal, Reason.NO_NODES),
    ],
)
def test_what_may_change_has_the_last_word(failed, nothing_left, reason):
    word = loading._last_word(failed, nothing_left)

    assert word.reason is reason
    told = {refusal.reason for refusal in failed.values()} - {reason}
    assert all(each in word.message for each in told), "the others are named"


async def test_a_head_that_ends_leaves_a_pool_with_a_coordinator_to_the_next_head(setup):
    it = await setup("a")
    agent = it.agents[0]
    agent.states = [STARTING]
    task = it.begin()
    await wait_until(lambda: agent.pools("WatchInstance"), what="loading")

    it.starter.leave()
    task.cancel()
    await asyncio.wait({task})

    assert task.cancelled()
    assert not agent.pools("Stop")
    assert not agent.pools("Release")
    assert not it.forgotten


async def test_a_head_that_ends_lets_go_of_what_has_no_coordinator_yet(setup):
    it = await setup("a")
    agent = it.agents[0]
    agent.hooks["StartCoordinator"] = lambda _: asyncio.Event().wait()
    task = it.begin()
    await wait_until(lambda: agent.pools("StartCoordinator"), what="starting")

    it.starter.leave()
    task.cancel()
    await asyncio.wait({task})

    assert agent.pools("Release") == agent.pools("Reserve")
    assert not agent.reserved


def test_pool_ids_are_unique_and_safe_as_file_names():
    ids = {new_pool_id("../org/Rep o:Q4_K_M" + "x" * 300) for _ in range(100)}

    assert len(ids) == 100
    assert all(len(each) < 60 and "/" not in each and not each.startswith(".") for each in ids)
    assert new_pool_id("///").startswith("model-")
