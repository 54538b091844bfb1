"""Asks a coordinator whether it serves."""

import asyncio
from pathlib import Path

from agent.engine_client import EngineProtocolError, Exchange, connect, request_bytes

_TIMEOUT_S = 0.5
_REQUEST = request_bytes("GET", "/health", {}, b"")


async def serves(socket: Path) -> bool:
    """Ask `/health` once. While a coordinator loads it answers 503, and before that not at all."""
    statuses: list[int] = []
    exchange = Exchange(_REQUEST, lambda status, _headers: statuses.append(status), lambda _body: None)
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            await connect(socket, exchange)
            await exchange.done
    except (OSError, TimeoutError, EngineProtocolError):
        return False  # not bound yet, gone, or too busy to say: ask again
    finally:
        exchange.abort()
    return statuses == [200]
