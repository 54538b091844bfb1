"""One request on its way to a pool: tried elsewhere before its first byte, never after, and one slot whatever happens."""

import asyncio

import pytest
from sollol.errors import Reason, SollolError, refuse
from sollol.report import Instance, InstanceState, Pool

from sollold.dispatch import POOL_FAILED, Dispatch
from sollold.numbers import PoolNumbers
from sollold.pools import Pools
from sollold.relay_stream import RelayStream
from sollold.streams import EngineRequest
from tests.placement_cases import node
from tests.waiting import wait_until

M = "tiny:8b"
REQUEST = EngineRequest(model="alias", path="/v1/completions", body=b"{}")


class Uplink:
    """What streams send up: who was cancelled."""

    def __init__(self):
        self.cancelled = []

    def grant(self, number, credit):
        pass

    def cancel(self, number):
        self.cancelled.append(number)


class Head:
    """Pools of two slots on nodes, whose relay streams the test feeds."""

    def __init__(self, *pool_ids, first_byte_timeout_s=5.0, stall_timeout_s=5.0):
        self.nodes, self.uplink, self.opened = {}, Uplink(), []
        self.relay = self
        self.unreachable = False
        self.loads = self.sent = 0
        self.known, self.waits = {}, []
        self.pools = Pools(self, load=self.load, numbers=PoolNumbers(self), max_queue=10)
        for pool_id in pool_ids:
            self.report(pool_id)
        self.dispatch = Dispatch(
            self,
            self.pools,
            self,
            explain=self.explain,
            waited=lambda model, seconds: self.waits.append((model, seconds)),
            first_byte_timeout_s=first_byte_timeout_s,
            stall_timeout_s=stall_timeout_s,
        )

    def report(self, pool_id, state=InstanceState.READY):
        instance = Instance(instance_id=pool_id, model=M, state=state, parallel=2)
        self.nodes[f"node-{pool_id}"] = node(f"node-{pool_id}", instances=(instance,))
        self.pools.on_node_changed(f"node-{pool_id}")

    async def explain(self, pool_id, refusal):
        return self.known.get(pool_id, refusal)

    def statuses(self):
        return tuple(self.nodes.values())

    def status(self, node_id):
        return self.nodes.get(node_id)

    def canonical(self, name):
        assert name == "alias"
        return M

    async def load(self, wish, number, on_progress):
        self.loads += 1
        if self.loads == 1:
            raise refuse(Reason.ENGINE_DIED, "every node's engine died")
        return Pool(node_id="node-x", instance=Instance(instance_id="x", model=M, state=InstanceState.READY))

    def link(self, node_id):
        if self.unreachable:
            raise refuse(Reason.AGENT_UNREACHABLE, "not known")
        return self

    def open(self, instance_id, method, path, headers, body):
        stream = RelayStream(self.uplink, len(self.opened))
        self.opened.append((instance_id, stream))
        return stream

    def request(self):
        return asyncio.create_task(self.dispatch.open(REQUEST, lambda _: None, self.told_sent))

    def told_sent(self):
        self.sent += 1

    async def attempt(self, number=1):
        """The pool and the stream of the request's n-th attempt."""
        await wait_until(lambda: len(self.opened) >= number, what=f"attempt {number}")
        return self.opened[number - 1]

    def used(self):
        return sum(slots.used for slots in self.pools._index._slots.values())


async def test_a_request_goes_to_its_models_pool_and_its_bytes_come_back():
    head = Head("p")
    task = head.request()
    pool, relayed = await head.attempt()
    relayed.head(200, {"content-type": "text/event-stream"})
    relayed.data(b"one ")
    stream = await task
    relayed.data(b"two")
    relayed.end(None)

    assert b"".join([chunk async for chunk in stream]) == b"one two"
    assert (stream.status, stream.headers["content-type"]) == (200, "text/event-stream")
    assert (stream.model, stream.node_id, stream.instance_id) == (M, "node-p", "p") == (M, f"node-{pool}", pool)
    assert head.used() == 1
    await stream.aclose()
    await stream.aclose()
    assert head.used() == 0
    assert not head.uplink.cancelled


@pytest.mark.parametrize("status", [400, 404, 500, 503])
async def test_an_engines_own_error_passes_through_untouched_and_is_not_retried(status):
    head = Head("p", "q")
    task = head.request()
    _, relayed = await head.attempt()
    relayed.head(status, {})
    relayed.data(b'{"error": "too long"}')
    relayed.end(None)

    stream = await task

    assert stream.status == status
    assert [chunk async for chunk in stream] == [b'{"error": "too long"}']
    assert len(head.opened) == 1
    await stream.aclose()


async def test_an_answer_without_a_body_is_an_answer():
    head = Head("p")
    task = head.request()
    _, relayed = await head.attempt()
    relayed.head(204, {})
    relayed.end(None)

    stream = await task

    assert [chunk async for chunk in stream] == []
    await stream.aclose()


@pytest.mark.parametrize("reason", sorted(POOL_FAILED))
@pytest.mark.parametrize("headers_came", [False, True])
async def test_before_the_first_byte_a_failed_pool_is_replaced_unseen(reason, headers_came):
    head = Head("p", "q")
    task = head.request()
    failed, relayed = await head.attempt()
    if headers_came:
        relayed.head(200, {})
    relayed.end(refuse(reason, "gone").refusal)
    other, second = await head.attempt(2)
    second.head(200, {})
    second.data(b"x")

    stream = await task

    assert {failed, other} == {"p", "q"}
    assert head.used() == 1
    await stream.aclose()


@pytest.mark.parametrize("reason", [Reason.INTERNAL, Reason.PATH_NOT_ALLOWED, Reason.QUEUE_FULL])
async def test_a_failure_that_is_not_the_pools_is_told_at_once(reason):
    head = Head("p", "q")
    task = head.request()
    _, relayed = await head.attempt()
    relayed.end(refuse(reason, "no").refusal)
    await asyncio.wait({task})

    assert task.exception().refusal.reason is reason
    assert len(head.opened) == 1
    assert head.used() == 0


async def test_after_the_first_byte_nothing_is_tried_again_and_the_pool_is_doubted():
    head = Head("p", "q")
    task = head.request()
    failed, relayed = await head.attempt()
    relayed.head(200, {})
    relayed.data(b"x")
    stream = await task
    relayed.end(refuse(Reason.ENGINE_DIED, "killed").refusal)

    with pytest.raises(SollolError) as caught:
        [chunk async for chunk in stream]
    await stream.aclose()
    again = [head.request() for _ in range(2)]
    await head.attempt(3)

    assert caught.value.refusal.reason is Reason.ENGINE_DIED
    assert [pool for pool, _ in head.opened[1:]] == [({"p", "q"} - {failed}).pop()] * 2
    for each in again:
        each.cancel()
    await asyncio.gather(*again, return_exceptions=True)


async def test_a_broken_stream_says_what_is_known_of_its_pools_end():
    head = Head("p")
    head.known["p"] = refuse(Reason.ENGINE_DIED, "the backend on c ended").refusal
    task = head.request()
    _, relayed = await head.attempt()
    relayed.head(200, {})
    relayed.data(b"x")
    stream = await task
    relayed.end(refuse(Reason.ENGINE_DIED, "its backend on b or c was lost").refusal)

    with pytest.raises(SollolError) as caught:
        [chunk async for chunk in stream]
    await stream.aclose()

    assert caught.value.refusal == head.known["p"]


async def test_attempts_are_bounded_and_the_last_reason_is_told():
    head = Head("p", "q", "r", "s")
    task = head.request()
    for number in (1, 2, 3):
        _, relayed = await head.attempt(number)
        relayed.end(refuse(Reason.ENGINE_DIED, f"{number}").refusal)
    await asyncio.wait({task})

    assert task.exception().refusal.message == "3"
    assert head.used() == 0


async def test_a_load_that_failed_on_every_node_is_not_begun_again():
    head = Head()
    task = head.request()
    await asyncio.wait({task})

    assert task.exception().refusal.reason is Reason.ENGINE_DIED
    assert head.loads == 1


async def test_a_node_that_vanished_between_grant_and_open_gives_its_slot_back():
    head = Head("p")
    head.unreachable = True
    task = head.request()
    await wait_until(lambda: head.used() == 0 and head.pools._index.pending(M), what="doubted, and its slot is free")
    head.unreachable = False
    head.report("p")
    _, relayed = await head.attempt()
    relayed.head(200, {})
    relayed.data(b"x")

    await (await task).aclose()

    assert head.used() == 0


@pytest.mark.parametrize("headers_came", [False, True])
async def test_a_client_that_leaves_before_the_first_byte_frees_slot_and_engine(headers_came):
    head = Head("p")
    task = head.request()
    _, relayed = await head.attempt()
    if headers_came:
        relayed.head(200, {})
    assert head.used() == 1

    task.cancel()
    await asyncio.wait({task})

    assert task.cancelled()
    assert head.used() == 0
    assert head.uplink.cancelled == [0]
    assert head.pools._index.ready(M), "leaving says nothing about the pool"


async def test_a_client_that_leaves_in_mid_stream_frees_slot_and_engine():
    head = Head("p")
    task = head.request()
    _, relayed = await head.attempt()
    relayed.head(200, {})
    relayed.data(b"x")
    stream = await task
    async for _ in stream:
        break

    await stream.aclose()

    assert head.used() == 0
    assert head.uplink.cancelled == [0]


async def test_an_engine_silent_before_its_first_byte_is_given_up():
    head = Head("p", first_byte_timeout_s=0.05)
    task = head.request()
    _, relayed = await head.attempt()
    relayed.head(200, {})
    await asyncio.wait({task}, timeout=2)

    assert task.exception().refusal.reason is Reason.STREAM_STALLED
    assert head.used() == 0
    assert head.uplink.cancelled == [0]


async def test_an_engine_silent_in_mid_stream_is_an_explicit_error():
    head = Head("p", stall_timeout_s=0.05)
    task = head.request()
    _, relayed = await head.attempt()
    relayed.head(200, {})
    relayed.data(b"x")
    stream = await task
    chunks = aiter(stream)

    assert await anext(chunks) == b"x"
    with pytest.raises(SollolError) as caught:
        await anext(chunks)
    assert caught.value.refusal.reason is Reason.STREAM_STALLED
    await stream.aclose()
    assert head.used() == 0


async def test_whoever_has_no_slot_is_told_that_no_engine_has_the_request_and_then_when_one_has():
    head = Head("p")
    first, second, third = head.request(), head.request(), head.request()
    _, relayed = await head.attempt(1)
    await head.attempt(2)
    await wait_until(lambda: len(head.pools._queues[M].waiters) == 1, what="the third waits")
    assert head.sent == 2
    relayed.end(refuse(Reason.INVALID_REQUEST, "no").refusal)
    await head.attempt(3)
    assert head.sent == 3
    for task in (first, second, third):
        task.cancel()
    await asyncio.gather(first, second, third, return_exceptions=True)


async def test_how_long_a_request_waited_is_told_also_of_one_that_leaves_without_a_slot():
    head = Head("p")
    holding = [await head.pools.acquire(M, lambda _: None) for _ in range(2)]
    late, gone = head.request(), head.request()
    await wait_until(lambda: len(head.pools._queues[M].waiters) == 2, what="both wait")
    assert head.waits == []

    gone.cancel()
    await asyncio.wait({gone}, timeout=2)
    assert [model for model, _ in head.waits] == [M]

    holding[0].release()
    _, relayed = await head.attempt()
    assert [model for model, _ in head.waits] == [M, M]
    assert all(0 < seconds < 60 for _, seconds in head.waits)
    relayed.head(200, {})
    relayed.data(b"x")
    await (await late).aclose()
    holding[1].release()
