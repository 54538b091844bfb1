"""The head's gRPC server: users' and operators' services beside the standard health service."""

import asyncio
import contextlib
from collections.abc import Callable

from grpc_health.v1 import health, health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from sollol.channels import bind, new_server
from sollol.errors import Reason
from sollol.guard import Guard
from sollol.tls import TlsFiles
from sollol.v1 import cluster_pb2, cluster_pb2_grpc, inference_pb2, inference_pb2_grpc

from sollold.front.grpc import InferenceService
from sollold.operators import ClusterService

LOOK_AGAIN_S = 1.0
_NAMES = (
    "",  # the server as a whole
    inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name,
    cluster_pb2.DESCRIPTOR.services_by_name["ClusterService"].full_name,
)


class HeadServer:
    """Health says SERVING while some node is live, as `/readyz` does, and NOT_SERVING for good once it drains."""

    def __init__(
        self,
        inference: InferenceService,
        operators: ClusterService,
        *,
        is_ready: Callable[[], bool],
        peer_refused: Callable[[Reason], None],
        tls: TlsFiles | None = None,
    ) -> None:
        self._tls = tls
        self._server = new_server([Guard(tls, refused=peer_refused)] if tls is not None else ())
        self._health = health.aio.HealthServicer()
        self._is_ready = is_ready
        self._told: bool | None = None
        self._may_have_changed = asyncio.Event()
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(inference, self._server)
        cluster_pb2_grpc.add_ClusterServiceServicer_to_server(operators, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)

    async def listen(self, address: str) -> None:
        """Raises RuntimeError when the address cannot be listened on."""
        bind(self._server, address, self._tls)
        await self._tell()
        await self._server.start()

    def on_nodes_changed(self) -> None:
        """Have health follow readiness at once."""
        if self._is_ready() != self._told:
            self._may_have_changed.set()

    async def follow(self) -> None:
        """Have health follow readiness until cancelled: it ends by time alone when no node says anything more."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_AGAIN_S):
                    await self._may_have_changed.wait()
            self._may_have_changed.clear()
            await self._tell()

    async def _tell(self) -> None:
        while self._told != (ready := self._is_ready()):
            self._told = ready
            status = health_pb2.HealthCheckResponse
            for name in _NAMES:
                await self._health.set(name, status.SERVING if ready else status.NOT_SERVING)

    async def drain(self) -> None:
        await self._health.enter_graceful_shutdown()

    async def stop(self, grace_s: float) -> None:
        await self._server.stop(grace_s)
