"""Operators' calls through real gRPC and `sollol.Client`: what they get, and every refusal as itself."""

import asyncio
import contextlib

import pytest
from msgspec.structs import replace
from sollol.channels import new_server, open_channel
from sollol.client import Client
from sollol.errors import Reason, Retry, SollolError, refuse
from sollol.inference import Progress
from sollol.report import Instance, InstanceState, PlacementWish, Pool
from sollol.v1 import cluster_pb2, cluster_pb2_grpc

from sollold.catalogue import Catalogue
from sollold.numbers import PoolNumbers
from sollold.operators import ClusterService
from sollold.placement import PlacementDefaults, decide
from sollold.pools import Pools
from tests.placement_cases import node
from tests.waiting import wait_until

M = "tiny:8b"
DEFAULTS = PlacementDefaults(
    policy="fit", strategy="pack", context_per_slot=512, parallel=2, kv_type="f16", stale_after_s=8.0
)
READY, STARTING = InstanceState.READY, InstanceState.STARTING


def instance(pool_id="p", state=READY, model=M, started=0.0):
    return Instance(instance_id=pool_id, model=model, state=state, parallel=2, started_unix_s=started)


class Head:
    """Nodes, links and loads as the test wants them, behind the real service."""

    models_version = 0

    def __init__(self):
        self.nodes = {"a": node("a")}
        self.stopped, self.loads = [], []
        self.stop_fails = self.stop_takes = None
        self.stops_left = self.looks = 0
        self.pools = Pools(self, load=self.load, numbers=PoolNumbers(self), max_queue=10)
        catalogue = Catalogue(self, stale_after_s=8.0)
        self.service = ClusterService(
            self, self.pools, catalogue, decide=lambda wish: decide(wish, self.statuses(), DEFAULTS)
        )

    def statuses(self):
        self.looks += 1
        return tuple(self.nodes.values())

    def status(self, node_id):
        return self.nodes.get(node_id)

    def any_live(self, stale_after_s):
        return True

    def all_heard(self):
        return True

    def report(self, *instances):
        self.nodes["a"] = node("a", instances=instances)
        self.pools.on_node_changed("a")

    async def load(self, wish, number, on_progress):
        on_progress(Progress(state="placing"))
        ended = asyncio.get_running_loop().create_future()
        self.loads.append((wish, ended))
        return await ended

    def link(self, node_id):
        if node_id not in self.nodes:
            raise refuse(Reason.AGENT_UNREACHABLE, f"node {node_id} is not known")
        return self

    async def set_cordoned(self, *, cordoned, draining):
        pass

    async def stop(self, instance_id, *, at_once=False):
        self.stopped.append(instance_id)
        try:
            if self.stop_takes is not None:
                await self.stop_takes.wait()
        except asyncio.CancelledError:
            self.stops_left += 1
            raise
        if self.stop_fails is not None:
            raise self.stop_fails

    async def tail_log(self, instance_id, *, lines, follow):
        yield (f"{lines} lines of {instance_id}",)
        if follow:
            raise refuse(Reason.INSTANCE_NOT_FOUND, "it ended")


@pytest.fixture
async def served(tmp_path):
    async with contextlib.AsyncExitStack() as stack:
        head, server = Head(), new_server()
        cluster_pb2_grpc.add_ClusterServiceServicer_to_server(head.service, server)
        address = f"unix:{tmp_path}/head.sock"
        server.add_insecure_port(address)
        await server.start()
        stack.push_async_callback(server.stop, 0)
        stack.push_async_callback(head.pools.close)
        client = await stack.enter_async_context(Client(address))
        yield head, client, address


async def refused(awaited):
    with pytest.raises(SollolError) as caught:
        await awaited
    return caught.value.refusal


async def all_of(steps):
    return [step async for step in steps]


async def test_nodes_and_pools_are_listed(served):
    head, client, _ = served
    head.report(instance())

    (status,) = await client.nodes()
    (pool,) = await client.pools()

    assert status.report.node_id == "a"
    assert pool == Pool(node_id="a", instance=instance())


async def test_a_dry_run_decides_and_changes_nothing(served):
    head, client, _ = served

    decision = await client.place(PlacementWish(model=M))
    unplaceable = await client.place(PlacementWish(model=M, min_cpus=1000))
    unknown = await client.place(PlacementWish(model="tiny:8c"))

    assert decision.coordinator == "a"
    assert decision.plan is not None
    assert unplaceable.refusal.reason is Reason.NO_FIT
    assert unknown.refusal.reason is Reason.MODEL_NOT_FOUND
    assert not head.loads


@pytest.mark.parametrize(
    ("wish", "reason"),
    [
        (PlacementWish(model="../etc"), Reason.INVALID_MODEL_NAME),
        (PlacementWish(model=""), Reason.INVALID_MODEL_NAME),
        (PlacementWish(model=M, policy="best"), Reason.INVALID_REQUEST),
        (PlacementWish(model=M, kv_type="q1"), Reason.INVALID_REQUEST),
    ],
)
async def test_a_wish_that_makes_no_sense_is_refused(served, wish, reason):
    _, client, _ = served

    assert (await refused(client.place(wish))).reason is reason


async def test_loading_tells_its_progress_and_then_the_pool(served):
    head, client, _ = served
    told = []
    steps = asyncio.create_task(client.load(PlacementWish(model=M), told.append))
    await wait_until(lambda: head.loads, what="loading")
    head.loads[0][1].set_result(Pool(node_id="a", instance=instance()))

    pool = await steps

    assert [step.state for step in told] == ["queued", "placing"]
    assert pool == Pool(node_id="a", instance=instance())
    assert await client.load(PlacementWish(model=M)) == pool, "ready: at once"


async def test_a_load_that_fails_ends_with_its_reason(served):
    head, client, _ = served
    steps = asyncio.create_task(client.load(PlacementWish(model=M)))
    await wait_until(lambda: head.loads, what="loading")
    head.loads[0][1].set_exception(refuse(Reason.OUT_OF_MEMORY, "killed", log_lines=("last words",)))

    refusal = await refused(steps)

    assert refusal.reason is Reason.OUT_OF_MEMORY
    assert refusal.log_lines == ("last words",)


async def test_unknown_models_are_refused_by_every_call(served):
    _, client, _ = served

    for call in (client.load(PlacementWish(model="none")), client.unload("none"), all_of(client.tail_log("none"))):
        assert (await refused(call)).reason is Reason.MODEL_NOT_FOUND


async def test_unloading_stops_every_pool_that_has_a_process(served):
    head, client, _ = served
    head.report(
        instance("p"), instance("q", STARTING), instance("r", InstanceState.FAILED), instance("s", model="other")
    )

    assert sorted(await client.unload(M)) == ["p", "q"]
    assert sorted(head.stopped) == ["p", "q"]
    head.report(instance("p"))
    assert head.pools._index.ready(M) == (), "an old report does not bring it back"


async def test_unloading_ends_a_load_in_flight_and_tells_who_waits_for_it(served):
    head, client, _ = served
    steps = asyncio.create_task(client.load(PlacementWish(model=M)))
    await wait_until(lambda: head.loads, what="loading")

    assert list(await client.unload(M)) == []

    assert (await refused(steps)).reason is Reason.STOPPED
    assert head.loads[0][1].cancelled()


async def test_a_model_whose_file_is_gone_can_still_be_unloaded_and_its_log_read(served):
    head, client, _ = served
    head.report(instance(model="deleted"))

    assert await all_of(client.tail_log("deleted", lines=3))
    assert list(await client.unload("deleted")) == ["p"]


async def test_a_pool_that_cannot_be_stopped_is_told_and_used_again_when_it_reports(served):
    head, client, _ = served
    head.report(instance("p"), instance("q"))
    head.stop_fails = refuse(Reason.AGENT_UNREACHABLE, "gone")

    assert (await refused(client.unload(M))).reason is Reason.AGENT_UNREACHABLE
    assert sorted(head.stopped) == ["p", "q"], "the others are asked all the same"
    head.report(instance("p"))

    assert len(head.pools._index.ready(M)) == 1


async def test_a_pool_that_an_operator_left_before_it_was_stopped_is_used_again_when_it_reports(served):
    head, client, _ = served
    head.report(instance("p"))
    head.stop_takes = asyncio.Event()
    unloading = asyncio.create_task(client.unload(M))
    await wait_until(lambda: head.stopped, what="stopping")

    unloading.cancel()
    await wait_until(lambda: head.stops_left, what="the agent is no longer asked")
    head.report(instance("p"))

    assert len(head.pools._index.ready(M)) == 1


async def test_a_log_is_found_by_pool_or_by_model_the_ready_and_newest_first(served):
    head, client, _ = served
    head.report(instance("old", started=1), instance("new", started=2), instance("failed", InstanceState.FAILED, M, 3))

    assert await all_of(client.tail_log("old", lines=7)) == ["7 lines of old"]
    assert await all_of(client.tail_log(M, lines=7)) == ["7 lines of new"]
    head.report()
    assert (await refused(all_of(client.tail_log(M)))).reason is Reason.INSTANCE_NOT_FOUND
    head.report(instance())
    assert (await refused(all_of(client.tail_log("p", follow=True)))).reason is Reason.INSTANCE_NOT_FOUND


async def test_how_many_lines_are_read_is_bounded(served):
    head, _, address = served
    head.report(instance())
    async with open_channel(address) as channel:
        stub = cluster_pb2_grpc.ClusterServiceStub(channel)
        found = [
            line
            async for response in stub.TailPoolLog(cluster_pb2.TailPoolLogRequest(pool="p", lines=2**32 - 1))
            for line in response.lines
        ]

    assert found == ["10000 lines of p"]


async def test_a_bug_is_internal_and_says_so(served):
    head, client, _ = served
    head.pools.instances_of = None

    refusal = await refused(client.unload(M))

    assert refusal.reason is Reason.INTERNAL


async def test_an_operator_who_leaves_leaves_nothing_waiting(served):
    head, client, _ = served
    steps = asyncio.create_task(client.load(PlacementWish(model=M)))
    await wait_until(lambda: head.loads, what="loading")
    steps.cancel()

    await wait_until(lambda: not head.pools._queues[M].watchers, what="nobody waits")
    assert not head.loads[0][1].done(), "the load goes on, for whoever asks next"


def test_pools_of_lost_nodes_are_listed_until_they_are_forgotten():
    head = Head()
    head.report(instance())
    head.nodes["a"] = replace(head.nodes["a"], connected=False)

    assert head.pools.all() == (Pool(node_id="a", instance=instance()),)


async def test_several_pools_are_brought_up_and_come_in_the_order_of_their_numbers(served):
    head, client, _ = served
    steps = asyncio.create_task(client.load_pools(PlacementWish(model=M), 2))
    for number in (0, 1):
        await wait_until(lambda number=number: len(head.loads) == number + 1, what=f"loading pool {number}")
        head.loads[number][1].set_result(
            Pool(node_id="a", instance=replace(instance(f"p{number}"), pool_number=number))
        )

    pools = await steps

    assert [pool.instance.pool_number for pool in pools] == [0, 1]
    assert await client.load(PlacementWish(model=M)) == pools[0]


@pytest.mark.parametrize("count", [0, 65])
async def test_a_number_of_pools_that_makes_no_sense_is_refused(served, count):
    head, client, _ = served

    refusal = await refused(client.load_pools(PlacementWish(model=M), count))

    assert refusal.reason is Reason.INVALID_REQUEST
    assert "use 1 to 64" in refusal.message
    assert not head.loads


async def test_a_node_that_is_lost_while_it_drains_is_not_said_to_be_empty(served):
    head, client, _ = served
    head.report(instance())
    left = client.drain("a")
    assert [pool.instance.instance_id for pool in await anext(left)] == ["p"]

    del head.nodes["a"]  # as when it was silent for a minute

    refusal = await refused(anext(left))
    assert (refusal.reason, refusal.message) == (Reason.AGENT_UNREACHABLE, "node a is not known")


async def test_a_drain_that_is_called_off_says_so_and_waits_no_more(served):
    head, client, _ = served
    head.report(instance())
    left = client.drain("a")
    assert [pool.instance.instance_id for pool in await anext(left)] == ["p"]
    head.nodes["a"] = node("a", instances=(instance(),), cordoned=True, draining=True)
    ending = asyncio.create_task(anext(left))
    seen = head.looks
    await wait_until(lambda: head.looks > seen + 1, what="a look at the node that drains")

    head.nodes["a"] = node("a", instances=(instance(),))

    refusal = await refused(asyncio.wait_for(ending, 5))
    assert (refusal.reason, refusal.retry) == (Reason.STOPPED, Retry.RETRYABLE)
    assert "node a is not drained any more" in refusal.message


async def test_a_drain_that_begins_right_after_another_was_called_off_waits_for_its_own(served):
    head, client, _ = served
    head.nodes["a"] = node("a", instances=(instance(),), cordoned=True, draining=True)  # from before
    left = client.drain("a")
    assert [pool.instance.instance_id for pool in await anext(left)] == ["p"]
    ending = asyncio.create_task(anext(left))

    head.nodes["a"] = node("a", instances=(instance(),))  # what the uncordoning has left on its way
    seen = head.looks
    await wait_until(lambda: head.looks > seen + 1, what="a look at the node")
    head.nodes["a"] = node("a", cordoned=True, draining=True)

    assert await asyncio.wait_for(ending, 5) == ()
