"""Server-sent events, as far as the engine uses them: passing them on whole, and reading them. Pure."""

from enum import Enum, auto

from sollol.errors import Reason, refuse

DONE = b"[DONE]"

# The engine's frames are far smaller; what is larger than this is passed on, or refused, as it comes.
MAX_EVENT_BYTES = 4 << 20


class Ending(Enum):
    """How a stream of events ended."""

    DONE = auto()
    ERROR = auto()  # the engine's own error event was the last one
    TRUNCATED = auto()


class EventReader:
    """Splits bytes, cut anywhere, into the data of events. Comments, and fields other than data, are dropped."""

    def __init__(self) -> None:
        self._line: list[bytes] = []
        self._data: list[bytes] = []
        self._size = 0

    def feed(self, chunk: bytes) -> list[bytes]:
        """Return the data of every event that `chunk` completes."""
        first, *rest = chunk.split(b"\n")
        self._hold(first)
        events: list[bytes] = []
        for piece in rest:
            self._end_line(events)
            self._hold(piece)
        return events

    def _hold(self, piece: bytes) -> None:
        if piece:
            self._line.append(piece)
            self._size += len(piece)
            if self._size > MAX_EVENT_BYTES:
                raise refuse(Reason.INTERNAL, f"engine: an event of more than {MAX_EVENT_BYTES} bytes")

    def _end_line(self, events: list[bytes]) -> None:
        line = b"".join(self._line).removesuffix(b"\r")
        self._line.clear()
        if line.startswith(b"data:"):
            self._data.append(line[5:].removeprefix(b" "))
        elif not line:
            if self._data:
                events.append(b"\n".join(self._data))
            self._data.clear()
            self._size = 0


class Passage:
    """Passes a stream's bytes on in whole events, and tells at its end whether it was complete.

    Whole events, so that what follows a stream cut in mid-event is understood. An ordinary chunk is a whole event and
    costs two searches; nothing is parsed before the end.
    """

    def __init__(self) -> None:
        self._held = b""
        self._last = b""

    def feed(self, chunk: bytes) -> bytes:
        """Return what can be sent on: `chunk`, less an unfinished event at its end, after what was held before."""
        if self._held:
            chunk = self._held + chunk
            self._held = b""
        if not chunk.endswith(b"\n\n"):
            chunk = self._cut(chunk)
        if b"data:" in chunk:
            self._last = chunk
        return chunk

    def _cut(self, chunk: bytes) -> bytes:
        end = 0
        for blank in (b"\n\n", b"\r\n\r\n"):
            at = chunk.rfind(blank)
            if at >= 0:
                end = max(end, at + len(blank))
        if len(chunk) - end > MAX_EVENT_BYTES:
            return chunk
        self._held = chunk[end:]
        return chunk[:end]

    def finish(self) -> tuple[bytes, Ending]:
        """Say how the stream ended, and what of its rest is still to be sent on."""
        if self._held.strip() == b"data: " + DONE:
            return self._held.rstrip() + b"\n\n", Ending.DONE
        events = EventReader().feed(self._last)
        last = events[-1] if events else b""
        if last == DONE:
            return b"", Ending.DONE
        return b"", Ending.ERROR if last.startswith(b'{"error"') else Ending.TRUNCATED


def event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


def comment(text: str) -> bytes:
    """Return a comment: keeps a connection alive, shows to people who watch it, ignored by every client."""
    return b": " + text.replace("\r", " ").replace("\n", " ").encode() + b"\n\n"
