"""Several pools of one model: who brings them up, who gets which, and what a failed one costs."""

import asyncio

import pytest
from msgspec.structs import replace
from sollol.errors import Reason, SollolError, refuse
from sollol.inference import Progress
from sollol.report import InstanceState, PlacementWish, Pool

from sollold import pools
from sollold.numbers import GaveWayError
from tests.placement_cases import MODEL as M
from tests.pool_cluster import Cluster, instance, reason_of, settle

STARTING, FAILED = InstanceState.STARTING, InstanceState.FAILED
NO_FIT = refuse(Reason.NO_FIT, "full")


def pool(number, parallel=1):
    return Pool(node_id=f"n{number}", instance=instance(f"p{number}", parallel=parallel, pool_number=number))


@pytest.fixture
def cluster():
    return Cluster(limit=3)


async def acquired(cluster, count=1):
    return [await asyncio.wait_for(cluster.ask(), 1) for _ in range(count)]


def operator(cluster, count, told=lambda _: None, **wish):
    return asyncio.create_task(cluster.pools.ensure_ready(PlacementWish(model=M, **wish), told, count=count))


async def test_a_pool_is_loaded_when_all_slots_are_taken_and_somebody_waits_and_not_before(cluster):
    cluster.report(pool(0, parallel=2).instance)
    held = await acquired(cluster, 2)
    assert not cluster.loads

    waiting = cluster.ask()
    ended = await cluster.loading()
    ended.set_result(pool(1))

    assert (await asyncio.wait_for(waiting, 1)).instance_id == "p1"
    assert {lease.instance_id for lease in held} == {"p0"}


async def test_the_queue_is_served_while_another_pool_loads_and_the_load_goes_on_for_the_next(cluster):
    cluster.report(pool(0).instance)
    (held,) = await acquired(cluster)
    first, second = cluster.ask(), cluster.ask()
    ended = await cluster.loading()

    held.release()
    assert (await asyncio.wait_for(first, 1)).instance_id == "p0"
    await settle()
    assert not second.done()
    ended.set_result(pool(1))

    assert (await asyncio.wait_for(second, 1)).instance_id == "p1"
    assert len(cluster.loads) == 1


async def test_pools_are_loaded_one_after_the_other_up_to_the_limit(cluster):
    waiting = [cluster.ask() for _ in range(6)]
    for number in range(3):
        ended = await cluster.loading(number + 1)
        ended.set_result(pool(number))
        await settle()

    assert [task.done() for task in waiting] == [True] * 3 + [False] * 3
    assert len(cluster.loads) == 3, "three is the limit"
    (await waiting[0]).release()
    assert (await asyncio.wait_for(waiting[3], 1)).instance_id == "p0"
    for task in waiting[4:]:
        task.cancel()


async def test_pools_of_other_heads_count_ready_or_starting(cluster):
    cluster.report(pool(0).instance, node_id="n0")
    cluster.report(replace(pool(1).instance, state=STARTING), node_id="n1")
    await acquired(cluster)
    waiting = [cluster.ask(), cluster.ask(), cluster.ask()]
    await settle()
    assert not cluster.loads, "what another head loads is waited for"

    cluster.report(pool(1).instance, node_id="n1")
    await cluster.loading()
    cluster.report(pool(2).instance, node_id="n2")
    cluster.loads[0][1].set_exception(GaveWayError("to p2"))
    await settle()

    assert [task.done() for task in waiting] == [True, True, False]
    assert len(cluster.loads) == 1, "three pools are there, another head's too"
    waiting[2].cancel()


async def test_the_least_busy_pool_gets_the_request_and_streams_of_other_heads_count(cluster):
    for number, elsewhere in enumerate((3, 1, 2)):
        cluster.report(replace(pool(number, parallel=4).instance, active_streams=elsewhere), node_id=f"n{number}")

    leases = await acquired(cluster, 6)

    assert [lease.instance_id for lease in leases] == ["p1", "p1", "p2", "p0", "p1", "p2"]


async def test_of_equally_busy_pools_the_lowest_number_gets_the_request(cluster):
    for number in (2, 0, 1):
        cluster.report(pool(number, parallel=2).instance, node_id=f"n{number}")

    assert [lease.instance_id for lease in await acquired(cluster, 3)] == ["p0", "p1", "p2"]


async def test_streams_of_other_heads_keep_nobody_from_a_slot_that_is_free_for_us(cluster):
    """Reports are a moment old: those streams may have ended, and the engine queues what comes too early."""
    cluster.report(replace(pool(0, parallel=2).instance, active_streams=2))

    assert [lease.instance_id for lease in await acquired(cluster, 2)] == ["p0", "p0"]
    assert not cluster.loads


async def test_pools_are_listed_with_the_streams_they_have_now(cluster):
    cluster.report(replace(pool(0, parallel=4).instance, active_streams=1))
    lease, _ = await acquired(cluster, 2)
    assert [each.instance.active_streams for each in cluster.pools.all()] == [3]

    lease.release()
    assert [each.instance.active_streams for each in cluster.pools.all()] == [2]


async def test_a_pool_that_a_load_of_ours_made_ready_is_listed_as_ready_before_its_agent_reports_it(cluster):
    loaded = operator(cluster, 1)
    ended = await cluster.loading()
    cluster.report(replace(pool(0).instance, state=STARTING), node_id="n0")
    assert [each.instance.state for each in cluster.pools.all()] == [STARTING]

    ended.set_result(pool(0))

    assert await loaded == (pool(0),)
    assert [each.instance.state for each in cluster.pools.all()] == [InstanceState.READY]
    cluster.report(replace(pool(0).instance, state=FAILED), node_id="n0")
    assert [each.instance.state for each in cluster.pools.all()] == [FAILED], "later news count"


async def test_a_failed_extra_load_fails_nobody_who_is_served_and_is_not_tried_again_at_once(cluster):
    cluster.report(pool(0).instance)
    (held,) = await acquired(cluster)
    waiting = [cluster.ask(), cluster.ask()]
    ended = await cluster.loading()
    ended.set_exception(NO_FIT)
    await settle()
    late = cluster.ask()
    await settle()
    assert not any(task.done() for task in (*waiting, late))
    assert len(cluster.loads) == 1

    held.release()
    for task in (*waiting, late):
        lease = await asyncio.wait_for(task, 1)
        assert lease.instance_id == "p0"
        lease.release()


async def test_after_a_while_the_extra_load_is_tried_again(cluster, monkeypatch):
    monkeypatch.setattr(pools, "extra_retry_s", lambda failures, _: 0.01 * failures)
    cluster.report(pool(0).instance)
    await acquired(cluster)
    waiting = cluster.ask()
    for attempt in (1, 2):
        ended = await cluster.loading(attempt)
        ended.set_exception(NO_FIT)
    ended = await cluster.loading(3)
    ended.set_result(pool(1))

    assert (await asyncio.wait_for(waiting, 1)).instance_id == "p1"


async def test_when_the_last_pool_is_lost_its_model_is_loaded_though_extra_loads_are_held_off(cluster):
    cluster.report(pool(0).instance)
    (held,) = await acquired(cluster)
    waiting = cluster.ask()
    (await cluster.loading()).set_exception(NO_FIT)
    await settle()

    cluster.pools.doubt("p0")
    held.release()
    cluster.report(replace(pool(0).instance, state=FAILED))
    ended = await cluster.loading(2)
    ended.set_exception(NO_FIT)
    await asyncio.wait({waiting}, timeout=1)

    assert reason_of(waiting) is Reason.NO_FIT, "now nothing serves it"


async def test_a_failed_load_fails_nobody_while_another_head_brings_the_model_up(cluster):
    waiting = cluster.ask()
    ended = await cluster.loading()
    cluster.report(instance("other", STARTING))
    ended.set_exception(NO_FIT)
    await settle()
    assert not waiting.done()

    cluster.report(instance("other"))

    assert (await asyncio.wait_for(waiting, 1)).instance_id == "other"
    assert len(cluster.loads) == 1


async def test_a_load_that_gave_way_waits_for_the_pool_it_gave_way_to(cluster):
    told = []
    waiting = cluster.ask(sink=told.append)
    ended = await cluster.loading()
    cluster.report(instance("other", STARTING, percent=30.0))
    ended.set_exception(GaveWayError("to other"))
    await settle()
    assert not waiting.done()
    assert len(cluster.loads) == 1

    cluster.report(instance("other", STARTING, percent=60.0))
    cluster.report(instance("other"))

    assert (await asyncio.wait_for(waiting, 1)).instance_id == "other"
    assert Progress(state="loading", percent=60.0, node_id="n0") in told


async def test_an_operator_gets_as_many_pools_as_asked_for_whatever_the_limit():
    cluster = Cluster(limit=1)
    asked = operator(cluster, 3)
    for number in (0, 1, 2):
        ended = await cluster.loading(number + 1)
        assert not asked.done()
        ended.set_result(pool(number))

    ready = await asyncio.wait_for(asked, 1)

    assert [each.instance.pool_number for each in ready] == [0, 1, 2]
    assert await asyncio.wait_for(operator(cluster, 2), 1) == ready, "they are there: at once"
    assert len(cluster.loads) == 3


async def test_operators_who_ask_for_different_numbers_are_told_when_theirs_are_ready(cluster):
    few, many = operator(cluster, 1), operator(cluster, 2)
    (await cluster.loading()).set_result(pool(0))
    assert len(await asyncio.wait_for(few, 1)) == 1
    assert not many.done()

    (await cluster.loading(2)).set_result(pool(1))

    assert len(await asyncio.wait_for(many, 1)) == 2


async def test_an_operator_hears_why_the_next_pool_failed_and_the_others_go_on(cluster):
    cluster.report(pool(0).instance)
    (held,) = await acquired(cluster)
    waiting = cluster.ask()
    asked = operator(cluster, 2, pinned_node="n9")
    (await cluster.loading()).set_exception(NO_FIT)
    await settle()
    (await cluster.loading(2)).set_exception(refuse(Reason.NOT_PINNED, "no n9"))
    await asyncio.wait({asked}, timeout=1)

    assert reason_of(asked) is Reason.NOT_PINNED, "its own wish was tried, though requests' are held off"
    assert cluster.loads[1][0] == PlacementWish(model=M, pinned_node="n9")
    assert not waiting.done()
    held.release()
    assert (await asyncio.wait_for(waiting, 1)).instance_id == "p0"


async def test_a_special_wish_that_fails_holds_no_requests_off(cluster):
    cluster.report(pool(0).instance)
    asked = operator(cluster, 2, pinned_node="n9")
    (await cluster.loading()).set_exception(NO_FIT)
    await asyncio.wait({asked}, timeout=1)
    await acquired(cluster)
    waiting = cluster.ask()

    await cluster.loading(2)

    waiting.cancel()


async def test_stopping_an_extra_load_leaves_those_who_wait_to_the_pools_there_are(cluster):
    cluster.report(pool(0).instance)
    (held,) = await acquired(cluster)
    waiting = cluster.ask()
    await cluster.loading()

    await cluster.pools.stop_loading(M)
    await settle()

    assert len(cluster.loads) == 1, "not again at once"
    held.release()
    assert (await asyncio.wait_for(waiting, 1)).instance_id == "p0"


async def test_closing_ends_the_wait_for_another_try(cluster):
    cluster.report(pool(0).instance)
    await acquired(cluster)
    waiting = cluster.ask()
    (await cluster.loading()).set_exception(NO_FIT)
    await settle()

    await cluster.pools.close()

    assert cluster.pools._queues[M].resume.cancelled()
    with pytest.raises(SollolError) as refused:
        await waiting
    assert refused.value.refusal.reason is Reason.SHUTTING_DOWN
