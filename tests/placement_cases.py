"""Nodes and models to place, with round figures."""

from sollol.engine import Engine, EngineSource
from sollol.errors import Refusal
from sollol.report import (
    Device,
    DeviceKind,
    Instance,
    Model,
    ModelShape,
    NodeStatus,
    Report,
)

GIB = 2**30
MODEL = "tiny:8b"


def shape(layers: int = 8, layer_bytes: int = GIB, context_length: int = 8192) -> ModelShape:
    """`layers` + half a GiB of embeddings and of output."""
    return ModelShape(
        architecture="llama",
        layers=layers,
        embedding_length=1024,
        feed_forward_length=4096,
        heads=16,
        kv_heads=(4,) * layers,
        key_length=64,
        value_length=64,
        vocabulary=32000,
        context_length=context_length,
        layer_bytes=(layer_bytes,) * layers,
        embedding_bytes=GIB // 2,
        output_bytes=GIB // 2,
    )


SHAPE = shape()


def model(
    name: str = MODEL, of: ModelShape = SHAPE, aliases: tuple[str, ...] = (), problem: Refusal | None = None
) -> Model:
    return Model(
        name=name,
        size_bytes=9 * GIB,
        identity="same",
        shape=of if problem is None else None,
        problem=problem,
        aliases=aliases,
    )


def cpu(free: int = 64 * GIB, bandwidth: float = 20e9, total: int = 128 * GIB) -> Device:
    return Device(
        device_id="CPU", kind=DeviceKind.CPU, total_bytes=total, free_bytes=free, bandwidth_bytes_per_s=bandwidth
    )


def gpu(
    device_id: str = "CUDA0",
    free: int = 24 * GIB,
    bandwidth: float = 400e9,
    *,
    unified: bool = False,
    usable: bool = True,
) -> Device:
    return Device(
        device_id=device_id,
        kind=DeviceKind.GPU,
        total_bytes=24 * GIB,
        free_bytes=free,
        bandwidth_bytes_per_s=bandwidth,
        unified=unified,
        usable=usable,
    )


def node(
    node_id: str,
    *devices: Device,
    host: str = "10.0.0.1",
    models: tuple[Model, ...] | None = None,
    age_s: float = 1.0,
    engine: bool = True,
    labels: dict[str, str] | None = None,
    cpu_count: int = 8,
    cordoned: bool = False,
    draining: bool = False,
    instances: tuple[Instance, ...] = (),
) -> NodeStatus:
    report = Report(
        node_id=node_id,
        host=host,
        port=7462,
        devices=devices or (cpu(),),
        engine=Engine(source=EngineSource.PATH, path="llama-server", build="b1") if engine else None,
        models=(model(),) if models is None else models,
        labels=labels or {},
        cpu_count=cpu_count,
        cordoned=cordoned or draining,
        draining=draining,
        instances=instances,
    )
    return NodeStatus(report=report, report_age_s=age_s, connected=True)
