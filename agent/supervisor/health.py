"""Asks a coordinator whether it serves."""

import asyncio
from pathlib import Path

from agent.engine_client import EngineProtocolError, Exchange, connect, request_bytes

_TIMEOUT_S = 0.5
_REQUEST = request_bytes("GET", "/health", {}, b"")


async def health(socket: Path) -> int | None:
    """Ask `/health` once: 200 when it serves, 503 while it loads, None before it listens and when it is too busy."""
    statuses: list[int] = []
    exchange = Exchange(_REQUEST, lambda status, _headers: statuses.append(status), lambda _body: None)
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            await connect(socket, exchange)
            await exchange.done
    except (OSError, TimeoutError, EngineProtocolError):
        return None  # ask again
    finally:
        exchange.abort()
    return statuses[0] if statuses else None
