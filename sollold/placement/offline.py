"""A node list from a file, for a dry run without a head: the seed's fields, nothing measured."""

from typing import Annotated

import msgspec
from msgspec import Meta, Struct, field
from sollol.errors import Reason, refuse
from sollol.report import Device, DeviceKind, NodeStatus, Report

from sollold.placement.classic import MB

Megabytes = Annotated[int, Meta(ge=0, le=2**33)]
MAX_NODES = 100_000


class ListedNode(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One entry. `gpu_vram_mb` is one number or one for each GPU; `has_gpu` defaults to whether there is any VRAM."""

    host: Annotated[str, Meta(min_length=1, max_length=255)]
    cpu_ram_mb: Megabytes
    gpu_vram_mb: Megabytes | Annotated[list[Megabytes], Meta(max_length=256)] = 0
    has_gpu: bool | None = None
    gpu_devices: list[str] = field(default_factory=list)
    gpu_names: list[str] = field(default_factory=list)
    cpu_count: Annotated[int, Meta(ge=1, le=65536)] = 1
    labels: dict[str, str] = field(default_factory=dict)


def nodes_from_json(text: bytes | str) -> tuple[NodeStatus, ...]:
    """Read `[{"host": ..., "cpu_ram_mb": ..., "gpu_vram_mb": ..., "has_gpu": ...}, ...]`; the host is the node id.

    Raises:
        SollolError: INVALID_REQUEST with the place (`$[1].cpu_ram_mb`) of what is wrong.
    """
    try:
        listed = msgspec.json.decode(text, type=Annotated[list[ListedNode], Meta(max_length=MAX_NODES)])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise refuse(Reason.INVALID_REQUEST, f"the node list is wrong: {error}") from error
    seen: set[str] = set()
    for entry in listed:
        if entry.host in seen:
            raise refuse(Reason.INVALID_REQUEST, f"the node list is wrong: host {entry.host!r} is there twice")
        seen.add(entry.host)
    return tuple(_status(entry) for entry in listed)


def _status(entry: ListedNode) -> NodeStatus:
    ram = entry.cpu_ram_mb * MB
    cpu = Device(device_id="CPU", kind=DeviceKind.CPU, total_bytes=ram, free_bytes=ram)
    report = Report(
        node_id=entry.host,
        host=entry.host,
        port=0,
        devices=(cpu, *_gpus(entry)),
        cpu_count=entry.cpu_count,
        labels=entry.labels,
    )
    return NodeStatus(report=report, report_age_s=0.0, connected=False)


def _gpus(entry: ListedNode) -> tuple[Device, ...]:
    sizes = [entry.gpu_vram_mb] if isinstance(entry.gpu_vram_mb, int) else entry.gpu_vram_mb
    if entry.has_gpu is False and any(sizes):
        message = f"the node list is wrong: {entry.host!r} has has_gpu false but gpu_vram_mb {sum(sizes)}"
        raise refuse(Reason.INVALID_REQUEST, message)
    if not any(sizes) and not entry.has_gpu:
        return ()
    return tuple(
        Device(device_id=f"GPU{at}", kind=DeviceKind.GPU, total_bytes=size * MB, free_bytes=size * MB)
        for at, size in enumerate(sizes or [0])
    )
