"""The last lines of an engine's log, and new ones as they come. Any bytes are text here; memory is bounded."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

MAX_LINES = 10_000
MAX_LINE_CHARS = 8192
_TAIL_BYTES = 1_048_576
_READ_BYTES = 262_144
_POLL_S = 0.2


async def tail(path: Path, lines: int, *, unfinished: bool) -> tuple[tuple[str, ...], int]:
    """Return the last `lines` lines, and the offset behind them. A file that is not there yet is empty.

    With `unfinished`, a last line without a line end counts too; `follow` would repeat it.
    """
    return await asyncio.to_thread(_tail, path, min(lines, MAX_LINES), unfinished)


def _tail(path: Path, lines: int, unfinished: bool) -> tuple[tuple[str, ...], int]:
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            start = max(0, size - _TAIL_BYTES)
            file.seek(start)
            data = file.read(size - start)
    except FileNotFoundError:
        return (), 0
    *found, rest = data.split(b"\n")
    offset = start + len(data) - len(rest)
    if start > 0:
        found = found[1:]  # its beginning is cut off
    if unfinished and rest:
        found.append(rest)
    return tuple(map(_text, found[len(found) - min(lines, len(found)) :])), offset


async def follow(path: Path, offset: int, *, ended: Callable[[], bool]) -> AsyncIterator[tuple[str, ...]]:
    """Yield the lines written after `offset`, a batch at a time, until `ended` is true and nothing more comes."""
    rest = b""
    while True:
        last_round = ended()
        data, offset = await asyncio.to_thread(_read, path, offset)
        lines = (rest + data).split(b"\n")
        rest = lines.pop()
        if len(rest) > _READ_BYTES or (last_round and not data and rest):
            lines.append(rest)
            rest = b""
        if lines:
            yield tuple(map(_text, lines))
        if last_round and not data:
            return
        if not data:
            await asyncio.sleep(_POLL_S)


def _read(path: Path, offset: int) -> tuple[bytes, int]:
    try:
        with path.open("rb") as file:
            if file.seek(0, 2) < offset:  # started anew
                offset = 0
            file.seek(offset)
            data = file.read(_READ_BYTES)
    except FileNotFoundError:
        return b"", 0
    return data, offset + len(data)


def _text(line: bytes) -> str:
    return line.removesuffix(b"\r").decode("utf-8", "replace")[:MAX_LINE_CHARS]
