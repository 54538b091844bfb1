"""Carries token streams from this node's engines to the heads: many streams, one gRPC message per batch.

One gRPC message costs the same CPU whatever its size, so the cost must be per batch and not per token: a frame leaves
at once when nothing was sent for GATHER_S, else with all others that are due by then. Chunks reach the outbox by plain
callbacks; a stream's task only opens the connection and says how it ended.
"""

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import grpc.aio
import structlog
from sollol.channels import refusal_abort
from sollol.errors import Reason, Refusal, SollolError, refuse
from sollol.v1 import agent_pb2

from agent.departure import RESTARTING
from agent.engine_client import EngineProtocolError, Exchange, authorization, connect
from agent.outbox import Lane, Outbox
from agent.relayed import DOWN_HEADERS, engine_request
from agent.streams import Streams

GATHER_S = 0.002
MAX_STREAMS = 4096
"""Streams of one head at a time; far above any engine's slots, it bounds memory against a broken head."""
FAILURE_WAIT_S = 1.0
_FAILURE_POLL_S = 0.02
CANCELLED = Refusal(reason=Reason.CANCELLED, message="the reader let go of this stream")

log = structlog.get_logger()


class RelayContext(Protocol):
    """What a relay call needs of `grpc.aio.ServicerContext`."""

    async def read(self) -> Any: ...

    async def write(self, message: agent_pb2.RelayResponse) -> None: ...


class Relay:
    """All relay calls of this agent.

    Args:
        socket_of: The unix socket of a ready instance; raises SollolError for others.
        failure_of: Why an instance's process is gone, once its supervisor knows; None before.
        streams: Told of every stream.
        key: What the engines ask of whoever asks them; empty: nothing.
    """

    def __init__(
        self,
        socket_of: Callable[[str], Path],
        failure_of: Callable[[str], Refusal | None],
        streams: Streams,
        key: str = "",
    ) -> None:
        self.socket_of = socket_of
        self.failure_of = failure_of
        self.streams = streams
        self.authorization = authorization(key)
        self.leaving = False
        self._calls: set[_Call] = set()

    async def serve(self, context: RelayContext) -> None:
        """Serve one head's call until it ends; its streams end with it."""
        call = _Call(self, context)
        self._calls.add(call)
        try:
            refusal = await call.run()
        finally:
            self._calls.discard(call)
        if refusal is not None:
            log.warning("relay_call_refused", reason=refusal.reason, message=refusal.message)
            await refusal_abort(context, refusal)

    async def leave(self) -> None:
        """End every stream, and those to come, with the word that this agent restarts: the engines do not."""
        self.leaving = True
        for call in self._calls:
            call.end_streams(RESTARTING)


class _Call:
    """One head's call: a reader, a writer, and a task per stream, all gone when `run` returns."""

    def __init__(self, relay: Relay, context: RelayContext) -> None:
        self.relay = relay
        self._context = context
        self._streams: dict[int, _Stream] = {}
        self._outbox = Outbox(on_end=self._forget)
        self._wake = asyncio.Event()

    async def run(self) -> Refusal | None:
        """Return why the head's frames could not be followed, or None when it ended the call."""
        async with asyncio.TaskGroup() as group:
            writer = group.create_task(self._write(), name="relay-writer")
            try:
                return await self._read(group)
            finally:
                self.end_streams(CANCELLED, drop_data=True)
                writer.cancel()

    def end_streams(self, why: Refusal, *, drop_data: bool = False) -> None:
        for stream in tuple(self._streams.values()):
            stream.cut(why, drop_data=drop_data)

    async def _read(self, group: asyncio.TaskGroup) -> Refusal | None:
        while isinstance(message := await self._next(), agent_pb2.RelayRequest):
            for frame in message.frames:
                stream = self._streams.get(frame.stream)
                kind = frame.WhichOneof("frame")
                if kind == "open":
                    if stream is not None:
                        return _opened_twice(frame.stream)
                    if len(self._streams) >= 2 * MAX_STREAMS:  # it goes on opening while it takes no refusals
                        return _too_many()
                    self._open(frame.stream, frame.open, group)
                elif stream is None:
                    continue  # it crossed the stream's End on the way
                elif kind == "credit":
                    stream.grant(frame.credit.bytes)
                elif kind == "cancel":
                    stream.cut(CANCELLED, drop_data=True)
        return None

    async def _next(self) -> Any:
        """The head's next message; anything else when the call is over."""
        try:
            return await self._context.read()
        except grpc.aio.BaseError as error:  # this server has been stopped under the call, or the connection is lost
            log.info("relay_call_lost", error=str(error))
            return None

    def _open(self, number: int, request: agent_pb2.Open, group: asyncio.TaskGroup) -> None:
        full = len(self._streams) >= MAX_STREAMS
        stream = self._streams[number] = _Stream(self.relay, request, Lane(number, request.credit_bytes), self)
        if full:
            self.end(stream.lane, _too_many())
        elif self.relay.leaving:
            self.end(stream.lane, RESTARTING)
        else:
            group.create_task(stream.run(), name=f"relay-stream-{number}")

    def _forget(self, number: int) -> None:
        del self._streams[number]

    async def _write(self) -> None:
        try:
            await self._write_batches()
        except grpc.aio.BaseError as error:  # the reader sees the end of the call too, and ends the streams
            log.info("relay_call_lost", error=str(error))

    async def _write_batches(self) -> None:
        clock = asyncio.get_running_loop().time
        next_at = 0.0
        while True:
            await self._wake.wait()
            pause = next_at - clock()
            if pause > 0:
                await asyncio.sleep(pause)
            self._wake.clear()
            next_at = clock() + GATHER_S
            more = bool(self._outbox)
            while more:
                batch, more = self._outbox.take()
                await self._context.write(batch)

    def head(self, lane: Lane, status: int, headers: Mapping[str, str]) -> None:
        self._outbox.head(lane, status, headers)
        self._wake.set()

    def data(self, lane: Lane, data: bytes) -> None:
        self._outbox.data(lane, data)
        self._wake.set()

    def grant(self, lane: Lane, credit: int) -> None:
        self._outbox.grant(lane, credit)
        self._wake.set()

    def end(self, lane: Lane, refusal: Refusal | None, *, drop_data: bool = False) -> None:
        self._outbox.end(lane, refusal, drop_data=drop_data)
        self._wake.set()


class _Stream:
    """One request to one engine. Its task opens the connection and says how it ended; chunks come by callback."""

    def __init__(self, relay: Relay, request: agent_pb2.Open, lane: Lane, call: _Call) -> None:
        self.lane = lane
        self._request: agent_pb2.Open | None = request  # until it is sent: bodies are large, streams long
        self._instance_id = request.instance_id
        self._relay = relay
        self._call = call
        self._exchange: Exchange | None = None

    def grant(self, credit: int) -> None:
        self._call.grant(self.lane, credit)
        if self._exchange is not None and self.lane.room:
            self._exchange.resume()

    def cut(self, why: Refusal, *, drop_data: bool) -> None:
        self._call.end(self.lane, why, drop_data=drop_data)
        if self._exchange is not None:
            self._exchange.abort()

    async def run(self) -> None:
        with self._relay.streams.counted(self._instance_id):
            refusal = await self._outcome()
        self._call.end(self.lane, refusal)

    async def _outcome(self) -> Refusal | None:
        try:
            await self._talk()
        except SollolError as error:
            return error.refusal
        except EngineProtocolError as error:
            log.warning("engine_response_malformed", instance_id=self._instance_id, error=str(error))
            return _malformed(self._instance_id, error)
        except OSError as error:
            log.warning("engine_connection_lost", instance_id=self._instance_id, error=str(error))
            return await self._why_lost(error)
        except Exception:  # a bug in one stream must not end the others
            log.exception("relay_stream_failed", instance_id=self._instance_id)
            return Refusal(reason=Reason.INTERNAL, message="the agent failed in this stream; its log says why")
        return None

    async def _talk(self) -> None:
        request, self._request = self._request, None
        if request is None or self.lane.ended:  # cancelled before it began
            return
        wanted = engine_request(request.method, request.path, request.headers, request.body, self._relay.authorization)
        exchange = Exchange(wanted, self._on_head, self._on_body)
        del request, wanted
        path = self._relay.socket_of(self._instance_id)
        self._exchange = exchange
        try:
            await connect(path, exchange)
            await exchange.done
        finally:
            exchange.abort()

    def _on_head(self, status: int, headers: dict[str, str]) -> None:
        wanted = {name: content for name, content in headers.items() if name in DOWN_HEADERS}
        self._call.head(self.lane, status, wanted)

    def _on_body(self, data: bytes) -> None:
        lane = self.lane
        self._call.data(lane, data)
        if not lane.room and self._exchange is not None:
            self._exchange.pause()

    async def _why_lost(self, error: OSError) -> Refusal:
        """Give the supervisor a moment to notice that the process is gone: it knows the reason, we only the symptom."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + FAILURE_WAIT_S
        while not self.lane.ended:
            known = self._relay.failure_of(self._instance_id)
            if known is not None:
                return known
            if clock() >= deadline:
                break
            await asyncio.sleep(_FAILURE_POLL_S)
        message = f"the connection to engine {self._instance_id} was lost before its answer was complete: {error}"
        return refuse(Reason.ENGINE_DIED, message, retryable=True).refusal


def _opened_twice(number: int) -> Refusal:
    return Refusal(reason=Reason.INVALID_REQUEST, message=f"stream {number} was opened twice in one relay call")


def _too_many() -> Refusal:
    message = f"this head has {MAX_STREAMS} streams open on this agent already; wait until some end"
    return refuse(Reason.QUEUE_FULL, message, retryable=True).refusal


def _malformed(instance_id: str, error: EngineProtocolError) -> Refusal:
    message = f"engine {instance_id} sent a damaged HTTP response: {error}"
    return refuse(Reason.STREAM_TRUNCATED, message, retryable=True).refusal
