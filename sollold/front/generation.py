"""What a request waits for and what the engine then says, as values: shared by gRPC and MQTT."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator

from sollol.errors import Reason, refuse
from sollol.inference import Piece, Progress, Usage

from sollold.admission import Permit
from sollold.front.assemble import frame_of, piece_of
from sollold.front.opening import ProgressBoard, opened, refuse_engine_error
from sollold.front.sse import EventReader
from sollold.metrics import Account
from sollold.streams import Dispatcher, EngineRequest, EngineStream


async def generated(
    dispatcher: Dispatcher, request: EngineRequest, permit: Permit, account: Account
) -> AsyncGenerator[Progress | Piece, None]:
    """Yield what the request waits for, then what the engine says; close it to let go of both.

    Raises:
        SollolError: refused, failed, or cut short.
    """
    board = ProgressBoard()
    async with opened(dispatcher, request, board, permit, account) as opening:
        async with contextlib.aclosing(_progress(opening, board)) as steps:
            async for progress in steps:
                yield progress
        stream = opening.result()
        await refuse_engine_error(stream)
        async with contextlib.aclosing(_pieces(stream)) as pieces:
            async for piece in pieces:
                yield piece


async def _progress(opening: asyncio.Task[EngineStream], board: ProgressBoard) -> AsyncGenerator[Progress, None]:
    """Yield each change, newest only, until the stream is open or refused."""
    opening.add_done_callback(lambda _: board.changed.set())
    while not opening.done():
        await board.changed.wait()
        board.changed.clear()
        if board.latest is not None and not opening.done():
            yield board.latest


async def _pieces(stream: EngineStream) -> AsyncGenerator[Piece, None]:
    """Yield one piece per chunk of the stream: under load many frames come in one chunk, and leave in one message."""
    reader = EventReader()
    finished = done = False
    async for chunk in stream:
        merged: list[Piece] = []
        for data in reader.feed(chunk):
            frame = frame_of(data)
            if frame is None:
                done = True
            else:
                merged.append(piece_of(frame))
        piece = merge(merged)
        finished = finished or bool(piece.finish_reason)
        if piece != Piece():
            yield piece
    if not (finished and done):
        raise refuse(
            Reason.STREAM_TRUNCATED,
            f"the engine of {stream.instance_id} on {stream.node_id} ended its answer early; ask again",
            retryable=True,
        )


def merge(pieces: list[Piece]) -> Piece:
    """Return one piece that says what `pieces` say in sequence."""
    usage: Usage | None = None
    finish_reason = ""
    for piece in pieces:
        usage = piece.usage or usage
        finish_reason = piece.finish_reason or finish_reason
    return Piece(
        text="".join(piece.text for piece in pieces),
        reasoning="".join(piece.reasoning for piece in pieces),
        finish_reason=finish_reason,
        usage=usage,
    )
