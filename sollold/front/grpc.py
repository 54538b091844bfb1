"""`InferenceService`: the same requests as over HTTP, typed, for users' stubs. A gRPC edge."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any, TypeAlias, TypeVar

import grpc
import msgspec
import structlog
from sollol import wire
from sollol.channels import refusal_abort
from sollol.errors import Reason, Refusal, SollolError, refuse
from sollol.inference import Message, Piece, Progress, Sampling, Usage
from sollol.v1 import inference_pb2 as pb
from sollol.v1 import inference_pb2_grpc as rpc

from sollold.admission import ANYBODY, Admission, Caller
from sollold.front import requests
from sollold.front.assemble import frame_of, piece_of
from sollold.front.authorization import bearer
from sollold.front.opening import ProgressBoard, opened, refuse_engine_error
from sollold.front.sse import EventReader
from sollold.streams import Catalogue, Dispatcher, EngineStream

log = structlog.get_logger(__name__)

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
R = TypeVar("R", pb.ChatResponse, pb.CompleteResponse)


class InferenceService(rpc.InferenceServiceServicer):
    """Users' calls; refusals end a call with a status and the refusal in its trailers."""

    def __init__(self, dispatcher: Dispatcher, catalogue: Catalogue, admission: Admission) -> None:
        self._dispatcher = dispatcher
        self._catalogue = catalogue
        self._admission = admission

    async def Chat(self, request: pb.ChatRequest, context: Context) -> AsyncIterator[pb.ChatResponse]:
        async with _aborting(context):
            caller = self._caller(context)
            body = {
                "model": request.model,
                "messages": [msgspec.to_builtins(wire.value(Message, message)) for message in request.messages],
                **_sampling(request.sampling),
            }
            asked = requests.chat(body)
            async with contextlib.aclosing(self._events(asked, caller)) as events:
                async for event in events:
                    yield _response(pb.ChatResponse, event)

    async def Complete(self, request: pb.CompleteRequest, context: Context) -> AsyncIterator[pb.CompleteResponse]:
        async with _aborting(context):
            caller = self._caller(context)
            asked = requests.completion(
                {"model": request.model, "prompt": request.prompt, **_sampling(request.sampling)}
            )
            async with contextlib.aclosing(self._events(asked, caller)) as events:
                async for event in events:
                    yield _response(pb.CompleteResponse, event)

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        response = pb.ListModelsResponse()
        async with _aborting(context):
            for model in self._admission.visible(self._caller(context), self._catalogue.models()):
                wire.fill(response.models.add(), model)
        return response

    def _caller(self, context: Context) -> Caller:
        """Who calls: by certificate, which the server has checked, else by key.

        Raises:
            SollolError: see `Admission.authenticate`.
        """
        if context.auth_context().get("transport_security_type") == [b"ssl"]:
            return ANYBODY
        sent = {name: value for name, value in context.invocation_metadata() or () if isinstance(value, str)}
        return self._admission.authenticate(bearer(sent.get("authorization")) or sent.get("x-api-key"))

    async def _events(self, asked: requests.Asked, caller: Caller) -> AsyncGenerator[Progress | Piece, None]:
        """Yield what the request waits for, then what the engine says."""
        permit = self._admission.permit(caller, asked.engine.model)
        board = ProgressBoard()
        async with opened(self._dispatcher, asked.engine, board, permit) as opening:
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


def _response(kind: Callable[..., R], event: Progress | Piece) -> R:
    if isinstance(event, Progress):
        return kind(progress=wire.fill(pb.Progress(), event))
    piece = pb.Piece(text=event.text, reasoning=event.reasoning, finish_reason=event.finish_reason)
    if event.usage is not None:
        wire.fill(piece.usage, event.usage)
    return kind(piece=piece)


def _sampling(message: pb.Sampling) -> dict[str, Any]:
    """Return the request's fields that were set; `requests` checks them as it does HTTP's."""
    sampling = msgspec.to_builtins(wire.value(Sampling, message))
    return {name: list(value) if name == "stop" else value for name, value in sampling.items() if value is not None}


@contextlib.asynccontextmanager
async def _aborting(context: Context) -> AsyncIterator[None]:
    """End the call with the status of a SollolError; anything else is a bug: logged, INTERNAL to the user."""
    try:
        yield
    except SollolError as error:
        await refusal_abort(context, error.refusal)
    except (asyncio.CancelledError, grpc.aio.AbortError):
        raise
    except Exception:
        log.exception("call_failed_unexpectedly")
        await refusal_abort(context, Refusal(reason=Reason.INTERNAL, message="the head failed; see its log"))
