"""What one relay call has to send to its head: frames gather per stream and leave together.

Pure: no loop, no gRPC. A stream's data never exceeds the credit its head granted, whatever the engine sends.
"""

from collections.abc import Callable, Mapping

from sollol import wire
from sollol.errors import Refusal
from sollol.v1 import agent_pb2

BATCH_BYTES = 262_144
"""A batch stops growing here, so that one stream's burst delays the others' tokens by no more than this."""


MAX_CREDIT_BYTES = 4_194_304
"""More credit than this is not kept: what a stalled stream may hold is this agent's to bound."""


class Lane:
    """One stream's frames on their way out. `room` says whether the engine may be read further."""

    __slots__ = ("buffered", "credit", "end", "ended", "head", "number", "pieces")

    def __init__(self, number: int, credit: int) -> None:
        self.number = number
        self.credit = min(credit, MAX_CREDIT_BYTES)
        self.pieces: list[bytes] = []
        self.buffered = 0
        self.head: agent_pb2.Head | None = None
        self.end: agent_pb2.End | None = None
        self.ended = False

    @property
    def room(self) -> bool:
        return self.buffered < self.credit

    @property
    def due(self) -> bool:
        if self.head is not None:
            return True
        return self.credit > 0 if self.buffered else self.end is not None


class Outbox:
    """The lanes that have something to send, oldest first. `on_end` is told each stream whose End leaves."""

    def __init__(self, on_end: Callable[[int], None]) -> None:
        self._due: dict[int, Lane] = {}
        self._on_end = on_end

    def __bool__(self) -> bool:
        return bool(self._due)

    def head(self, lane: Lane, status: int, headers: Mapping[str, str]) -> None:
        lane.head = agent_pb2.Head(status=status, headers=headers)
        self._due[lane.number] = lane

    def data(self, lane: Lane, data: bytes) -> None:
        lane.pieces.append(data)
        lane.buffered += len(data)
        if lane.credit > 0:
            self._due[lane.number] = lane

    def grant(self, lane: Lane, credit: int) -> None:
        lane.credit = min(lane.credit + credit, MAX_CREDIT_BYTES)
        if lane.due:
            self._due[lane.number] = lane

    def end(self, lane: Lane, refusal: Refusal | None, *, drop_data: bool = False) -> None:
        """End a stream after the data it still has; with `drop_data` nothing but the end follows.

        The first end stays, unless a later one drops the data that it still waits for.
        """
        if lane.ended and not (drop_data and lane.buffered):
            return
        lane.ended = True
        lane.end = agent_pb2.End()
        if refusal is not None:
            lane.end.refusal.SetInParent()
            wire.fill(lane.end.refusal, refusal)
        if drop_data:
            lane.pieces.clear()
            lane.buffered = 0
        if lane.due:
            self._due[lane.number] = lane

    def take(self) -> tuple[agent_pb2.RelayResponse, bool]:
        """Return the next batch, and whether it was full and more is due now."""
        batch = agent_pb2.RelayResponse()
        frames = batch.frames
        size = 0
        while self._due and size < BATCH_BYTES:
            number, lane = next(iter(self._due.items()))
            del self._due[number]
            if lane.head is not None:
                frames.add(stream=number, head=lane.head)
                lane.head = None
            if lane.buffered and lane.credit > 0:
                data = _sendable(lane)
                size += len(data)
                frames.add(stream=number, data=data)
            if lane.end is not None and not lane.buffered:
                frames.add(stream=number, end=lane.end)
                lane.end = None
                self._on_end(number)
        return batch, bool(self._due)


def _sendable(lane: Lane) -> bytes:
    pieces = lane.pieces
    data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
    pieces.clear()
    if len(data) > lane.credit:
        pieces.append(data[lane.credit :])
        data = data[: lane.credit]
    lane.buffered -= len(data)
    lane.credit -= len(data)
    return data
