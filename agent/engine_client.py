"""One HTTP/1.1 request to an engine on its unix socket, without a task or a future per chunk.

The token path runs through here: a general client costs several times as much CPU per token (tests/bench/README.md).
Engines are our own children, yet limits are strict: a damaged response ends the stream and never grows memory.
"""

import asyncio
import socket
from collections.abc import Callable, Mapping
from pathlib import Path

MAX_HEAD_BYTES = 65536
MAX_LINE_BYTES = 1024
CONNECT_TIMEOUT_S = 5.0
_CONNECT_RETRY_S = 0.01
_HEX = b"0123456789abcdefABCDEF"
_NO_BODY = frozenset({204, 304})


class EngineProtocolError(Exception):
    """Raised when an engine's bytes are not a complete HTTP/1.1 response with a known length."""


class ResponseReader:
    """Takes an HTTP/1.1 response apart as its bytes arrive, wherever they are cut. Knows nothing of sockets.

    `status` is 0 until the head is complete; `complete` says that the body ended as its framing announced.
    A body that only the end of the connection would end is refused: it could not be told from a dead engine.
    """

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.complete = False
        self._held = b""  # an incomplete head or line; never body bytes
        self._left = 0  # bytes of the body or of the current chunk still to come
        self._step: Callable[[bytes, int], tuple[bytes, int]] = self._head

    def feed(self, data: bytes) -> bytes:
        """Return the body bytes in `data`, without framing.

        Raises:
            EngineProtocolError: the bytes are not HTTP, or over a limit.
        """
        if self._held:
            data = self._held + data
            self._held = b""
        body, position = self._step(data, 0)
        if position == len(data) or self.complete:
            return body
        pieces = [body]
        while not self.complete and position < len(data):
            body, position = self._step(data, position)
            pieces.append(body)
        return b"".join(pieces)

    def _hold(self, data: bytes, position: int, limit: int) -> tuple[bytes, int]:
        if len(data) - position > limit:
            raise EngineProtocolError(f"a head or line of more than {limit} bytes")
        self._held = data[position:]
        return b"", len(data)

    def _head(self, data: bytes, position: int) -> tuple[bytes, int]:
        end = data.find(b"\r\n\r\n", position)
        if end < 0:
            return self._hold(data, position, MAX_HEAD_BYTES)
        if end - position > MAX_HEAD_BYTES:
            raise EngineProtocolError(f"a head of more than {MAX_HEAD_BYTES} bytes")
        lines = data[position:end].decode("latin-1").split("\r\n")
        status = _status(lines[0])
        if status >= 200:  # 100 Continue and its like precede the real head
            self.headers = _headers(lines[1:])
            self._begin_body(status)
            self.status = status
        return b"", end + 4

    def _begin_body(self, status: int) -> None:
        length = self.headers.get("content-length")
        if status in _NO_BODY:
            self.complete = True
        elif self.headers.get("transfer-encoding", "").lower() == "chunked":
            if length is not None:
                raise EngineProtocolError("both Content-Length and chunked")
            self._step = self._chunk
        elif length is None or not (length.isascii() and length.isdigit() and len(length) < 19):
            raise EngineProtocolError(f"no usable length of the body ({length!r})")
        else:
            self._left = int(length)
            self.complete = self._left == 0
            self._step = self._counted

    def _counted(self, data: bytes, position: int) -> tuple[bytes, int]:
        body = data[position : position + self._left]
        self._left -= len(body)
        self.complete = self._left == 0
        return body, position + len(body)

    def _chunk(self, data: bytes, position: int) -> tuple[bytes, int]:
        start = data.find(b"\r\n", position, position + MAX_LINE_BYTES + 2)
        if start < 0:
            return self._hold(data, position, MAX_LINE_BYTES)
        size = _chunk_size(data[position:start])
        if size == 0:
            self._step = self._trailer
            return b"", start + 2
        end = start + 2 + size
        if data[end : end + 2] == b"\r\n":  # the usual case: a whole chunk at once
            return data[start + 2 : end], end + 2
        self._left = size
        self._step = self._chunk_rest
        return self._chunk_rest(data, start + 2)

    def _chunk_rest(self, data: bytes, position: int) -> tuple[bytes, int]:
        body = data[position : position + self._left]
        self._left -= len(body)
        if self._left == 0:
            self._step = self._chunk_end
        return body, position + len(body)

    def _chunk_end(self, data: bytes, position: int) -> tuple[bytes, int]:
        found = data[position : position + 2]
        if found == b"\r":
            return self._hold(data, position, 2)
        if found != b"\r\n":
            raise EngineProtocolError(f"{found!r} after a chunk")
        self._step = self._chunk
        return b"", position + 2

    def _trailer(self, data: bytes, position: int) -> tuple[bytes, int]:
        end = data.find(b"\r\n", position, position + MAX_LINE_BYTES + 2)
        if end < 0:
            return self._hold(data, position, MAX_LINE_BYTES)
        self.complete = end == position
        return b"", end + 2


def _status(line: str) -> int:
    version, _, rest = line.partition(" ")
    code = rest[:3]
    if version not in ("HTTP/1.1", "HTTP/1.0") or len(code) != 3 or not (code.isascii() and code.isdigit()):
        raise EngineProtocolError(f"not a status line: {line[:80]!r}")
    return int(code)


def _headers(lines: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in lines:
        name, colon, content = line.partition(":")
        if not colon or not name or name != name.strip():
            raise EngineProtocolError(f"not a header line: {line[:80]!r}")
        key = name.lower()
        if key in found and key in ("content-length", "transfer-encoding"):
            raise EngineProtocolError(f"{name} twice")
        found[key] = content.strip()
    return found


def _chunk_size(line: bytes) -> int:
    digits = line.partition(b";")[0].rstrip(b" \t")
    if not 0 < len(digits) <= 8 or digits.translate(None, _HEX):  # int() would take signs, 0x and underscores
        raise EngineProtocolError(f"not a chunk size: {line[:20]!r}")
    return int(digits, 16)


class Exchange(asyncio.Protocol):
    """One request and its response on a connection of their own.

    `on_head` is called once, then `on_body` per piece, from the event loop. `done` ends when the response is complete
    or was aborted, or with ConnectionError when the engine closed early, or EngineProtocolError; nothing is called
    after it.
    """

    def __init__(
        self,
        request: bytes,
        on_head: Callable[[int, dict[str, str]], None],
        on_body: Callable[[bytes], None],
    ) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = request
        self._on_head = on_head
        self._on_body = on_body
        self._reader = ResponseReader()
        self._transport: asyncio.Transport | None = None

    def pause(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def abort(self) -> None:
        """Close at once: the engine notices within milliseconds and frees the slot."""
        if self._transport is not None:
            self._transport.abort()
        if not self.done.done():
            self.done.set_result(None)
        elif not self.done.cancelled():
            self.done.exception()  # seen: nobody may be left to await it

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(self._request)
        self._request = b""

    def data_received(self, data: bytes) -> None:
        if self.done.done():
            return
        reader = self._reader
        headless = reader.status == 0
        try:
            body = reader.feed(data)
        except EngineProtocolError as error:
            self._finish(error)
            return
        if headless and reader.status:
            self._on_head(reader.status, reader.headers)
        if body:
            self._on_body(body)
        if reader.complete:
            self._finish(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._finish(ConnectionResetError(str(exc or "end of file")))

    def _finish(self, error: Exception | None) -> None:
        if not self.done.done():
            if error is None:
                self.done.set_result(None)
            else:
                self.done.set_exception(error)
        if self._transport is not None:
            self._transport.abort()


def authorization(key: str) -> dict[str, str]:
    """The headers that show an engine its key; none without one."""
    return {"Authorization": f"Bearer {key}"} if key else {}


def request_bytes(method: str, path: str, headers: Mapping[str, str], body: bytes) -> bytes:
    """Write an HTTP/1.1 request; the caller has checked method, path and headers for line breaks."""
    lines = [f"{method} {path} HTTP/1.1", "Host: engine", "Connection: close"]
    lines.extend(f"{name}: {content}" for name, content in headers.items())
    if body or method == "POST":
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


async def connect(path: Path, exchange: Exchange) -> None:
    """Connect `exchange` to the engine's socket; the request leaves at once.

    Raises:
        OSError: nothing listens there (TimeoutError: its queue of connections stayed full).
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            while True:
                try:
                    sock.connect(str(path))
                    break
                except BlockingIOError:  # the listener's backlog is full; the loop's own connect would misread this
                    await asyncio.sleep(_CONNECT_RETRY_S)
        await asyncio.get_running_loop().create_unix_connection(lambda: exchange, sock=sock)
    except BaseException:
        sock.close()
        raise
