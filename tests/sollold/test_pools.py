"""One queue per model, one load for everybody who waits, and slots that are counted right whatever happens."""

import asyncio

import pytest
from sollol.errors import Reason, SollolError, refuse
from sollol.inference import Progress
from sollol.report import InstanceState, PlacementWish, Pool

from sollold.queues import QUEUED
from tests.cpu import cost
from tests.placement_cases import MODEL as M
from tests.pool_cluster import Cluster, instance, reason_of, settle
from tests.waiting import wait_until

STARTING, FAILED = InstanceState.STARTING, InstanceState.FAILED


@pytest.fixture
def cluster():
    return Cluster()


async def test_a_warm_pool_is_used_at_once_and_the_one_with_most_free_slots_first(cluster):
    cluster.report(instance("p0"), node_id="n0")
    cluster.report(instance("p1", parallel=3), node_id="n1")

    leases = [await cluster.pools.acquire(M, lambda _: None) for _ in range(5)]

    assert [lease.instance_id for lease in leases] == ["p1", "p1", "p0", "p1", "p0"]
    assert not cluster.loads


async def test_a_thousand_waiters_of_a_cold_model_are_one_load_and_are_served_in_order(cluster):
    served = []
    waiting = [cluster.ask() for _ in range(1000)]
    for number, task in enumerate(waiting):
        task.add_done_callback(lambda task, number=number: served.append((number, task.result())))
    ended = await cluster.loading()

    ended.set_result(Pool(node_id="n0", instance=instance(parallel=50)))
    await wait_until(lambda: len(served) == 50, what="the first fifty")
    while len(served) < 1000:
        before = len(served)
        for _, lease in served[before - 50 :]:
            lease.release()
        await wait_until(lambda before=before: len(served) == before + 50, what="the next fifty")

    assert [number for number, _ in served] == list(range(1000))
    assert len(cluster.loads) == 1


async def test_a_thousand_waiters_that_leave_cost_little_and_leave_the_load_going(cluster):
    with cost() as coming_and_going:
        waiting = [cluster.ask() for _ in range(1000)]
        ended = await cluster.loading()
        for task in reversed(waiting):
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
    assert coming_and_going.cpu_s < 1.0

    ended.set_result(Pool(node_id="n0", instance=instance()))
    await settle()
    lease = await cluster.pools.acquire(M, lambda _: None)

    assert lease.instance_id == "p0", "who asks again finds it warm"
    assert len(cluster.loads) == 1


async def test_a_waiter_cancelled_in_the_moment_of_its_grant_gives_the_slot_to_the_next(cluster):
    cluster.report(instance(parallel=1))
    held = await cluster.pools.acquire(M, lambda _: None)
    first, second = cluster.ask(), cluster.ask()
    await settle()

    held.release()  # grants to the first, which has not run yet
    first.cancel()
    lease = await asyncio.wait_for(second, 1)

    assert first.cancelled()
    assert lease.instance_id == "p0"
    third = cluster.ask()
    await settle()
    assert not third.done(), "the slot is taken once, not twice and not never"
    lease.release()
    assert (await third).instance_id == "p0"


async def test_a_waiter_cancelled_just_before_a_grant_is_passed_over(cluster):
    cluster.report(instance(parallel=1))
    held = await cluster.pools.acquire(M, lambda _: None)
    first, second = cluster.ask(), cluster.ask()
    await settle()

    first.cancel()
    held.release()

    assert (await asyncio.wait_for(second, 1)).instance_id == "p0"


async def test_a_lease_released_twice_frees_one_slot(cluster):
    cluster.report(instance(parallel=1))
    lease = await cluster.pools.acquire(M, lambda _: None)

    lease.release()
    lease.release()
    await cluster.pools.acquire(M, lambda _: None)
    over = cluster.ask()
    await settle()

    assert not over.done()
    over.cancel()


async def test_a_failed_load_is_everybodys_failure_and_who_comes_later_starts_a_new_one(cluster):
    first, second = cluster.ask(), cluster.ask()
    ended = await cluster.loading()
    ended.set_exception(refuse(Reason.NO_FIT, "too big"))
    await asyncio.wait({first, second})

    third = cluster.ask()
    await cluster.loading(2)

    assert [reason_of(first), reason_of(second)] == [Reason.NO_FIT] * 2
    assert not third.done()
    third.cancel()


async def test_a_waiter_that_comes_while_a_load_is_failing_gets_that_failure_or_a_new_load(cluster):
    first = cluster.ask()
    ended = await cluster.loading()
    ended.set_exception(refuse(Reason.NO_FIT, "too big"))
    late = cluster.ask()  # runs before or after the load's own task
    await asyncio.wait({first})
    await settle()

    assert late.done() or len(cluster.loads) == 2
    late.cancel()
    await asyncio.gather(late, return_exceptions=True)


async def test_a_bug_in_loading_reaches_the_waiters(cluster):
    task = cluster.ask()
    ended = await cluster.loading()
    ended.set_exception(ZeroDivisionError("bug"))
    await asyncio.wait({task})

    assert reason_of(task) is Reason.INTERNAL


async def test_a_load_cancelled_from_below_leaves_no_waiter_hanging(cluster):
    task = cluster.ask()
    ended = await cluster.loading()
    ended.cancel()
    await asyncio.wait({task}, timeout=1)

    assert reason_of(task) is Reason.STOPPED


async def test_too_many_waiters_are_refused_with_a_time_to_come_back():
    cluster = Cluster(max_queue=2)
    waiting = [cluster.ask(), cluster.ask()]
    await settle()

    with pytest.raises(SollolError) as caught:
        await cluster.pools.acquire(M, lambda _: None)
    waiting[0].cancel()
    await settle()
    again = cluster.ask()
    await settle()

    assert caught.value.refusal.reason is Reason.QUEUE_FULL
    assert caught.value.refusal.retry_after_s
    assert not again.done(), "one left, so there is room"
    for task in (*waiting, again):
        task.cancel()


async def test_progress_reaches_those_who_wait_and_those_who_come_later(cluster):
    early, late = [], []
    tasks = [cluster.ask(sink=early.append)]
    await cluster.loading()
    halfway = Progress(state="loading", percent=50.0, node_id="n0")
    cluster.sinks[0](halfway)
    tasks.append(cluster.ask(sink=late.append))
    await settle()
    cluster.loads[0][1].set_result(Pool(node_id="n0", instance=instance(parallel=1)))
    await asyncio.wait({tasks[0]})
    await settle()

    assert early == [QUEUED, halfway]
    assert late == [halfway, QUEUED], "loaded, and now it waits for a slot"
    tasks[1].cancel()


async def test_what_another_head_loads_is_waited_for_and_shown(cluster):
    told = []
    cluster.report(instance("other", STARTING, percent=10.0))
    task = cluster.ask(sink=told.append)
    await settle()
    cluster.report(instance("other", STARTING, percent=40.0))
    cluster.report(instance("other"))
    lease = await asyncio.wait_for(task, 1)

    assert not cluster.loads
    assert Progress(state="loading", percent=40.0, node_id="n0") in told
    assert lease.instance_id == "other"


async def test_when_the_other_heads_load_fails_we_load(cluster):
    cluster.report(instance("other", STARTING))
    task = cluster.ask()
    await settle()
    assert not cluster.loads

    cluster.report(instance("other", FAILED))
    await cluster.loading()

    task.cancel()


async def test_a_doubted_pool_waits_for_its_agents_word_and_nothing_else_is_loaded(cluster):
    """A broken connection is no dead engine: a second copy would not fit, and the first would be used by nobody."""
    cluster.report(instance())
    lease = await cluster.pools.acquire(M, lambda _: None)
    cluster.pools.doubt(lease.instance_id)
    lease.release()
    task = cluster.ask()
    await settle()
    assert not task.done()

    cluster.report(instance())

    assert (await asyncio.wait_for(task, 1)).instance_id == "p0"
    assert not cluster.loads


async def test_who_asks_for_a_pool_whose_agent_is_away_for_a_moment_waits_and_gets_it(cluster):
    cluster.report(instance())
    cluster.lose(silent_s=0)
    task = cluster.ask()
    await settle()
    assert not task.done()

    cluster.report(instance())

    assert (await asyncio.wait_for(task, 1)).instance_id == "p0"
    assert not cluster.loads


async def test_a_pool_whose_agent_is_not_back_in_time_is_loaded_anew(cluster):
    cluster.report(instance())
    cluster.lose(silent_s=0)
    task = cluster.ask()
    await settle()
    assert not cluster.loads

    cluster.lose()

    await cluster.loading()
    task.cancel()


@pytest.mark.parametrize("word", ["failed", "unlisted", "lost", "forgotten"])
async def test_a_doubted_pool_that_is_gone_is_loaded_anew(cluster, word):
    cluster.report(instance())
    lease = await cluster.pools.acquire(M, lambda _: None)
    cluster.pools.doubt(lease.instance_id)
    lease.release()
    task = cluster.ask()
    await settle()

    if word == "failed":
        cluster.report(instance(state=FAILED))
    elif word == "unlisted":
        cluster.report()
    elif word == "lost":
        cluster.lose()
    else:
        del cluster.nodes["n0"]
        cluster.pools.on_node_changed("n0")
    await cluster.loading()

    task.cancel()


async def test_a_forgotten_pool_is_never_used_again_whatever_reports_say(cluster):
    cluster.report(instance())
    cluster.pools.forget("p0")
    cluster.report(instance())
    task = cluster.ask()

    await cluster.loading()

    task.cancel()


async def test_a_node_that_is_back_after_a_blip_has_its_slots_counted_on(cluster):
    cluster.report(instance(parallel=1))
    lease = await cluster.pools.acquire(M, lambda _: None)
    cluster.lose()
    cluster.report(instance(parallel=1))
    task = cluster.ask()
    await settle()
    assert not task.done(), "the stream from before still runs there"

    lease.release()

    assert (await asyncio.wait_for(task, 1)).instance_id == "p0"


async def test_a_pool_that_shrinks_takes_no_more_until_enough_streams_ended(cluster):
    cluster.report(instance(parallel=3))
    leases = [await cluster.pools.acquire(M, lambda _: None) for _ in range(3)]
    cluster.report(instance(parallel=1))
    task = cluster.ask()
    leases[0].release()
    leases[1].release()
    await settle()
    assert not task.done()

    leases[2].release()

    await asyncio.wait_for(task, 1)


async def test_a_fresh_pool_is_used_before_and_after_a_late_report_from_its_start(cluster):
    cluster.report(instance(state=STARTING))
    first = cluster.ask()
    await settle()
    assert not cluster.loads, "it is already starting"
    cluster.report()
    ended = await cluster.loading()
    ended.set_result(Pool(node_id="n0", instance=instance()))
    await asyncio.wait_for(first, 1)

    cluster.report(instance(state=STARTING))
    second = await asyncio.wait_for(cluster.ask(), 1)
    cluster.report()
    third = cluster.ask()
    await cluster.loading(2)

    assert second.instance_id == "p0"
    assert not third.done(), "a report that no longer lists it has the last word"
    third.cancel()


async def test_an_operators_load_and_requests_are_one_load(cluster):
    wish = PlacementWish(model=M)
    told = []
    operator = asyncio.create_task(cluster.pools.ensure_ready(wish, told.append))
    ended = await cluster.loading()
    request = cluster.ask()
    another = asyncio.create_task(cluster.pools.ensure_ready(wish, lambda _: None))
    await settle()

    cluster.sinks[0](Progress(state="loading", percent=1.0))
    ended.set_result(Pool(node_id="n0", instance=instance(parallel=1)))

    assert [pool.instance.instance_id for pool in (*await operator, *await another)] == ["p0", "p0"]
    assert (await request).instance_id == "p0"
    assert len(cluster.loads) == 1
    assert Progress(state="loading", percent=1.0) in told
    assert await cluster.pools.ensure_ready(wish, told.append), "ready, though no slot is free: at once"


async def test_an_operator_who_leaves_does_not_end_the_load_that_requests_wait_for(cluster):
    operator = asyncio.create_task(cluster.pools.ensure_ready(PlacementWish(model=M), lambda _: None))
    ended = await cluster.loading()
    request = cluster.ask()
    await settle()
    operator.cancel()
    await settle()

    ended.set_result(Pool(node_id="n0", instance=instance()))

    assert (await asyncio.wait_for(request, 1)).instance_id == "p0"


async def test_an_operators_special_wish_that_fails_is_not_the_requests_failure(cluster):
    special = PlacementWish(model=M, pinned_node="nowhere")
    operator = asyncio.create_task(cluster.pools.ensure_ready(special, lambda _: None))
    ended = await cluster.loading()
    request = cluster.ask()
    await settle()

    ended.set_exception(refuse(Reason.NO_FIT, "not pinned"))
    await cluster.loading(2)

    assert cluster.loads[0][0] == special
    assert cluster.loads[1][0] == PlacementWish(model=M)
    assert reason_of(operator) is Reason.NO_FIT
    assert not request.done()
    request.cancel()


async def test_stopping_a_load_tells_those_who_wait(cluster):
    request = cluster.ask()
    await cluster.loading()

    await cluster.pools.stop_loading(M)
    await settle()

    assert reason_of(request) is Reason.STOPPED
    assert cluster.loads[0][1].cancelled()
    assert len(cluster.loads) == 1


async def test_a_load_stopped_before_its_first_step_is_over_and_the_model_can_be_loaded_again(cluster):
    request = cluster.ask()
    await asyncio.sleep(0)  # the load is created in this turn of the event loop, and runs in the next
    assert not cluster.loads

    await cluster.pools.stop_loading(M)
    await asyncio.wait({request}, timeout=5)
    again = cluster.ask()
    ended = await cluster.loading()
    ended.set_result(Pool(node_id="n0", instance=instance()))

    assert reason_of(request) is Reason.STOPPED
    assert (await asyncio.wait_for(again, 5)).instance_id == "p0"


@pytest.mark.parametrize("why", [None, refuse(Reason.ENGINE_DIED, "its node is lost").refusal])
async def test_who_waits_for_a_pool_that_another_head_loads_gets_another_when_that_one_is_stopped(cluster, why):
    cluster.report(instance(state=STARTING))
    request = cluster.ask()
    await settle()
    assert not cluster.loads, "the other head's is waited for"

    cluster.pools.forget("p0", why)
    ended = await cluster.loading()
    ended.set_result(Pool(node_id="n1", instance=instance("p1")))

    assert (await asyncio.wait_for(request, 5)).instance_id == "p1"


async def test_closing_refuses_those_who_wait_and_those_to_come_and_ends_loads(cluster):
    waiting = [cluster.ask() for _ in range(3)]
    await cluster.loading()

    await cluster.pools.close()
    await asyncio.wait(waiting)
    later = cluster.ask()
    await asyncio.wait({later})

    assert {reason_of(task) for task in (*waiting, later)} == {Reason.SHUTTING_DOWN}
    assert cluster.loads[0][1].cancelled()
    assert len(cluster.loads) == 1


async def test_news_of_one_node_cost_the_same_in_a_big_cluster(cluster):
    for number in range(1000):
        cluster.report(instance(f"p{number}", model=f"model-{number % 20}"), node_id=f"n{number}")
    waiting = [cluster.ask(model=f"model-{number % 20}") for number in range(2000)]
    leases = await asyncio.wait_for(asyncio.gather(*waiting), 20)
    with cost() as reports:
        for _ in range(10):
            for number in range(100):
                cluster.report(instance(f"p{number}", model=f"model-{number % 20}"), node_id=f"n{number}")

    assert reports.cpu_s < 0.5, "1000 reports"
    assert len({lease.instance_id for lease in leases}) == 1000


async def test_a_key_with_many_requests_does_not_keep_another_waiting(cluster):
    cluster.report(instance(parallel=1))
    lease = await cluster.pools.acquire(M, lambda _: None, asker="greedy")
    greedy = [cluster.ask(asker="greedy") for _ in range(20)]
    await settle()
    modest = [cluster.ask(asker="modest") for _ in range(2)]
    await settle()

    order = []
    for whose, task in [*(("greedy", task) for task in greedy), *(("modest", task) for task in modest)]:
        task.add_done_callback(lambda _, whose=whose: order.append(whose))
    for _ in range(5):
        before = len(order)
        lease.release()
        await wait_until(lambda before=before: len(order) > before, what="the next one")
        lease = next(task.result() for task in (*modest, *greedy) if task.done() and task.result()._slots)

    assert order == ["greedy", "modest", "greedy", "modest", "greedy"]
    for task in greedy:
        task.cancel()
    await asyncio.gather(*greedy, return_exceptions=True)


async def test_a_full_queue_gives_a_place_of_the_longest_to_whoever_has_less():
    cluster = Cluster(max_queue=3)
    greedy = [cluster.ask(asker="greedy") for _ in range(3)]
    await settle()
    modest = cluster.ask(asker="modest")
    await settle()

    assert [task.done() for task in (*greedy, modest)] == [False, False, True, False]
    assert reason_of(greedy[2]) is Reason.QUEUE_FULL
    with pytest.raises(SollolError, match="QUEUE_FULL"):
        await cluster.pools.acquire(M, lambda _: None, asker="greedy")
    await cluster.pools.close()
    await asyncio.gather(*greedy, modest, return_exceptions=True)
