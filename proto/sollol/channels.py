"""gRPC channels and servers as head and agents use them, and refusals that travel as gRPC status.

The options were measured together: both sides ping a silent peer, so a vanished machine is noticed within about 8 s,
and the server allows the pings it asks for.
"""

import asyncio
from collections.abc import Sequence
from typing import Any, NoReturn

import grpc
import grpc.aio
import msgspec
from google.protobuf.message import DecodeError

from sollol import wire
from sollol.errors import SURFACES, Reason, Refusal, Retry
from sollol.identity import Role, role_name
from sollol.tls import Material, TlsFiles
from sollol.v1 import common_pb2

MAX_MESSAGE_BYTES = 64 << 20
REASON_KEY = "sollol-reason"
REFUSAL_KEY = "sollol-refusal-bin"
# A trailer beyond the peer's limit (8 KiB by default) would turn the refusal into a bare RESOURCE_EXHAUSTED.
_MAX_MESSAGE_CHARS = 1024
_MAX_REFUSAL_BYTES = 3072

_KEEPALIVE = (
    ("grpc.keepalive_time_ms", 5000),
    ("grpc.keepalive_timeout_ms", 3000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
)
CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    *_KEEPALIVE,
    # A dial is given up after 3 s, and a node that came back is found within 2 s.
    ("grpc.min_reconnect_backoff_ms", 3000),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2000),
    # Channels to one address must not share a connection: a closed channel takes its streams with it.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
)
SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    *_KEEPALIVE,
    # Two daemons on one port would each get half the calls: the second must fail to bind instead.
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1000),
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
    ("grpc.http2.max_ping_strikes", 0),
)

_UNREACHABLE = frozenset(
    {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED},
)
# The details of the INTERNAL that grpc.aio itself makes of a write on a call whose connection has just been lost.
_LOST_WHILE_WRITING = "Internal error from Core"
_TAKEN_WITHIN_S = 1.0


def open_channel(
    address: str, material: Material | None = None, *, name: str = role_name(Role.AGENT)
) -> grpc.aio.Channel:
    """Return a channel to `address` (`host:port` or `unix:PATH`); it dials on first use and redials by itself.

    Args:
        address: Where to.
        material: Our certificate; None for plaintext. A channel does not follow files: its owner opens another one.
        name: Who must answer: `role_name` of any peer of a role, or an identity's `dns_name`.
    """
    if material is None:
        return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
    credentials = grpc.ssl_channel_credentials(material.ca, material.key, material.chain)
    options = (*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", name))
    return grpc.aio.secure_channel(address, credentials, options=options)


def new_server(interceptors: Sequence[Any] = ()) -> grpc.aio.Server:
    """Return a server without ports or services; the caller adds both, and awaits `stop(grace)`."""
    return grpc.aio.server(options=SERVER_OPTIONS, interceptors=tuple(interceptors))


def bind(server: grpc.aio.Server, address: str, tls: TlsFiles | None) -> int:
    """Have the server listen on `address` once it starts: with certificates only, or, without `tls`, in plaintext.

    Raises:
        RuntimeError: the address cannot be listened on.
    """
    if tls is None:
        return server.add_insecure_port(address)
    return server.add_secure_port(address, server_credentials(tls))


def server_credentials(tls: TlsFiles) -> grpc.ServerCredentials:
    """Every client shows a certificate of our CA. Each handshake is made with the files as they then are."""
    told = tls.current()

    def changed() -> grpc.ServerCertificateConfiguration | None:
        nonlocal told
        material = tls.current()
        if material is told:
            return None
        told = material
        return _configuration(material)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(told),
        changed,  # type: ignore[arg-type]  # None means "unchanged", says gRPC's documentation
        require_client_authentication=True,
    )


def _configuration(material: Material) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(material.key, material.chain)], material.ca)


async def write_whole(context: Any, message: Any) -> None:
    """Write to a call that may be aborted while we write: gRPC takes no status before it has taken the message.

    A cancellation waits for that, but no longer than a moment for a peer that does not read.
    """
    writing = asyncio.ensure_future(context.write(message))
    try:
        await asyncio.shield(writing)
    except asyncio.CancelledError:
        await asyncio.wait({writing}, timeout=_TAKEN_WITHIN_S)
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)  # what it has to say is of no interest any more
        raise


async def refusal_abort(context: Any, refusal: Refusal) -> NoReturn:
    """End the call with the gRPC status of the refusal's reason, and the refusal itself in the trailers."""
    status = grpc.StatusCode[SURFACES[refusal.reason].grpc_status]
    message = refusal.message[:_MAX_MESSAGE_CHARS]
    trailers = ((REASON_KEY, refusal.reason.value), (REFUSAL_KEY, _small(refusal)))
    await context.abort(status, message, trailers)
    raise AssertionError("abort returned")


def _small(refusal: Refusal) -> bytes:
    """Serialize, leaving out the oldest log lines until it fits into a trailer."""
    message = refusal.message[:_MAX_MESSAGE_CHARS]
    lines = tuple(line[:_MAX_MESSAGE_CHARS] for line in refusal.log_lines)
    while True:
        shorter = msgspec.structs.replace(refusal, message=message, log_lines=lines)
        data = wire.fill(common_pb2.Refusal(), shorter).SerializeToString()
        if len(data) <= _MAX_REFUSAL_BYTES or not lines:
            return data
        lines = lines[(len(lines) + 1) // 2 :]


def refusal_of(error: grpc.aio.AioRpcError, peer: str = "the agent") -> Refusal:
    """Return the refusal that a peer sent with a failed call, or what the bare transport error means.

    Args:
        error: What the call raised.
        peer: Who was called, for the message when the error is the transport's.
    """
    sent = next((data for key, data in error.trailing_metadata() or () if key == REFUSAL_KEY), None)
    if isinstance(sent, bytes):
        try:
            return wire.value(Refusal, common_pb2.Refusal.FromString(sent))
        except (DecodeError, msgspec.ValidationError):
            return _newer_refusal(error, sent, peer)
    code, details = error.code(), error.details() or "no details"
    if code in _UNREACHABLE or details == _LOST_WHILE_WRITING:
        return unreachable(f"{peer} cannot be reached ({code.name}: {details})")
    return Refusal(reason=Reason.INTERNAL, message=f"{peer} failed ({code.name}: {details}); see its log")


def _newer_refusal(error: grpc.aio.AioRpcError, sent: bytes, peer: str) -> Refusal:
    """What can be said of a refusal whose reason is newer than we are: its name, its words, and whether to try on."""
    reason = next((data for key, data in error.trailing_metadata() or () if key == REASON_KEY), "an unknown reason")
    try:
        retryable = common_pb2.Refusal.FromString(sent).retry == common_pb2.RETRY_RETRYABLE
    except DecodeError:
        retryable = False
    message = f"{peer} refused with {str(reason)[:64]!a}, which this version does not know: {error.details() or ''}"
    return Refusal(reason=Reason.INTERNAL, message=message, retry=Retry.RETRYABLE if retryable else Retry.FATAL)


def unreachable(message: str) -> Refusal:
    """Return what callers get when the connection to a peer is gone; another node is worth asking."""
    return Refusal(reason=Reason.AGENT_UNREACHABLE, message=message, retry=Retry.RETRYABLE)
