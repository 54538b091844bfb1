"""Pools of a model are numbered from 0, and of two that heads started under one number one gives way."""

import asyncio
import contextlib
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from sollol.report import InstanceKind, InstanceState, Pool

from sollold.numbers import GaveWayError, PoolNumbers, lowest_free, rival_of
from sollold.pools import Pools
from tests.placement_cases import MODEL as M
from tests.placement_cases import node
from tests.pool_cluster import instance, settle

STARTING, READY, FAILED, STOPPING = (
    InstanceState.STARTING,
    InstanceState.READY,
    InstanceState.FAILED,
    InstanceState.STOPPING,
)


class Cluster:
    """Reports that a test writes."""

    def __init__(self):
        self.nodes = {}
        self.numbers = PoolNumbers(self)

    def statuses(self):
        return tuple(self.nodes.values())

    def status(self, node_id):
        return self.nodes.get(node_id)

    def report(self, *instances, node_id="n0"):
        self.nodes[node_id] = node(node_id, instances=instances)
        self.numbers.on_node_changed(node_id)

    def lose(self, node_id="n0"):
        self.nodes[node_id] = replace(self.nodes[node_id], connected=False)
        self.numbers.on_node_changed(node_id)

    async def start(self, pool_id="m", number=0):
        async with self.numbers.held(pool_id, M, number):
            await asyncio.Event().wait()

    def starting(self, pool_id="m", number=0):
        return asyncio.create_task(self.start(pool_id, number))


@pytest.fixture
def cluster():
    return Cluster()


def of(pool_id, number, state=READY, **more):
    return instance(pool_id, state, pool_number=number, **more)


def test_the_lowest_number_that_no_pool_of_the_model_has_is_free(cluster):
    assert cluster.numbers.lowest_free(M) == 0
    cluster.report(of("a", 0), of("x", 1, model="other"), node_id="n0")
    cluster.report(of("b", 2), node_id="n1")

    assert cluster.numbers.lowest_free(M) == 1
    assert cluster.numbers.lowest_free("other") == 0


@pytest.mark.parametrize(("state", "free"), [(STARTING, 1), (STOPPING, 1), (InstanceState.LOST, 1), (FAILED, 0)])
def test_a_number_is_taken_as_long_as_there_is_a_process(cluster, state, free):
    cluster.report(of("a", 0, state))

    assert cluster.numbers.lowest_free(M) == free


def test_backends_and_nodes_out_of_reach_are_no_exception(cluster):
    cluster.report(replace(of("a.backend", 0), kind=InstanceKind.BACKEND), of("a", 1))
    cluster.lose()

    assert cluster.numbers.lowest_free(M) == 0, "a backend has no number"
    cluster.report(of("b", 0), node_id="n1")
    assert cluster.numbers.lowest_free(M) == 2, "the one out of reach may well run"


@given(st.lists(st.integers(0, 8)))
def test_the_free_number_is_free_and_no_lower_one_is(taken):
    found = lowest_free(M, [of(str(at), number) for at, number in enumerate(taken)])

    assert found not in taken
    assert set(range(found)) <= set(taken)


def test_a_starting_pool_gives_way_to_a_ready_one_and_to_a_lower_id():
    def rival(*instances):
        found = rival_of("m", M, 0, instances)
        return found.instance_id if found else None

    assert rival(of("z", 0, READY)) == "z"
    assert rival(of("a", 0, STARTING)) == "a"
    assert rival(of("m", 0, STARTING), of("m", 0, READY)) is None, "itself"
    assert rival(of("z", 0, STARTING)) is None, "that one gives way to us"
    assert rival(of("a", 1, READY), of("b", 0, READY, model="other")) is None
    assert rival(of("a", 0, FAILED), of("b", 0, STOPPING)) is None


async def test_a_start_is_cut_off_when_a_rival_shows_up(cluster):
    start = cluster.starting()
    cluster.report(of("m", 0, STARTING), of("z", 0, STARTING))
    await settle()
    assert not start.done()

    cluster.report(of("a", 0, STARTING), node_id="n1")
    await asyncio.wait({start}, timeout=1)

    assert isinstance(start.exception(), GaveWayError)
    assert "gave way to a" in str(start.exception())


async def test_a_rival_that_is_there_already_is_seen_at_once(cluster):
    cluster.report(of("z", 0, READY))

    with pytest.raises(GaveWayError):
        await asyncio.wait_for(cluster.start(), 1)


async def test_a_rival_out_of_reach_is_none(cluster):
    cluster.report(of("a", 0, STARTING))
    cluster.lose()
    start = cluster.starting()
    await settle()

    assert not start.done()
    start.cancel()


async def test_what_this_head_gave_up_itself_is_no_rival_and_takes_no_number(cluster):
    first = cluster.starting("a")
    cluster.report(of("a", 0, STARTING))
    await settle()
    first.cancel()
    await asyncio.wait({first})
    assert cluster.numbers.lowest_free(M) == 0

    second = cluster.starting("m")
    cluster.report(of("a", 0, STARTING))
    await settle()

    assert not second.done()
    second.cancel()


async def test_a_failure_of_the_start_itself_stays_what_it_is(cluster):
    for error in (ValueError("x"), TimeoutError("y")):
        with pytest.raises(type(error)):
            async with cluster.numbers.held("m", M, 0):
                raise error


async def test_time_that_runs_out_outside_is_not_taken_for_a_rival(cluster):
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await cluster.start()


class World:
    """Nodes that engines start on in no time, and how much of that each head has heard: the test decides when.

    `starts` has every pool ever started.
    """

    def __init__(self, random):
        self.random = random
        self.instances = {}
        self.heads = []
        self.starts = []

    def head(self, limit):
        head = Head(self, f"{len(self.heads)}", limit)
        self.heads.append(head)
        return head

    def tell(self, head):
        for name in self.random.sample(names := sorted({*head.seen, *self.instances}), k=len(names)):
            each = self.instances.get(name)
            head.nodes[name] = node(name, instances=() if each is None else (each,))
            head.pools.on_node_changed(name)
            head.numbers.on_node_changed(name)
        head.seen = tuple(self.instances)

    def running(self):
        return sorted(each.pool_number for each in self.instances.values())


class Head:
    """The real queues and numbers over one view of the world; pools become ready when the test says so."""

    def __init__(self, world, name, limit):
        self.world, self.name = world, name
        self.nodes, self.seen = {}, ()
        self.numbers = PoolNumbers(self)
        self.pools = Pools(self, load=self.load, numbers=self.numbers, max_queue=100, limit=lambda _: limit)
        self.ready = {}

    def statuses(self):
        return tuple(self.nodes.values())

    def status(self, node_id):
        return self.nodes.get(node_id)

    async def load(self, wish, number, on_progress):
        pool_id = f"{len(self.world.starts):03}-{self.name}"
        self.world.starts.append(pool_id)
        try:
            async with self.numbers.held(pool_id, wish.model, number):
                started = of(pool_id, number, STARTING, parallel=1)
                self.world.instances[pool_id] = started
                self.ready[pool_id] = asyncio.get_running_loop().create_future()
                await self.ready[pool_id]
        except BaseException:
            self.world.instances.pop(pool_id, None)
            self.pools.forget(pool_id)
            raise
        finally:
            del self.ready[pool_id]
        self.world.instances[pool_id] = replace(started, state=READY)
        return Pool(node_id=pool_id, instance=self.world.instances[pool_id])

    async def become_ready(self):
        for future in list(self.ready.values()):
            future.set_result(None)
        await settle()


@pytest.mark.parametrize("limit", [1, 2, 3])
@pytest.mark.parametrize("seed", range(20))
async def test_heads_that_start_the_same_pools_at_once_end_with_as_many_as_wanted_and_no_number_twice(limit, seed):
    """Reports come in any order; only that they come before a model is loaded is assumed."""
    random = Random(seed)
    world = World(random)
    heads = [world.head(limit) for _ in range(3)]
    asked = [asyncio.create_task(head.pools.acquire(M, lambda _: None)) for head in heads for _ in range(6)]
    await settle()
    assert len(world.starts) == 3, "each head starts one, as long as it knows of no other"

    async def heard():
        """Tell everybody, in any order, until nobody starts or gives up anything more."""
        before = None
        while before != (before := (len(world.starts), sorted(world.instances))):
            for head in random.sample(heads, k=3):
                world.tell(head)
                await settle()

    for _ in range(limit):
        await heard()
        for head in heads:
            await head.become_ready()
    await heard()

    assert world.running() == list(range(limit))
    assert not any(head.ready for head in heads), "nobody starts another"
    assert any(task.done() for task in asked)
    for task in asked:
        task.cancel()
    await asyncio.gather(*asked, return_exceptions=True)
    for head in heads:
        with contextlib.suppress(asyncio.CancelledError):
            await head.pools.close()
