"""Sends one request to a pool and brings its stream back; before the first byte, a failure is tried again elsewhere."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Protocol

import structlog
from sollol.errors import Reason, Refusal, SollolError, refuse

from sollold.pools import Pools
from sollold.queues import Lease
from sollold.relay import RelayStream
from sollold.streams import EngineRequest, ProgressSink

if TYPE_CHECKING:
    from sollold.agent_link import AgentLink

log = structlog.get_logger(__name__)

MAX_ATTEMPTS = 3

# Failures of a pool, not of the request: before the first byte another pool may do better.
POOL_FAILED = frozenset(
    {
        Reason.ENGINE_DIED,
        Reason.ENGINE_STALLED,
        Reason.OUT_OF_MEMORY,
        Reason.AGENT_UNREACHABLE,
        Reason.AGENT_RESTARTING,
        Reason.INSTANCE_NOT_FOUND,
        Reason.INSTANCE_NOT_READY,
        Reason.STOPPED,
        Reason.STREAM_TRUNCATED,
    }
)


Explain = Callable[[str, Refusal], Awaitable[Refusal]]


class Relays(Protocol):
    """Where the streams of a node go; what `Nodes` is to this module."""

    def link(self, node_id: str) -> "AgentLink": ...


class ModelNames(Protocol):
    def canonical(self, name: str) -> str: ...


class RelayedStream:
    """An engine's response through agent and relay; holds one slot of its pool until closed. See `EngineStream`."""

    def __init__(
        self, relayed: RelayStream, lease: Lease, pools: Pools, *, explain: Explain, stall_timeout_s: float
    ) -> None:
        self.status = 0
        self.headers: Mapping[str, str] = {}
        self.model = lease.model
        self.node_id = lease.node_id
        self.instance_id = lease.instance_id
        self._relayed = relayed
        self._lease = lease
        self._pools, self._explain = pools, explain
        self._stall_timeout_s = stall_timeout_s
        self._first: bytes | None = None

    async def begin(self, timeout_s: float) -> None:
        """Wait for status, headers and the first bytes: until then nobody has seen anything of this attempt."""
        try:
            async with asyncio.timeout(timeout_s):
                self.status, self.headers = await self._relayed.response()
                self._first = await anext(aiter(self._relayed), b"")
        except TimeoutError as error:
            raise refuse(
                Reason.STREAM_STALLED,
                f"{self.instance_id} on {self.node_id} sent nothing for {timeout_s:.0f} s",
                retryable=True,
            ) from error

    async def __aiter__(self) -> AsyncIterator[bytes]:
        if self._first:
            yield self._first
        self._first = None
        self._relayed.limit_silence(self._stall_timeout_s)
        try:
            async for chunk in self._relayed:
                yield chunk
        except SollolError as error:
            if error.refusal.reason in POOL_FAILED:
                self._pools.doubt(self.instance_id)
                # The stream itself tells only that its engine has ended.
                raise SollolError(await self._explain(self.instance_id, error.refusal)) from error
            raise

    async def aclose(self) -> None:
        self._relayed.cancel()
        self._lease.release()


class Dispatch:
    """The head's way from a validated request to a stream of bytes.

    Args:
        explain: What is known of a pool's end, given what one of its streams says of it.
        waited: Told of a model and the seconds that a request has waited for a slot, also of one that left without.
    """

    def __init__(
        self,
        nodes: Relays,
        pools: Pools,
        catalogue: ModelNames,
        *,
        explain: Explain,
        waited: Callable[[str, float], None],
        first_byte_timeout_s: float,
        stall_timeout_s: float,
    ) -> None:
        self._nodes = nodes
        self._waited = waited
        self._explain = explain
        self._pools = pools
        self._catalogue = catalogue
        self._first_byte_timeout_s = first_byte_timeout_s
        self._stall_timeout_s = stall_timeout_s

    def limit(self, *, first_byte_timeout_s: float, stall_timeout_s: float) -> None:
        """For requests that are sent to an engine from now on."""
        self._first_byte_timeout_s = first_byte_timeout_s
        self._stall_timeout_s = stall_timeout_s

    async def open(
        self, request: EngineRequest, on_progress: ProgressSink, on_sent: Callable[[], None]
    ) -> RelayedStream:
        """See `sollold.streams.Dispatcher.open`."""
        model = self._catalogue.canonical(request.model)
        attempt = 1
        while True:
            # Not tried again when this fails: a load has already tried every node that is worth it.
            lease = await self._acquired(model, on_progress, request.asker)
            on_sent()
            try:
                return await self._begun(lease, request)
            except SollolError as error:
                if error.refusal.reason not in POOL_FAILED or attempt == MAX_ATTEMPTS:
                    raise
                log.warning("request_retried", model=model, attempt=attempt, why=str(error))
            attempt += 1

    async def _acquired(self, model: str, on_progress: ProgressSink, asker: str) -> Lease:
        began_s = time.monotonic()
        try:
            return await self._pools.acquire(model, on_progress, asker=asker)
        finally:
            self._waited(model, time.monotonic() - began_s)

    async def _begun(self, lease: Lease, request: EngineRequest) -> RelayedStream:
        """Return the stream of one attempt once its first bytes are here; gives the slot back in every other case."""
        stream: RelayedStream | None = None
        try:
            relay = self._nodes.link(lease.node_id).relay
            relayed = relay.open(
                lease.instance_id, "POST", request.path, {"content-type": "application/json"}, request.body
            )
            stream = RelayedStream(
                relayed, lease, self._pools, explain=self._explain, stall_timeout_s=self._stall_timeout_s
            )
            await stream.begin(self._first_byte_timeout_s)
        except BaseException as error:
            if isinstance(error, SollolError) and error.refusal.reason in POOL_FAILED:
                self._pools.doubt(lease.instance_id)
            if stream is not None:
                await stream.aclose()
            lease.release()
            raise
        return stream
