"""Asks a coordinator whether it serves, and what it does."""

import asyncio
from pathlib import Path
from typing import NamedTuple

from agent.engine_client import EngineProtocolError, Exchange, authorization, connect, request_bytes

_TIMEOUT_S = 0.5


class Answer(NamedTuple):
    status: int
    body: bytes


async def ask(socket: Path, path: str, key: str = "") -> Answer | None:
    """GET `path` once, with the engine's key when it has one.

    None before it listens, and when it is too busy to answer within half a second.
    """
    statuses: list[int] = []
    pieces: list[bytes] = []
    request = request_bytes("GET", path, authorization(key), b"")
    exchange = Exchange(request, lambda status, _headers: statuses.append(status), pieces.append)
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            await connect(socket, exchange)
            await exchange.done
    except (OSError, TimeoutError, EngineProtocolError):
        return None  # ask again
    finally:
        exchange.abort()
    return Answer(statuses[0], b"".join(pieces)) if statuses else None


async def health(socket: Path) -> int | None:
    """Ask `/health` once: 200 when it serves, 503 while it loads, None as in `ask`."""
    answer = await ask(socket, "/health")
    return answer.status if answer is not None else None
