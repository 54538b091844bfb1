"""Asks a coordinator whether it serves."""

from pathlib import Path
from types import TracebackType
from typing import Self

import aiohttp

_TIMEOUT_S = 0.5


class Health:
    """An open line to one coordinator's `/health`. While it loads it answers 503, and before that not at all."""

    def __init__(self, socket: Path) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(path=str(socket)),
            timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def serves(self) -> bool:
        try:
            async with self._session.get("http://engine/health") as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False  # not bound yet, gone, or too busy to say: ask again
