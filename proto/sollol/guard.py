"""Lets a call through when the certificate of its caller may make it, and says why not otherwise.

TLS has then proven that the certificate is one of our CA; who that is, and whether it still counts, is decided here at
each call, and again for those that run when our files change. Handshakes that fail before are known to gRPC's C core
only, which tells standard error.
"""

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import structlog

from sollol import certificates
from sollol.access import ACCESS
from sollol.certificates import Certificate
from sollol.channels import refusal_abort, write_whole
from sollol.errors import Reason, Refusal, SollolError, refuse
from sollol.identity import Role
from sollol.tls import TlsFiles, admitted

log = structlog.get_logger(__name__)

_PEM = "x509_pem_cert"
_NOBODY: frozenset[Role] = frozenset()


class Guard(grpc.aio.ServerInterceptor):
    """Checks every call against `access`, method by method; a method that it lacks is denied to everybody.

    Args:
        refused: Told the reason of each call that is refused.
    """

    def __init__(
        self,
        tls: TlsFiles,
        access: Mapping[str, frozenset[Role]] = ACCESS,
        *,
        refused: Callable[[Reason], None] = lambda _reason: None,
    ) -> None:
        self._tls = tls
        self._access = access
        self._refused = refused

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        return _wrapped(handler, functools.partial(self._admitted, handler_call_details.method))

    @asynccontextmanager
    async def _admitted(self, method: str, context: Any) -> AsyncIterator[None]:
        """Run the call inside, or end it with the reason; at once when its caller counts no more."""
        peer = await self._admit(method, context)
        task, why = asyncio.current_task(), []
        assert task is not None

        def end(refusal: Refusal) -> None:
            why.append(refusal)
            task.cancel()

        forget = self._tls.running.add(peer, end)
        try:
            yield
        except asyncio.CancelledError:
            if not why:
                raise
            task.uncancel()
            await refusal_abort(context, why[0])
        finally:
            forget()

    async def _admit(self, method: str, context: Any) -> Certificate:
        """Return who calls, or end the call with the reason."""
        try:
            peer = caller(context)
            identity = admitted(peer, self._tls.current(), now_s=time.time())
            if identity.role not in self._access.get(method, _NOBODY):
                raise refuse(Reason.WRONG_ROLE, f"{method} is not for {identity}")
        except SollolError as error:
            refusal = error.refusal
            log.warning(
                "peer_refused", reason=refusal.reason, message=refusal.message, method=method, peer=context.peer()
            )
            self._refused(refusal.reason)
            await refusal_abort(context, refusal)
        return peer


def caller(context: Any) -> Certificate:
    """What the caller shows; whether it counts is another question. Raises NO_CERTIFICATE."""
    shown = context.auth_context().get(_PEM)
    if not shown:
        raise refuse(Reason.NO_CERTIFICATE, "the caller has shown no certificate")
    return certificates.read(shown[0])


def _wrapped(handler: Any, admitted_to: Callable[[Any], AbstractAsyncContextManager[None]]) -> Any:
    """The same handler of the same kind, within `admitted_to` its context."""
    behaviour = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream

    async def answer(request: Any, context: Any) -> Any:
        async with admitted_to(context):
            return await behaviour(request, context)

    async def stream(request: Any, context: Any) -> None:
        async with admitted_to(context):
            given = behaviour(request, context)
            if hasattr(given, "__aiter__"):
                async with aclosing(given):
                    async for response in given:
                        await write_whole(context, response)
            else:
                await given

    kinds: dict[tuple[bool, bool], tuple[Any, Any]] = {
        (False, False): (grpc.unary_unary_rpc_method_handler, answer),
        (False, True): (grpc.unary_stream_rpc_method_handler, stream),
        (True, False): (grpc.stream_unary_rpc_method_handler, answer),
        (True, True): (grpc.stream_stream_rpc_method_handler, stream),
    }
    make, guarded = kinds[handler.request_streaming, handler.response_streaming]
    return make(guarded, handler.request_deserializer, handler.response_serializer)
