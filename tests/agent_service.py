"""An agent's gRPC service over parts in memory, and the calls that its tests make."""

import asyncio

import grpc.aio
import msgspec
import pytest
from sollol import wire
from sollol.errors import Reason, Refusal, refuse
from sollol.link import Link
from sollol.report import (
    BackendEndpoint,
    CoordinatorPlan,
    Device,
    DeviceKind,
    DeviceShare,
    Instance,
    InstanceState,
    Report,
    Reservation,
)
from sollol.v1 import agent_pb2, common_pb2

from agent.cordon import Cordon
from agent.link_probe import Sink
from agent.server import AgentService

PLAN = CoordinatorPlan(
    model="tiny",
    parallel=2,
    context_per_slot=512,
    shares=(DeviceShare(device_id="CPU", layers=3, weight_bytes=60, kv_bytes=30, margin_bytes=10, total_bytes=100),),
)


class MemoryReporter:
    def __init__(self):
        cpu = Device(device_id="CPU", kind=DeviceKind.CPU, total_bytes=1000, free_bytes=1000)
        self.report = Report(node_id="n1", host="127.0.0.1", port=7462, devices=(cpu,), sequence=1)
        self.changes = 0
        self._news = asyncio.Condition()

    def current(self):
        return self.report

    async def watch(self):
        while True:
            report = self.report
            yield report
            async with self._news:
                await self._news.wait_for(lambda: self.report is not report)  # noqa: B023 - waited for right here

    def changed(self):
        self.changes += 1

    async def publish(self, **changes):
        async with self._news:
            self.report = msgspec.structs.replace(self.report, sequence=self.report.sequence + 1, **changes)
            self._news.notify_all()


class MemoryLedger:
    def __init__(self):
        self.held, self.bound = {}, set()

    def reserve(self, pool_id, bytes_by_device, ttl_s, devices):
        if sum(bytes_by_device.values()) > devices[0].free_bytes:
            return Refusal(reason=Reason.MEMORY_SHORT, message="no", numbers={"needed_bytes": 1})
        self.held[pool_id] = dict(bytes_by_device)
        return None

    def release(self, pool_id):
        if pool_id not in self.bound:
            self.held.pop(pool_id, None)

    def bind(self, pool_id, instance_id):
        if pool_id not in self.held:
            raise refuse(Reason.RESERVATION_MISSING, "lapsed", retryable=True)
        self.bound.add(pool_id)
        return self.held[pool_id]

    def freed(self, pool_id, instance_id):
        self.bound.discard(pool_id)
        self.held.pop(pool_id, None)

    def reservations(self):
        return tuple(Reservation(pool_id=pool, bytes=held) for pool, held in self.held.items())


class MemorySupervisor:
    def __init__(self, log_dir):
        self.running, self.starts, self.wishes, self.log_dir = {}, [], [], log_dir
        self.fail_with = None

    async def start(self, pool_id, plan):
        self.starts.append(plan)
        if self.fail_with is not None:
            raise self.fail_with
        self.running[pool_id] = Instance(instance_id=pool_id, model=plan.model, state=InstanceState.STARTING)
        return self.running[pool_id]

    async def start_backend(self, wish):
        self.wishes.append(wish)
        if self.fail_with is not None:
            raise self.fail_with
        name = f"{wish.pool_id}.backend"
        self.running[name] = Instance(instance_id=name, pool_id=wish.pool_id, model="", state=InstanceState.READY)
        return BackendEndpoint(node_id="n1", host="127.0.0.1", port=7500, device_ids=wish.device_ids)

    async def watch(self, instance_id):
        if instance_id not in self.running:
            raise refuse(Reason.INSTANCE_NOT_FOUND, f"no {instance_id}")
        for percent, state in ((0.0, InstanceState.STARTING), (50.0, InstanceState.STARTING), (100.0, "READY")):
            yield msgspec.structs.replace(self.running[instance_id], percent=percent, state=InstanceState(state))

    async def stop(self, instance_id, *, at_once=False):
        self.running.pop(instance_id, None)

    def instances(self):
        return tuple(self.running.values())

    def log_path(self, instance_id):
        if not (self.log_dir / instance_id).exists():
            raise refuse(Reason.INSTANCE_NOT_FOUND, f"no {instance_id}")
        return self.log_dir / instance_id


class NoRelay:
    async def serve(self, context):
        await context.read()


class MemoryLinks:
    def __init__(self):
        self.asked, self.fail_with = [], None

    async def measure(self, node_id, host, port):
        self.asked.append((node_id, host, port))
        if self.fail_with is not None:
            raise self.fail_with
        return Link(node_id=node_id, rtt_s=0.001, bytes_per_s=1e6, boot_id="boot")


class Node:
    def __init__(self, tmp_path):
        self.links = MemoryLinks()
        self.cordon, self.active = Cordon(tmp_path), {}
        self.reporter, self.ledger, self.supervisor = MemoryReporter(), MemoryLedger(), MemorySupervisor(tmp_path)
        self.service = AgentService(
            reporter=self.reporter,
            ledger=self.ledger,
            supervisor=self.supervisor,
            relay=NoRelay(),
            links=self.links,
            sink=Sink(),
            cordon=self.cordon,
            active_streams=lambda instance_id: self.active.get(instance_id, 0),
        )


def reason(refusal):
    return common_pb2.Reason.Name(refusal.reason).removeprefix("REASON_")


def reserve(stub, pool_id="p1", size=100, ttl_s=30.0, device="CPU"):
    return stub.Reserve(agent_pb2.ReserveRequest(pool_id=pool_id, bytes={device: size}, ttl_s=ttl_s))


def start(stub, plan=PLAN, pool_id="p1"):
    request = agent_pb2.StartCoordinatorRequest(pool_id=pool_id)
    wire.fill(request.plan, plan)
    return stub.StartCoordinator(request)


async def status_of(call):
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value


def lend(stub, **changes):
    fields = {
        "pool_id": "p1",
        "device_ids": ["CPU"],
        "allowed_hosts": ["10.0.0.1"],
        "attach_within_s": 30,
        "threads": 2,
    }
    return stub.StartBackend(agent_pb2.StartBackendRequest(**(fields | changes)))
