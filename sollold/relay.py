"""The head's end of the relay: every token stream from one agent, over one gRPC call.

The call is opened by the first stream that needs it and again after a loss. Frames go both ways in batches; a stream
holds at most WINDOW_BYTES that its reader has not taken.
"""

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import grpc.aio
import msgspec
import structlog
from sollol import wire
from sollol.channels import refusal_of, unreachable
from sollol.errors import Reason, Refusal, refuse
from sollol.v1 import agent_pb2

from sollold.relay_stream import WINDOW_BYTES, RelayStream

if TYPE_CHECKING:
    from sollol.v1.agent_pb2_grpc import AgentServiceAsyncStub

_BATCH_BYTES = 1_048_576

__all__ = ["WINDOW_BYTES", "AgentRelay", "RelayStream"]

log = structlog.get_logger()


class AgentRelay:
    """All streams between this head and one agent.

    Args:
        stub: The agent's service; its channel belongs to the caller and must outlive this.
        address: For messages.
    """

    def __init__(self, stub: "AgentServiceAsyncStub", address: str) -> None:
        self._stub = stub
        self._address = address
        self._call: _Call | None = None

    @property
    def streams(self) -> int:
        return len(self._call.streams) if self._call is not None else 0

    def open(self, instance_id: str, method: str, path: str, headers: Mapping[str, str], body: bytes) -> RelayStream:
        """Send one HTTP request to an instance's engine; what became of it, the stream says."""
        if self._call is None or self._call.broken is not None:
            self._call = _Call(self._stub, self._address)
        request = agent_pb2.Open(
            instance_id=instance_id,
            method=method,
            path=path,
            headers=headers,
            body=body,
            credit_bytes=WINDOW_BYTES,
        )
        return self._call.open(request)

    async def close(self, why: Refusal | None = None) -> None:
        """End every stream, with SHUTTING_DOWN unless told why, and leave no task behind."""
        if self._call is not None:
            await self._call.close(why)


class _Call:
    """One Relay call: a reader and a writer task, which end together when the call breaks or is closed."""

    def __init__(self, stub: "AgentServiceAsyncStub", address: str) -> None:
        self.broken: Refusal | None = None
        self.streams: dict[int, RelayStream] = {}
        self._address = address
        self._grpc: grpc.aio.StreamStreamCall[Any, Any] = stub.Relay()
        self._last_number = 0
        # Unsent frames by stream: an Open, one Credit, one Cancel at most, so it is bounded by the open streams.
        self._due: dict[int, list[agent_pb2.UpFrame]] = {}
        self._wake = asyncio.Event()
        self._task = asyncio.create_task(self._run(), name=f"relay {address}")

    def open(self, request: agent_pb2.Open) -> RelayStream:
        self._last_number += 1
        stream = self.streams[self._last_number] = RelayStream(self, self._last_number)
        self._send(agent_pb2.UpFrame(stream=self._last_number, open=request))
        return stream

    def grant(self, number: int, credit: int) -> None:
        for frame in self._due.get(number, ()):
            if frame.HasField("credit"):
                frame.credit.bytes += credit
                return
        self._send(agent_pb2.UpFrame(stream=number, credit=agent_pb2.Credit(bytes=credit)))

    def cancel(self, number: int) -> None:
        self.streams.pop(number, None)
        unsent = self._due.pop(number, [])
        if not any(frame.HasField("open") for frame in unsent):
            self._send(agent_pb2.UpFrame(stream=number, cancel=agent_pb2.Cancel()))

    def _send(self, frame: agent_pb2.UpFrame) -> None:
        if self.broken is None:
            self._due.setdefault(frame.stream, []).append(frame)
            self._wake.set()

    async def close(self, why: Refusal | None) -> None:
        self._break(why or refuse(Reason.SHUTTING_DOWN, "this head is shutting down", retryable=True).refusal)
        self._task.cancel()
        await asyncio.wait({self._task})

    def _break(self, refusal: Refusal) -> None:
        if self.broken is not None:
            return
        self.broken = refusal
        self._due.clear()
        streams = list(self.streams.values())
        self.streams.clear()
        for stream in streams:
            stream.end(refusal)

    async def _run(self) -> None:
        writer = asyncio.create_task(self._write(), name=f"relay writer {self._address}")
        try:
            self._break(await self._read())
        finally:
            self._break(unreachable(f"the relay to agent {self._address} stopped"))
            writer.cancel()
            self._grpc.cancel()
            await asyncio.wait({writer})

    async def _read(self) -> Refusal:
        """Hand out frames until the call is over; return what that means for the streams still open."""
        try:
            while isinstance(batch := await self._grpc.read(), agent_pb2.RelayResponse):
                for frame in batch.frames:
                    stream = self.streams.get(frame.stream)
                    if stream is not None:  # else cancelled: its last frames were on the way
                        self._deliver(stream, frame)
            return unreachable(f"agent {self._address} ended the relay")
        except grpc.aio.AioRpcError as error:
            log.warning("relay_lost", agent=self._address, code=error.code().name, streams=len(self.streams))
            return refusal_of(error, f"agent {self._address}")
        except Exception:  # whatever it was, no stream may wait for frames that nobody reads
            log.exception("relay_failed", agent=self._address)
            return Refusal(reason=Reason.INTERNAL, message="the head's relay failed; its log says why")

    def _deliver(self, stream: RelayStream, frame: agent_pb2.DownFrame) -> None:
        if data := frame.data:
            stream.data(data)
        elif frame.HasField("head"):
            stream.head(frame.head.status, dict(frame.head.headers))
        elif frame.HasField("end"):
            del self.streams[frame.stream]
            self._due.pop(frame.stream, None)
            stream.end(_refusal(frame.end))

    async def _write(self) -> None:
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                while self._due:
                    await self._grpc.write(self._batch())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # the call is over: the reader gets the status and says so to the streams

    def _batch(self) -> agent_pb2.RelayRequest:
        frames: list[agent_pb2.UpFrame] = []
        size = 0
        while self._due and size < _BATCH_BYTES:
            number, unsent = next(iter(self._due.items()))
            del self._due[number]
            frames.extend(unsent)
            size += sum(len(frame.open.body) for frame in unsent if frame.HasField("open"))
        return agent_pb2.RelayRequest(frames=frames)


def _refusal(end: agent_pb2.End) -> Refusal | None:
    if not end.HasField("refusal"):
        return None
    try:
        return wire.value(Refusal, end.refusal)
    except msgspec.ValidationError:  # a newer agent's reason
        return Refusal(reason=Reason.INTERNAL, message=end.refusal.message)
