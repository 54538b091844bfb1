"""One agent as the head calls it: typed values in and out, `_pb2` messages stay here."""

from collections.abc import AsyncGenerator, Awaitable, Mapping
from datetime import timedelta
from typing import Literal, Protocol, TypeVar

import grpc
from msgspec.structs import replace
from sollol import wire
from sollol.channels import open_channel, refusal_of
from sollol.errors import Refusal, SollolError
from sollol.report import CoordinatorPlan, Instance, Model, Report
from sollol.v1 import agent_pb2 as pb
from sollol.v1 import agent_pb2_grpc as rpc
from sollol.v1 import common_pb2

from sollold.relay import AgentRelay

UNARY_TIMEOUT_S = 5.0


class AgentLink:
    """The gRPC channel to one agent, with the relay that all its token streams share.

    Every method raises SollolError: the agent's own refusal, or AGENT_UNREACHABLE when the call does not get through.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._channel = open_channel(address)
        self._stub = rpc.AgentServiceStub(self._channel)
        self.relay = AgentRelay(self._stub, address)

    async def close(self) -> None:
        await self.relay.close()
        await self._channel.close()

    async def watch_report(self) -> AsyncGenerator[Report]:
        """Yield the agent's full report, then each newer one; ends or raises when the agent goes away."""
        models: tuple[Model, ...] = ()
        try:
            async for response in self._stub.WatchReport(pb.WatchReportRequest(), wait_for_ready=False):
                report = wire.value(Report, response.report)
                if response.models_unchanged:
                    report = replace(report, models=models)
                models = report.models
                yield report
        except grpc.aio.AioRpcError as error:
            raise SollolError(refusal_of(error)) from error

    async def reserve(self, pool_id: str, bytes_by_device: Mapping[str, int], ttl: timedelta) -> None:
        request = pb.ReserveRequest(pool_id=pool_id, bytes=dict(bytes_by_device), ttl_s=ttl.total_seconds())
        response = await _called(self._stub.Reserve(request, timeout=UNARY_TIMEOUT_S))
        _raise_refusal(response)

    async def release(self, pool_id: str) -> None:
        await _called(self._stub.Release(pb.ReleaseRequest(pool_id=pool_id), timeout=UNARY_TIMEOUT_S))

    async def start_coordinator(self, pool_id: str, plan: CoordinatorPlan) -> Instance:
        request = pb.StartCoordinatorRequest(pool_id=pool_id)
        wire.fill(request.plan, plan)
        response = await _called(self._stub.StartCoordinator(request, timeout=UNARY_TIMEOUT_S))
        _raise_refusal(response)
        return wire.value(Instance, response.instance)

    async def watch_instance(self, instance_id: str) -> AsyncGenerator[Instance]:
        try:
            async for response in self._stub.WatchInstance(pb.WatchInstanceRequest(instance_id=instance_id)):
                yield wire.value(Instance, response.instance)
        except grpc.aio.AioRpcError as error:
            raise SollolError(refusal_of(error)) from error

    async def stop(self, instance_id: str, *, timeout_s: float = 60.0) -> None:
        """Return when the engine's process is gone and its reservation is released."""
        await _called(self._stub.Stop(pb.StopRequest(instance_id=instance_id), timeout=timeout_s))

    async def tail_log(self, instance_id: str, *, lines: int, follow: bool) -> AsyncGenerator[tuple[str, ...]]:
        request = pb.TailLogRequest(instance_id=instance_id, lines=lines, follow=follow)
        try:
            async for response in self._stub.TailLog(request):
                _raise_refusal(response)
                yield tuple(response.lines)
        except grpc.aio.AioRpcError as error:
            raise SollolError(refusal_of(error)) from error


class _Answer(Protocol):
    def HasField(self, name: Literal["refusal"], /) -> bool: ...  # noqa: N802 - protobuf's name

    @property
    def refusal(self) -> common_pb2.Refusal: ...


def _raise_refusal(answer: _Answer) -> None:
    if answer.HasField("refusal"):
        raise SollolError(wire.value(Refusal, answer.refusal))


T = TypeVar("T")


async def _called(call: Awaitable[T]) -> T:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise SollolError(refusal_of(error)) from error
