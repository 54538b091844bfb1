"""Sends bytes to another agent and is told how fast they came; counts those that another one sends here.

A gRPC edge. What is measured is what one gRPC stream carries: right up to a few hundred megabytes per second, which is
more than gigabit Ethernet; a faster link shows as that.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
from msgspec import Struct
from sollol.channels import open_channel, refusal_of, unreachable
from sollol.errors import Reason, SollolError, refuse
from sollol.tls import TlsFiles
from sollol.v1 import agent_pb2, agent_pb2_grpc

from agent.links import address_of
from agent.ping import round_trip_s
from agent.rate import MOST_BYTES, Arrived, bytes_per_s, enough

PROBE_WITHIN_S = 6.0
WHO_WITHIN_S = 3.0
COUNTED_WITHIN_S = 4.0
# Pieces grow with what has been sent: fine enough to time a slow link, few enough not to be what limits a fast one.
SMALLEST_BYTES = 4 << 10
LARGEST_BYTES = 256 << 10
GROWTH = 8
MOST_SENT_BYTES = 4 * MOST_BYTES  # the receiver says when it has enough; this is for one that does not


class Probed(Struct, frozen=True, kw_only=True):
    """`node_id` and `boot_id` are those of whoever answered."""

    node_id: str
    boot_id: str
    rtt_s: float
    bytes_per_s: float


async def probe(host: str, port: int, tls: TlsFiles | None = None) -> Probed:
    """Measure the way to the agent at this address; takes a second, and never more than `PROBE_WITHIN_S` and a ping.

    Raises:
        SollolError: AGENT_UNREACHABLE, or why the agent there would not answer.
    """
    address = address_of(host, port)
    try:
        rtt_s = await round_trip_s(host, port, tls)
    except (OSError, OverflowError, UnicodeError) as error:  # a time-out; no port; no name, such as `a..b`
        problem = str(error) or "no answer in time"
        raise SollolError(unreachable(f"agent {address} cannot be reached ({problem})")) from error
    async with _calling(address, PROBE_WITHIN_S, tls) as call:
        who = await _answer(call, address)
        sending = asyncio.create_task(_send(call), name=f"probe {address}")
        try:
            answer = await _answer(call, address)
        finally:
            call.cancel()  # what is still to be written is of no use; the task ends with the call
            await asyncio.wait((sending,))
    return Probed(node_id=who.node_id, boot_id=who.boot_id, rtt_s=rtt_s, bytes_per_s=answer.bytes_per_s)


async def who_answers(host: str, port: int, tls: TlsFiles | None = None) -> str:
    """The node id of the agent at this address.

    Raises:
        SollolError: as `probe`.
    """
    address = address_of(host, port)
    async with _calling(address, WHO_WITHIN_S, tls) as call:
        return (await _answer(call, address)).node_id


@asynccontextmanager
async def _calling(address: str, within_s: float, tls: TlsFiles | None) -> AsyncIterator[Any]:
    channel = open_channel(address, tls.current() if tls is not None else None)
    try:
        call = agent_pb2_grpc.AgentServiceStub(channel).ProbeLink(timeout=within_s)
        try:
            yield call
        finally:
            call.cancel()
    except grpc.aio.AioRpcError as error:
        raise SollolError(refusal_of(error, f"agent {address}")) from error
    finally:
        await channel.close()


async def _answer(call: Any, address: str) -> agent_pb2.ProbeLinkResponse:
    answer = await call.read()
    if not isinstance(answer, agent_pb2.ProbeLinkResponse):
        raise refuse(Reason.INTERNAL, f"agent {address} ended the probe without an answer")
    return answer


async def _send(call: Any) -> None:
    padding, sent = os.urandom(LARGEST_BYTES), 0
    try:
        while sent < MOST_SENT_BYTES:
            size = min(max(sent // GROWTH, SMALLEST_BYTES), LARGEST_BYTES)
            await call.write(agent_pb2.ProbeLinkRequest(padding=padding[:size]))
            sent += size
        await call.done_writing()
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
        pass  # the call is over: whoever reads its answers learns why


class Sink:
    """Takes what other agents send to measure their links here: one at a time, for two would each seem half as fast."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()

    async def serve(self, context: Any, *, node_id: str, boot_id: str) -> None:
        """Answer one `ProbeLink` call.

        Raises:
            SollolError: STREAM_STALLED; too little came to tell.
        """
        async with self._turn:
            await context.write(agent_pb2.ProbeLinkResponse(node_id=node_id, boot_id=boot_id))
            await context.write(agent_pb2.ProbeLinkResponse(bytes_per_s=await count(context.read)))


async def count(read: Callable[[], Awaitable[Any]], clock: Callable[[], float] = time.perf_counter) -> float:
    """Take pieces until there are enough or no more come; returns bytes per second.

    Raises:
        SollolError: STREAM_STALLED; too little came to tell.
    """
    arrived: list[Arrived] = []
    total, first_s = 0, 0.0
    try:
        async with asyncio.timeout(COUNTED_WITHIN_S):
            while not enough(arrived) and (message := await read()) is not grpc.aio.EOF:
                now_s = clock()
                first_s = first_s or now_s
                total += len(message.padding)
                arrived.append(Arrived(now_s - first_s, total))
    except TimeoutError:  # what has come until now may do; that nothing has come since is part of it
        if arrived:
            arrived.append(Arrived(clock() - first_s, total))
    rate = bytes_per_s(arrived)
    if rate <= 0:
        raise refuse(Reason.STREAM_STALLED, f"{total} bytes came: too few to time the link", retryable=True)
    return rate
