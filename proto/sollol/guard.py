"""Lets a call through when the certificate of its caller may make it, and says why not otherwise.

TLS has then proven that the certificate is one of our CA; who that is, and whether it still counts, is decided here at
each call. Handshakes that fail before are known to gRPC's C core only, which tells standard error.
"""

import functools
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import grpc
import grpc.aio
import structlog

from sollol import certificates
from sollol.access import ACCESS
from sollol.channels import refusal_abort
from sollol.errors import Reason, SollolError, refuse
from sollol.identity import Identity, Role
from sollol.tls import TlsFiles, admitted

log = structlog.get_logger(__name__)

_PEM = "x509_pem_cert"
_NOBODY: frozenset[Role] = frozenset()


class Guard(grpc.aio.ServerInterceptor):
    """Checks every call against `access`, method by method; a method that it lacks is denied to everybody."""

    def __init__(self, tls: TlsFiles, access: Mapping[str, frozenset[Role]] = ACCESS) -> None:
        self._tls = tls
        self._access = access

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        return _wrapped(handler, functools.partial(self._admit, method))

    async def _admit(self, method: str, context: Any) -> None:
        """Return, or end the call with the reason."""
        try:
            identity = caller(context, self._tls)
            if identity.role not in self._access.get(method, _NOBODY):
                raise refuse(Reason.WRONG_ROLE, f"{method} is not for {identity}")
        except SollolError as error:
            refusal = error.refusal
            log.warning(
                "peer_refused", reason=refusal.reason, message=refusal.message, method=method, peer=context.peer()
            )
            await refusal_abort(context, refusal)


def caller(context: Any, tls: TlsFiles) -> Identity:
    """Who makes a call.

    Raises:
        SollolError: as `admitted`, or NO_CERTIFICATE.
    """
    shown = context.auth_context().get(_PEM)
    if not shown:
        raise refuse(Reason.NO_CERTIFICATE, "the caller has shown no certificate")
    return admitted(certificates.read(shown[0]), tls.current(), now_s=time.time())


def _wrapped(handler: Any, admit: Callable[[Any], Awaitable[None]]) -> Any:
    """The same handler of the same kind, behind `admit`."""
    behaviour = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream

    async def answer(request: Any, context: Any) -> Any:
        await admit(context)
        return await behaviour(request, context)

    async def stream(request: Any, context: Any) -> None:
        await admit(context)
        given = behaviour(request, context)
        if hasattr(given, "__aiter__"):
            async for response in given:
                await context.write(response)
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
