"""One connection that came in and the one made for it: bytes both ways, at the slower one's speed."""

import errno
import os
from collections.abc import Callable
from functools import partial

from agent.forwarder.loop import READ, WRITE, Loop
from agent.forwarder.refused import HUNG_UP, SILENT, RefusedError
from agent.forwarder.stream import BLOCKED, Opening, Stream, has_vanished

OPEN_WITHIN_S = 5.0
LEAVE_WITHIN_S = 10.0  # a backend that got the end of its input frees its buffers first, and those can be large
_VANISHED = frozenset({errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN})
# Shared by all links: nothing stays in it from one event to the next.
_BUFFER = memoryview(bytearray(256 * 1024))


class Side:
    """One of a link's two connections.

    Attributes:
        stream: None before it is open and after it is closed.
        left: What could not be written yet; the other side is not read meanwhile.
        ended: Nothing more will come from it.
        closes: Once nothing is left.
    """

    def __init__(self) -> None:
        self.stream: Stream | None = None
        self.left = memoryview(b"")
        self.moved = 0
        self.ended = self.closes = self.ends_output = False


class Link:
    """Both sides of one connection.

    Args:
        near: Opens the side of whoever came.
        on_arrived: Called when that side is open: decides by `pump`, `refuse`, or later.
        on_end: Called once, when both sides are gone.

    Attributes:
        refused: Why who came was sent away; empty: not.
        who: What is known of them, when they were.
        failed: Why the far side could not be opened, or that it ended first.
        leaving: One of them has said goodbye, or is gone.
    """

    def __init__(
        self,
        loop: Loop,
        peer: str,
        near: Opening[Stream],
        *,
        on_arrived: Callable[["Link"], None],
        on_end: Callable[["Link"], None],
    ) -> None:
        self._loop, self.peer = loop, peer
        self._on_arrived, self._on_end = on_arrived, on_end
        self._near, self._far = Side(), Side()
        self.leaving = self.peer_vanished = self._flows = self._ended = False
        self.refused = self.who = self.failed = ""
        self._opening: Opening[Stream] | None = near
        self._waits_on = -1
        self._timer = loop.later(OPEN_WITHIN_S, lambda: self._not_open(RefusedError(SILENT)))
        loop.soon(lambda: self._open(self._near, lambda: self._on_arrived(self)))

    @property
    def up_bytes(self) -> int:
        return self._near.moved

    @property
    def down_bytes(self) -> int:
        return self._far.moved

    def pump(self, far: Opening[Stream]) -> None:
        """Open the other side, then let the bytes flow."""
        self._opening = far
        self._timer = self._loop.later(OPEN_WITHIN_S, lambda: self._not_open(RefusedError(SILENT)))
        self._open(self._far, self._flow)

    def refuse(self, why: str, who: str = "") -> None:
        self.refused, self.who = why, who
        self.cut()

    def cut(self) -> None:
        self._stop_opening()
        for side in (self._near, self._far):
            self._close(side)
        self._finish()

    def look(self) -> None:
        """End it when a machine at one of its ends is gone: nothing else tells while bytes wait to be acknowledged."""
        for side in (self._near, self._far):
            if self._flows and side.stream is not None and has_vanished(side.stream.connection):
                self._lost(side, OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)))

    def _open(self, side: Side, then: Callable[[], None]) -> None:
        """Go on with the opening as far as it goes now."""
        opening = self._opening
        if opening is None:
            return
        self._wait_no_more()  # before what it waited for may be closed
        try:
            wait = next(opening)
        except StopIteration as done:
            self._stop_opening()
            side.stream = done.value
            then()
        except (OSError, RefusedError) as error:
            self._not_open(error)
        else:
            self._waits_on = wait.connection.fileno()
            self._loop.watch(self._waits_on, wait.events, lambda: self._open(side, then))

    def _stop_opening(self) -> None:
        self._timer.cancel()
        self._wait_no_more()
        opening, self._opening = self._opening, None
        if opening is not None:
            opening.close()

    def _wait_no_more(self) -> None:
        if self._waits_on >= 0:
            self._loop.forget(self._waits_on)
            self._waits_on = -1

    def _not_open(self, error: OSError | RefusedError) -> None:
        if self._near.stream is not None:
            self.failed = str(error)
            self.cut()
        elif isinstance(error, RefusedError):
            self.refuse(error.why, error.who)
        else:
            self.refuse(HUNG_UP)

    def _flow(self) -> None:
        self._flows = True
        for side in (self._near, self._far):
            self._watch(side)
            self._read(side)  # there may be more than the kernel knows of

    def _reads(self, side: Side) -> bool:
        other = self._other(side)
        return self._flows and not (side.ended or side.closes or other.left or other.stream is None)

    def _watch(self, side: Side) -> None:
        if side.stream is not None:
            events = (READ if self._reads(side) else 0) | (WRITE if side.left else 0)
            self._loop.watch(side.stream.connection.fileno(), events, lambda: self._ready(side))

    def _ready(self, side: Side) -> None:
        if side.left:
            self._write_rest(side)
        self._read(side)

    def _read(self, side: Side) -> None:
        if side.stream is None or not self._reads(side):
            return
        try:
            size = side.stream.recv_into(_BUFFER)
        except OSError as error:
            self._lost(side, error)
            return
        if size > 0:
            side.moved += size
            self._write(self._other(side), _BUFFER[:size])
            if side.stream is not None and side.stream.holds():
                self._loop.soon(partial(self._read, side))
        elif size != BLOCKED:
            self._half_closed(side)

    def _write(self, side: Side, data: memoryview) -> None:
        data = self._sent(side, data)
        if data:
            side.left = memoryview(bytes(data))
            self._watch(side)
            self._watch(self._other(side))

    def _write_rest(self, side: Side) -> None:
        side.left = self._sent(side, side.left)
        if not side.left and side.stream is not None:
            self._nothing_left(side)
            self._watch(side)
            self._watch(self._other(side))
            self._read(self._other(side))

    def _sent(self, side: Side, data: memoryview) -> memoryview:
        """Write what is possible and return the rest; nothing is the rest when the side breaks."""
        try:
            while data and side.stream is not None:
                size = side.stream.send(data)
                if size == BLOCKED:
                    return data
                data = data[size:]
        except OSError as error:
            self._lost(side, error)
        return data[:0]

    def _half_closed(self, side: Side) -> None:
        """One side will send no more: pass on what is left, and the end. The far side's end ends both."""
        if side is self._far and not self.leaving:
            self.failed = HUNG_UP
        self._leave_soon()
        side.ended = True
        self._watch(side)
        if side is self._near:
            self._far.ends_output = True
            self._nothing_left(self._far)
        else:
            self._close_after_rest(self._near, self._far)

    def _lost(self, side: Side, error: OSError) -> None:
        """One side broke. What has come from the far one still goes to the near one; the other way nobody waits."""
        if side is self._near and error.errno in _VANISHED:
            self.peer_vanished = True
        if side is self._far and not self.leaving:
            self.failed = str(error)
        self._leave_soon()
        self._close(side)
        if side is self._near:
            self._close(self._far)
        else:
            self._close_after_rest(self._near)
        self._finish()

    def _close_after_rest(self, *sides: Side) -> None:
        for side in sides:
            side.closes = True
            self._watch(side)
            self._nothing_left(side)

    def _nothing_left(self, side: Side) -> None:
        """Do what had to wait until the last byte for this side was written."""
        if side.left or side.stream is None:
            return
        if side.closes:
            self._close(side)
            self._finish()
        elif side.ends_output:
            side.ends_output = False
            try:
                side.stream.end()
            except OSError as error:
                self._lost(side, error)

    def _other(self, side: Side) -> Side:
        return self._far if side is self._near else self._near

    def _leave_soon(self) -> None:
        if not self.leaving:
            self.leaving = True
            self._timer = self._loop.later(LEAVE_WITHIN_S, self.cut)

    def _close(self, side: Side) -> None:
        stream, side.stream, side.left = side.stream, None, memoryview(b"")
        if stream is not None:
            self._loop.forget(stream.connection.fileno())
            stream.close()

    def _finish(self) -> None:
        if self._ended or self._opening is not None or any(each.stream for each in (self._near, self._far)):
            return
        self._ended = True
        self._timer.cancel()
        self._on_end(self)
