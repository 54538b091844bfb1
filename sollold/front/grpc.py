"""`InferenceService`: the same requests as over HTTP, typed, for users' stubs. A gRPC edge."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any, TypeAlias, TypeVar

import grpc
import msgspec
import structlog
from sollol import wire
from sollol.channels import refusal_abort
from sollol.errors import Reason, Refusal, SollolError
from sollol.inference import Message, Piece, Progress, Sampling
from sollol.v1 import inference_pb2 as pb
from sollol.v1 import inference_pb2_grpc as rpc

from sollold.admission import Admission, Caller
from sollold.front import requests
from sollold.front.authorization import bearer
from sollold.front.generation import generated
from sollold.metrics import Account, Metrics
from sollold.streams import Catalogue, Dispatcher

log = structlog.get_logger(__name__)

_METADATA = "metadata, `authorization: Bearer KEY` or `x-api-key: KEY`"

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
R = TypeVar("R", pb.ChatResponse, pb.CompleteResponse)


class InferenceService(rpc.InferenceServiceServicer):
    """Users' calls; refusals end a call with a status and the refusal in its trailers."""

    def __init__(self, dispatcher: Dispatcher, catalogue: Catalogue, admission: Admission, metrics: Metrics) -> None:
        self._dispatcher = dispatcher
        self._catalogue = catalogue
        self._admission = admission
        self._metrics = metrics

    async def Chat(self, request: pb.ChatRequest, context: Context) -> AsyncIterator[pb.ChatResponse]:
        async with _answering(context, "Chat") as noted:
            with self._metrics.requested("grpc") as account:
                caller = self._caller(context, noted)
                body = {
                    "model": request.model,
                    "messages": [msgspec.to_builtins(wire.value(Message, message)) for message in request.messages],
                    **_sampling(request.sampling),
                }
                async with contextlib.aclosing(self._events(requests.chat(body), caller, account)) as events:
                    async for event in events:
                        yield _response(pb.ChatResponse, event)

    async def Complete(self, request: pb.CompleteRequest, context: Context) -> AsyncIterator[pb.CompleteResponse]:
        async with _answering(context, "Complete") as noted:
            with self._metrics.requested("grpc") as account:
                caller = self._caller(context, noted)
                body = {"model": request.model, "prompt": request.prompt, **_sampling(request.sampling)}
                async with contextlib.aclosing(self._events(requests.completion(body), caller, account)) as events:
                    async for event in events:
                        yield _response(pb.CompleteResponse, event)

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        response = pb.ListModelsResponse()
        async with _answering(context, "ListModels") as noted:
            for model in self._admission.visible(self._caller(context, noted), self._catalogue.models()):
                wire.fill(response.models.add(), model)
        return response

    def _caller(self, context: Context, noted: dict[str, str]) -> Caller:
        """Who calls: by certificate, which the server has checked, else by key; a key's name is noted.

        Raises:
            SollolError: see `Admission.authenticate`.
        """
        shown = context.auth_context()
        if shown.get("transport_security_type") == [b"ssl"]:
            return Caller(b" ".join(shown.get("x509_subject_alternative_name", ())).decode())
        sent = {name: value for name, value in context.invocation_metadata() or () if isinstance(value, str)}
        token = bearer(sent.get("authorization")) or sent.get("x-api-key")
        caller = self._admission.authenticate(token, sent_as=_METADATA)
        if caller.name:
            noted["key_name"] = caller.name
        return caller

    def _events(
        self, asked: requests.Asked, caller: Caller, account: Account
    ) -> AsyncGenerator[Progress | Piece, None]:
        account.model = asked.engine.model
        permit = self._admission.permit(caller, asked.engine.model)
        return generated(self._dispatcher, asked.engine, permit, account)


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
async def _answering(context: Context, method: str) -> AsyncIterator[dict[str, str]]:
    """End the call with the status of a SollolError; anything else is a bug: logged, INTERNAL to the user.

    Writes one line when it has ended, with what is put into the value.
    """
    started, noted = time.monotonic(), dict[str, str]()
    try:
        async with _aborting(context, noted):
            yield noted
    finally:
        log.info("request_ended", method="gRPC", path=method, took_s=round(time.monotonic() - started, 4), **noted)


@contextlib.asynccontextmanager
async def _aborting(context: Context, noted: dict[str, str]) -> AsyncIterator[None]:
    try:
        yield
    except SollolError as error:
        noted["reason"] = error.refusal.reason
        await refusal_abort(context, error.refusal)
    except (asyncio.CancelledError, GeneratorExit):
        noted["reason"] = Reason.CANCELLED
        raise
    except grpc.aio.AbortError:
        raise
    except Exception:
        noted["reason"] = Reason.INTERNAL
        log.exception("call_failed_unexpectedly")
        await refusal_abort(context, Refusal(reason=Reason.INTERNAL, message="the head failed; see its log"))
