"""The agent's gRPC service: checks what heads ask, lets the owners of state act, and answers as agent.proto says.

Expected refusals are values where the response has a field for them, else the status and trailers of
`sollol.channels`. Anything unexpected is logged once and becomes INTERNAL.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import grpc.aio
import msgspec
from grpc_health.v1 import health, health_pb2_grpc  # type: ignore[import-untyped]
from sollol import wire
from sollol.channels import write_whole
from sollol.errors import Reason, Refusal, SollolError, refuse
from sollol.report import BackendEndpoint, Instance, InstanceState, Model
from sollol.v1 import agent_pb2, agent_pb2_grpc

from agent import log_tail
from agent.asked import Cordon, Ledger, Links, Relaying, Reporter, Sink, Supervisor
from agent.checks import (
    check_backend,
    check_bytes,
    check_covered,
    check_id,
    check_instance_id,
    check_peer,
    check_pool_id,
    check_reserved,
    check_ttl,
    check_tunnel,
    plan_of,
)
from agent.departure import Departure
from agent.guarded import guarded, told_by_head
from agent.supervisor.lending import BackendWish, backend_id
from agent.supervisor.state import LIVE

_LINES_PER_MESSAGE = 256


class AgentService(agent_pb2_grpc.AgentServiceServicer):
    """One node's service; method by method as agent.proto documents it.

    Args:
        reporter: Owns the report.
        ledger: Owns the reservations. Whoever builds this lets the supervisor call `ledger.freed` when a process is
            gone.
        supervisor: Owns the engine processes.
        relay: Owns the token streams.
        links: Owns what is known of the links to other nodes.
        sink: Takes what other agents send to measure theirs.
        cordon: Owns whether new pools are taken.
        active_streams: How many streams an instance has now, over all heads.
    """

    def __init__(
        self,
        *,
        reporter: Reporter,
        ledger: Ledger,
        supervisor: Supervisor,
        relay: Relaying,
        links: Links,
        sink: Sink,
        cordon: Cordon,
        active_streams: Callable[[str], int],
    ) -> None:
        self._reporter = reporter
        self._ledger = ledger
        self._supervisor = supervisor
        self._relay = relay
        self._links = links
        self._sink = sink
        self._cordon, self._active_streams = cordon, active_streams
        self._health = health.aio.HealthServicer()
        self._draining = False
        self._departure = Departure()

    def add_to(self, server: grpc.aio.Server) -> None:
        """Add this service and the standard health service."""
        agent_pb2_grpc.add_AgentServiceServicer_to_server(self, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)

    async def drain(self, *, restarting: bool = False) -> None:
        """From now on take no reservation and start nothing; streams go on. Health says NOT_SERVING, for good.

        Args:
            restarting: The engines outlive this agent. Heads that watch it are sent away, so that they wait for the
                next one and take no word of this one for it.
        """
        self._draining = True
        if restarting:
            self._departure.begin()
        await self._health.enter_graceful_shutdown()

    @guarded
    async def GetReport(self, request: agent_pb2.GetReportRequest, context: Any) -> agent_pb2.GetReportResponse:
        response = agent_pb2.GetReportResponse()
        wire.fill(response.report, self._reporter.current())
        return response

    @guarded
    async def WatchReport(self, request: agent_pb2.WatchReportRequest, context: Any) -> None:
        if request.HasField("refusal"):
            told_by_head(wire.value(Refusal, request.refusal))
        await self._departure.unless_begun(self._watch_report(context))

    async def _watch_report(self, context: Any) -> None:
        sent: tuple[Model, ...] | None = None
        async for report in self._reporter.watch():
            unchanged = sent is report.models or sent == report.models
            sent = report.models
            response = agent_pb2.WatchReportResponse(models_unchanged=unchanged)
            wire.fill(response.report, msgspec.structs.replace(report, models=()) if unchanged else report)
            await write_whole(context, response)

    @guarded
    async def Reserve(self, request: agent_pb2.ReserveRequest, context: Any) -> agent_pb2.ReserveResponse:
        response = agent_pb2.ReserveResponse()
        try:
            self._reserve(request)
        except SollolError as error:
            wire.fill(response.refusal, error.refusal)
        return response

    def _reserve(self, request: agent_pb2.ReserveRequest) -> None:
        pool_id = check_pool_id(request.pool_id)
        wanted, ttl_s = check_bytes(request.bytes), check_ttl(request.ttl_s)
        self._check_open()
        report = self._reporter.current()
        if self._cordon.cordoned:
            raise refuse(Reason.CORDONED, f"node {report.node_id} is cordoned: it takes no new pools", retryable=True)
        refusal = self._ledger.reserve(pool_id, wanted, ttl_s, report.devices)
        if refusal is not None:
            raise SollolError(refusal)
        self._reporter.changed()

    @guarded
    async def Release(self, request: agent_pb2.ReleaseRequest, context: Any) -> agent_pb2.ReleaseResponse:
        self._ledger.release(check_id(request.pool_id, "pool id"))
        self._reporter.changed()
        return agent_pb2.ReleaseResponse()

    @guarded
    async def StartBackend(
        self, request: agent_pb2.StartBackendRequest, context: Any
    ) -> agent_pb2.StartBackendResponse:
        response = agent_pb2.StartBackendResponse()
        try:
            wire.fill(response.endpoint, await self._start_backend(request))
        except SollolError as error:
            wire.fill(response.refusal, error.refusal)
        return response

    async def _start_backend(self, request: agent_pb2.StartBackendRequest) -> BackendEndpoint:
        pool_id, devices, hosts = request.pool_id, tuple(request.device_ids), tuple(request.allowed_hosts)
        check_backend(pool_id, devices, request.threads, hosts, request.attach_within_s)
        check_tunnel(request.coordinator_node, request.pool_secret)
        instance_id = backend_id(pool_id)
        if not self._starts_or_serves(instance_id):
            self._check_open()
        reserved = self._reserved(pool_id)
        check_reserved(devices, reserved, pool_id)
        wish = BackendWish(
            pool_id=pool_id,
            bytes={device_id: reserved[device_id] for device_id in devices},
            threads=request.threads,
            allowed_hosts=hosts,
            attach_within_s=request.attach_within_s,
            upload_bytes=request.upload_bytes,
            coordinator_node=request.coordinator_node,
            pool_secret=request.pool_secret,
        )
        with self._bound(pool_id, instance_id):
            return await self._supervisor.start_backend(wish)

    @guarded
    async def StartCoordinator(
        self,
        request: agent_pb2.StartCoordinatorRequest,
        context: Any,
    ) -> agent_pb2.StartCoordinatorResponse:
        response = agent_pb2.StartCoordinatorResponse()
        try:
            instance = await self._start(request)
        except SollolError as error:
            wire.fill(response.refusal, error.refusal)
        else:
            wire.fill(response.instance, instance)
        return response

    async def _start(self, request: agent_pb2.StartCoordinatorRequest) -> Instance:
        pool_id = check_pool_id(request.pool_id)
        plan = plan_of(request.plan)
        running = self._starts_or_serves(pool_id)
        if running is not None:
            return running
        self._check_open()
        if reserved := self._reserved(pool_id):  # else bind says so
            check_covered(plan, reserved, self._reporter.current().node_id)
        with self._bound(pool_id, pool_id):
            return await self._supervisor.start(pool_id, plan)

    @contextmanager
    def _bound(self, pool_id: str, instance_id: str) -> Iterator[None]:
        """Bind the pool's reservation to an instance that is started here; undone when that fails."""
        self._ledger.bind(pool_id, instance_id)
        try:
            yield
        except BaseException:
            if not self._is_live(instance_id):
                self._ledger.freed(pool_id, instance_id)
            raise
        finally:
            self._reporter.changed()

    def _reserved(self, pool_id: str) -> dict[str, int]:
        held = (item.bytes for item in self._ledger.reservations() if item.pool_id == pool_id)
        return next(held, {})

    def _starts_or_serves(self, instance_id: str) -> Instance | None:
        useful = (InstanceState.STARTING, InstanceState.READY)
        found = self._supervisor.instances()
        return next((item for item in found if item.instance_id == instance_id and item.state in useful), None)

    @guarded
    async def WatchInstance(self, request: agent_pb2.WatchInstanceRequest, context: Any) -> None:
        async for instance in self._supervisor.watch(check_instance_id(request.instance_id)):
            response = agent_pb2.WatchInstanceResponse()
            wire.fill(response.instance, instance)
            await write_whole(context, response)

    @guarded
    async def Stop(self, request: agent_pb2.StopRequest, context: Any) -> agent_pb2.StopResponse:
        instance_id = check_instance_id(request.instance_id)
        if request.when_idle and self._active_streams(instance_id):
            return agent_pb2.StopResponse(busy=True)
        await self._supervisor.stop(instance_id, at_once=request.at_once)
        self._ledger.release(instance_id)  # reserved, and never started
        self._reporter.changed()
        return agent_pb2.StopResponse()

    @guarded
    async def SetCordoned(self, request: agent_pb2.SetCordonedRequest, context: Any) -> agent_pb2.SetCordonedResponse:
        self._cordon.set(cordoned=request.cordoned, draining=request.draining)
        self._reporter.changed()
        return agent_pb2.SetCordonedResponse()

    @guarded
    async def Relay(self, request_iterator: Any, context: Any) -> None:
        await self._relay.serve(context)

    @guarded
    async def TailLog(self, request: agent_pb2.TailLogRequest, context: Any) -> None:
        try:
            instance_id = check_instance_id(request.instance_id)
            path = self._supervisor.log_path(instance_id)
        except SollolError as error:
            response = agent_pb2.TailLogResponse()
            wire.fill(response.refusal, error.refusal)
            await write_whole(context, response)
            return
        lines, offset = await log_tail.tail(path, request.lines, unfinished=not request.follow)
        await _write_lines(context, lines)
        if request.follow:
            async for more in log_tail.follow(path, offset, ended=lambda: not self._is_live(instance_id)):
                await _write_lines(context, more)

    @guarded
    async def MeasureLink(self, request: agent_pb2.MeasureLinkRequest, context: Any) -> agent_pb2.MeasureLinkResponse:
        response = agent_pb2.MeasureLinkResponse()
        try:
            peer = check_peer(request.node_id, request.host, request.port)
            wire.fill(response.link, await self._links.measure(*peer))
            self._reporter.changed()
        except SollolError as error:
            wire.fill(response.refusal, error.refusal)
        return response

    @guarded
    async def ProbeLink(self, request_iterator: Any, context: Any) -> None:
        report = self._reporter.current()
        await self._sink.serve(context, node_id=report.node_id, boot_id=report.boot_id)

    def _is_live(self, instance_id: str) -> bool:
        found = self._supervisor.instances()
        return any(item.instance_id == instance_id and item.state in LIVE for item in found)

    def _check_open(self) -> None:
        if self._cordon.draining:
            raise refuse(Reason.CORDONED, "this node is being drained: it starts nothing", retryable=True)
        if self._draining:
            raise refuse(Reason.SHUTTING_DOWN, "this agent is shutting down", retryable=True)


async def _write_lines(context: Any, lines: Sequence[str]) -> None:
    for start in range(0, len(lines), _LINES_PER_MESSAGE):
        await write_whole(context, agent_pb2.TailLogResponse(lines=lines[start : start + _LINES_PER_MESSAGE]))
