"""What an agent publishes of its node and its pools, made from a report. Pure; README.md documents the fields."""

from collections.abc import Iterable

from msgspec import Struct
from sollol.report import DeviceKind, Instance, InstanceKind, InstanceState, Report

MILLI = 1000.0


class DeviceState(Struct, frozen=True, kw_only=True):
    device_id: str
    kind: DeviceKind
    total_bytes: int
    free_bytes: int


class NodeState(Struct, frozen=True, kw_only=True):
    """Bytes are sums over its devices. `tokens_per_s`: what its ready pools do side by side, None when not known."""

    node_id: str
    total_bytes: int
    free_bytes: int
    reserved_bytes: int
    devices: tuple[DeviceState, ...]
    models: int
    pools_ready: int
    active_streams: int
    tokens_per_s: float | None
    cordoned: bool
    engine_build: str
    version: str
    measured_unix_s: float


class PoolState(Struct, frozen=True, kw_only=True):
    """`bytes`: on all nodes. `tokens_per_s`: of one stream alone, as observed; None when not known.

    `load` is streams per slot, from 0 to 1 and above 1 when requests queue in the engine.
    """

    pool_id: str
    model: str
    number: int
    node_id: str
    state: InstanceState
    percent: float
    bytes: int
    active_streams: int
    slots: int
    load: float
    tokens_per_s: float | None
    reason: str
    message: str


def node_state(report: Report, pools: Iterable[PoolState]) -> NodeState:
    ready = [pool for pool in pools if pool.state is InstanceState.READY]
    speeds = [pool.tokens_per_s for pool in ready if pool.tokens_per_s is not None]
    return NodeState(
        node_id=report.node_id,
        total_bytes=sum(device.total_bytes for device in report.devices),
        free_bytes=sum(device.free_bytes for device in report.devices),
        reserved_bytes=sum(device.reserved_bytes for device in report.devices),
        devices=tuple(
            DeviceState(
                device_id=device.device_id,
                kind=device.kind,
                total_bytes=device.total_bytes,
                free_bytes=device.free_bytes,
            )
            for device in report.devices
        ),
        models=len(report.models),
        pools_ready=len(ready),
        active_streams=sum(pool.active_streams for pool in ready),
        tokens_per_s=round(sum(speeds), 3) if speeds else None,
        cordoned=report.cordoned,
        engine_build=report.engine.build if report.engine is not None else "",
        version=report.version,
        measured_unix_s=round(report.measured_unix_s, 3),
    )


def pool_states(report: Report) -> tuple[PoolState, ...]:
    """The coordinators of this node that are something to somebody: a stopped one is no pool any more."""
    return tuple(
        _pool_state(report.node_id, instance)
        for instance in report.instances
        if instance.kind is InstanceKind.COORDINATOR and instance.state is not InstanceState.STOPPED
    )


def _pool_state(node_id: str, instance: Instance) -> PoolState:
    slots, observed = max(1, instance.parallel), instance.observed_ms_per_token
    refusal = instance.refusal
    return PoolState(
        pool_id=instance.instance_id,
        model=instance.model,
        number=instance.pool_number,
        node_id=node_id,
        state=instance.state,
        percent=round(instance.percent, 1),
        bytes=sum(share.total_bytes for share in instance.shares),
        active_streams=instance.active_streams,
        slots=slots,
        load=round(instance.active_streams / slots, 3),
        tokens_per_s=round(MILLI / observed, 3) if observed > 0 else None,
        reason=refusal.reason.value if refusal is not None else "",
        message=refusal.message if refusal is not None else "",
    )
