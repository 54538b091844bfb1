"""An agent behind a real gRPC server whose answers the test writes: no ledger, no engines."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace
from sollol import wire
from sollol.channels import bind, new_server, refusal_abort
from sollol.errors import Reason, Refusal, refuse
from sollol.link import Link
from sollol.report import BackendEndpoint, CoordinatorPlan, Instance, InstanceState, Report
from sollol.tls import TlsFiles
from sollol.v1 import agent_pb2 as pb
from sollol.v1 import agent_pb2_grpc

from agent.revocation import RevocationService
from tests.placement_cases import node

if TYPE_CHECKING:
    import grpc.aio


class FakeAgent(agent_pb2_grpc.AgentServiceServicer):
    """`report` is what watchers get, `tell` sends a new one. `refusals` and `hooks` change what a call does, by name.

    A hook is awaited before the call is answered. `admitted` has the backends that run: pool id to admitted hosts. An instance becomes READY at once unless `states` says otherwise.
    """

    LENDING_PORT = 7500

    def __init__(self, node_id: str, port: int, *, boot_id: str = "boot", tls: TlsFiles | None = None) -> None:
        self.address = f"127.0.0.1:{port}"
        self.tls = tls
        self.report: Report = replace(node(node_id).report, host="127.0.0.1", port=port, boot_id=boot_id)
        self.calls: list[tuple[str, str]] = []
        self.refusals: dict[str, Refusal] = {}
        self.hooks: dict[str, Callable[[Any], Awaitable[object]]] = {}
        self.states: list[InstanceState] = [InstanceState.STARTING, InstanceState.READY]
        self.failure: Refusal | None = None
        self.reserved: set[str] = set()
        self.plans: list[CoordinatorPlan] = []
        self.admitted: dict[str, tuple[str, ...]] = {}
        self.watchers = 0
        self.told: list[Reason] = []
        self._news = asyncio.Event()
        self._models: dict[str, str] = {}
        self._numbers: dict[str, int] = {}
        self._server: grpc.aio.Server | None = None
        self._stopped_s = 0.0

    def tell(self, **changes: Any) -> None:
        self.report = replace(self.report, sequence=self.report.sequence + 1, **changes)
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def start(self) -> None:
        self._server = new_server()
        agent_pb2_grpc.add_AgentServiceServicer_to_server(self, self._server)
        if self.tls is not None:
            agent_pb2_grpc.add_RevocationServiceServicer_to_server(RevocationService(self.tls), self._server)
        assert bind(self._server, self.address, self.tls)
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            server, self._server = self._server, None
            self._stopped_s = time.monotonic()
            await server.stop(0)

    @property
    def is_up(self) -> bool:
        return self._server is not None

    @property
    def silent_s(self) -> float:
        return 0.0 if self.is_up else time.monotonic() - self._stopped_s

    @asynccontextmanager
    async def running(self) -> AsyncIterator["FakeAgent"]:
        await self.start()
        try:
            yield self
        finally:
            await self.stop()

    async def _called(self, name: str, subject: str, context: Any) -> None:
        self.calls.append((name, subject))
        if name in self.hooks:
            await self.hooks[name](context)

    async def WatchReport(self, request, context):  # noqa: N802 - gRPC's name
        if request.HasField("refusal"):
            refusal = wire.value(Refusal, request.refusal)
            self.told.append(refusal.reason)
            await refusal_abort(context, refusal)
        self.watchers += 1
        sent = None
        try:
            await self._called("WatchReport", "", context)
            while True:
                if "WatchReport" in self.refusals:
                    await refusal_abort(context, self.refusals["WatchReport"])
                news, report = self._news, self.report
                unchanged = sent == report.models
                sent = report.models
                message = pb.WatchReportResponse(models_unchanged=unchanged)
                wire.fill(message.report, replace(report, models=()) if unchanged else report)
                await context.write(message)
                await news.wait()
        finally:
            self.watchers -= 1

    async def Reserve(self, request, context):  # noqa: N802 - gRPC's name
        await self._called("Reserve", request.pool_id, context)
        response = pb.ReserveResponse()
        if "Reserve" in self.refusals:
            wire.fill(response.refusal, self.refusals["Reserve"])
        else:
            self.reserved.add(request.pool_id)
        return response

    async def Release(self, request, context):  # noqa: N802 - gRPC's name
        await self._called("Release", request.pool_id, context)
        self.reserved.discard(request.pool_id)
        return pb.ReleaseResponse()

    async def StartBackend(self, request, context):  # noqa: N802 - gRPC's name
        await self._called("StartBackend", request.pool_id, context)
        response = pb.StartBackendResponse()
        if "StartBackend" in self.refusals:
            wire.fill(response.refusal, self.refusals["StartBackend"])
        else:
            self.admitted[request.pool_id] = tuple(request.allowed_hosts)
            devices = tuple(request.device_ids)
            endpoint = BackendEndpoint(node_id="", host=self.report.host, port=self.LENDING_PORT, device_ids=devices)
            wire.fill(response.endpoint, endpoint)
        return response

    async def StartCoordinator(self, request, context):  # noqa: N802 - gRPC's name
        await self._called("StartCoordinator", request.pool_id, context)
        response = pb.StartCoordinatorResponse()
        if "StartCoordinator" in self.refusals:
            wire.fill(response.refusal, self.refusals["StartCoordinator"])
        else:
            self._models[request.pool_id] = request.plan.model
            self._numbers[request.pool_id] = request.plan.pool_number
            self.plans.append(wire.value(CoordinatorPlan, request.plan))
            wire.fill(response.instance, self._instance(request.pool_id, InstanceState.STARTING))
        return response

    async def WatchInstance(self, request, context):  # noqa: N802 - gRPC's name
        await self._called("WatchInstance", request.instance_id, context)
        if request.instance_id not in self._models:
            await refusal_abort(context, refuse(Reason.INSTANCE_NOT_FOUND, "no such instance").refusal)
        for state in self.states:
            response = pb.WatchInstanceResponse()
            wire.fill(response.instance, self._instance(request.instance_id, state))
            await context.write(response)
        if self.states[-1] is InstanceState.STARTING:
            await asyncio.Event().wait()

    async def Stop(self, request, context):  # noqa: N802 - gRPC's name
        await self._called("Stop", request.instance_id, context)
        self.admitted.pop(request.instance_id, None)
        return pb.StopResponse()

    async def MeasureLink(self, request, context):  # noqa: N802 - gRPC's name
        await self._called("MeasureLink", request.node_id, context)
        response = pb.MeasureLinkResponse()
        if "MeasureLink" in self.refusals:
            wire.fill(response.refusal, self.refusals["MeasureLink"])
        else:
            address = f"{request.host}:{request.port}"
            link = Link(node_id=request.node_id, rtt_s=0.001, bytes_per_s=1e8, boot_id="boot", address=address)
            wire.fill(response.link, link)
            self.tell(links=(*(each for each in self.report.links if each.node_id != link.node_id), link))
        return response

    async def TailLog(self, request, context):  # noqa: N802 - gRPC's name
        await self._called("TailLog", request.instance_id, context)
        response = pb.TailLogResponse(lines=[f"{request.lines} lines of {request.instance_id}"])
        if "TailLog" in self.refusals:
            response = pb.TailLogResponse()
            wire.fill(response.refusal, self.refusals["TailLog"])
        await context.write(response)

    def _instance(self, instance_id: str, state: InstanceState) -> Instance:
        failure = self.failure if state is InstanceState.FAILED else None
        return Instance(
            instance_id=instance_id,
            model=self._models[instance_id],
            state=state,
            parallel=2,
            refusal=failure,
            pool_number=self._numbers[instance_id],
        )

    def pools(self, name: str) -> list[str]:
        """What this call was made for."""
        return [subject for called, subject in self.calls if called == name]
