"""What a machine that joins and the one that invited it say to each other: one line of JSON each way, over TLS."""

import asyncio
from typing import Any, Generic, TypeVar

import msgspec
from msgspec import Struct
from sollol.errors import Reason, Refusal, refuse

MOST_BYTES = 64 << 10
WITHIN_S = 10.0
SERVER_NAME = "join.sollol"

T = TypeVar("T")


class Hello(Struct, frozen=True, kw_only=True, tag="hello"):
    """Asked over a connection that nobody has verified yet."""


class Join(Struct, frozen=True, kw_only=True, tag="join"):
    """`request` is a signing request, PEM; the key stays where it was made. `node_id` may be empty."""

    secret: bytes
    request: str
    node_id: str


class Answer(Struct, frozen=True, kw_only=True):
    """To `Hello`: `authority` (PEM). To `Join`: the rest, or a refusal.

    Attributes:
        ca: Every authority to trust, PEM.
        host: The address at which this machine was seen.
        redis_url: The cluster's registry.
    """

    authority: str = ""
    cluster: str = ""
    role: str = ""
    node_id: str = ""
    certificate: str = ""
    ca: str = ""
    host: str = ""
    redis_url: str = ""
    refusal: Refusal | None = None


async def read_question(reader: asyncio.StreamReader) -> Hello | Join:
    """Raises as `read_answer`."""
    return _QUESTION.decode(await _line(reader))


async def read_answer(reader: asyncio.StreamReader) -> Answer:
    """Raises INVALID_REQUEST: nothing, too much, or something else came. Waits no longer than `WITHIN_S`."""
    return _ANSWER.decode(await _line(reader))


class _Decoder(Generic[T]):
    def __init__(self, kind: Any) -> None:
        self._decoder: msgspec.json.Decoder[T] = msgspec.json.Decoder(kind)

    def decode(self, line: bytes) -> T:
        try:
            return self._decoder.decode(line)
        except msgspec.MsgspecError as error:
            raise refuse(Reason.INVALID_REQUEST, f"what came is not what SOLLOL sends: {error}") from error


_QUESTION: _Decoder[Hello | Join] = _Decoder(Hello | Join)
_ANSWER: _Decoder[Answer] = _Decoder(Answer)


async def _line(reader: asyncio.StreamReader) -> bytes:
    try:
        async with asyncio.timeout(WITHIN_S):
            return await reader.readuntil(b"\n")
    except TimeoutError as error:
        raise refuse(Reason.INVALID_REQUEST, f"nothing came within {WITHIN_S:.0f} s") from error
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
        raise refuse(Reason.INVALID_REQUEST, f"what came is not what SOLLOL sends: {error}") from error


async def write_line(writer: asyncio.StreamWriter, message: Struct) -> None:
    async with asyncio.timeout(WITHIN_S):
        writer.write(msgspec.json.encode(message) + b"\n")
        await writer.drain()
