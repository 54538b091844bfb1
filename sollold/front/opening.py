"""Waiting for a stream to open, and letting go of it whatever happens: shared by HTTP and gRPC."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import structlog

from sollold.admission import Permit
from sollold.front.metering import open_metered
from sollold.front.openai import read_engine_error
from sollold.metrics import Account
from sollold.streams import Dispatcher, EngineRequest, EngineStream, Progress

log = structlog.get_logger(__name__)

_LET_GO_WITHIN_S = 5
_MAX_ERROR_BYTES = 1 << 20


class ProgressBoard:
    """The newest thing known about what a request waits for."""

    def __init__(self) -> None:
        self.latest: Progress | None = None
        self.changed = asyncio.Event()

    def note(self, progress: Progress) -> None:
        self.latest = progress
        self.changed.set()

    def text(self) -> str:
        if self.latest is None:
            return "waiting"
        percent = f" {self.latest.percent:.0f}%" if self.latest.state == "loading" else ""
        node = f" on {self.latest.node_id}" if self.latest.node_id else ""
        nodes = ", ".join(f"{each.node_id} {each.percent:.0f}%" for each in self.latest.nodes)
        return f"{self.latest.state}{percent}{node}{f' ({nodes})' if nodes else ''}"


@asynccontextmanager
async def opened(
    dispatcher: Dispatcher, request: EngineRequest, board: ProgressBoard, permit: Permit, account: Account
) -> AsyncIterator[asyncio.Task[EngineStream]]:
    """Yield the task that opens the stream; on leaving it is cancelled, or what it opened is closed.

    The permit is released then, too.
    """
    request = replace(request, asker=permit.asker)
    opening = asyncio.create_task(open_metered(dispatcher, request, board.note, permit, account), name="open_stream")
    try:
        yield opening
    finally:
        try:
            await _let_go(opening)
        finally:
            permit.release()


async def _let_go(opening: asyncio.Task[EngineStream]) -> None:
    if not opening.done():
        opening.cancel()
        await asyncio.wait({opening}, timeout=_LET_GO_WITHIN_S)
    if not opening.done():
        log.error("stream_opening_stuck", after_s=_LET_GO_WITHIN_S)
    elif not opening.cancelled() and opening.exception() is None:
        # It may have opened in the very moment of the cancellation.
        await asyncio.wait_for(opening.result().aclose(), _LET_GO_WITHIN_S)


async def refuse_engine_error(stream: EngineStream) -> None:
    """Return when the engine accepted the request.

    Raises:
        SollolError: what its HTTP error means to the user.
    """
    if stream.status < 400:
        return
    body = b""
    async for chunk in stream:
        body += chunk
        if len(body) > _MAX_ERROR_BYTES:
            break
    raise read_engine_error(stream.status, body)
