"""`sollol nodes`, `links`, `models`, `pools`: what the head knows, as a table or as JSON."""

import argparse
import sys
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import msgspec
from sollol.inference import AvailableModel
from sollol.link import Link
from sollol.report import Device, DeviceShare, NodeStatus, Pool, Report

from sollold.cli.connection import ask
from sollold.cli.output import print_json, print_table
from sollold.placement.explain import bytes_text, layers_text


def nodes(options: argparse.Namespace) -> int:
    found = ask(options, lambda client: client.nodes())
    ordered = sorted(found, key=lambda status: status.report.node_id)
    _print(options, "nodes", ordered, _NODE_HEAD, [_node_row(status) for status in ordered])
    return 0


def links(options: argparse.Namespace) -> int:
    found = ask(options, lambda client: client.nodes())
    measured = [(status, link) for status in found for link in status.report.links]
    measured.sort(key=lambda pair: (pair[0].report.node_id, pair[1].node_id))
    content = [
        {
            "from": status.report.node_id,
            "to": link.node_id,
            "unreachable": link.unreachable,
            "rtt_s": link.rtt_s,
            "bytes_per_s": link.bytes_per_s,
            "age_s": link.age_s + status.report_age_s,
        }
        for status, link in measured
    ]
    _print(options, "links", content, _LINK_HEAD, [_link_row(status, link) for status, link in measured])
    return 0


def models(options: argparse.Namespace) -> int:
    found = ask(options, lambda client: client.list_models())
    _print(options, "models", found, _MODEL_HEAD, [_model_row(model) for model in found])
    return 0


def pools(options: argparse.Namespace) -> int:
    found = ask(options, lambda client: client.pools())
    ordered = sorted(found, key=attrgetter("instance.model", "instance.pool_number", "instance.instance_id"))
    _print(options, "pools", ordered, _POOL_HEAD, [row for pool in ordered for row in _pool_rows(pool)])
    return 0


_NODE_HEAD = (
    "NODE",
    "ADDRESS",
    "SEEN",
    "STATE",
    "CPUS",
    "MEMORY FREE / TOTAL",
    "MODELS",
    "POOLS",
    "CERTIFICATE",
    "ENGINE",
)
_LINK_HEAD = ("FROM", "TO", "ROUND TRIP", "RATE", "MEASURED")
_MODEL_HEAD = ("MODEL", "SIZE", "ARCHITECTURE", "QUANTIZATION", "CONTEXT", "NODES", "STATE")
_POOL_HEAD = (
    *("MODEL", "POOL", "STATE", "SLOTS USED / FREE", "CONTEXT", "MS/TOKEN SEEN / PREDICTED", "ID", "LISTENS"),
    *("NODE", "DEVICE", "LAYERS", "MEMORY"),
)


def _print(
    options: argparse.Namespace, name: str, content: Sequence[Any], head: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    if options.json:
        print_json({"schema": f"sollol.{name}/v1", name: msgspec.to_builtins(content)})
    elif rows:
        print_table(head, rows)
    else:
        sys.stderr.write(f"no {name}\n")


def _node_row(status: NodeStatus) -> tuple[str, ...]:
    report = status.report
    state = _node_state(status)
    return (
        report.node_id,
        report.address,
        f"{status.report_age_s:.0f} s ago",
        state,
        str(report.cpu_count),
        ", ".join(_memory(device) for device in report.devices),
        str(len(report.models)),
        str(len(report.instances)),
        _days_text(report.certificate_expires_in_s),
        _engine_text(report),
    )


def _engine_text(report: Report) -> str:
    if report.engine is None:
        return "none: run `sollol engine build` there"
    return f"{report.engine.build} (no memory limit)" if report.engines_unlimited else report.engine.build


def _node_state(status: NodeStatus) -> str:
    if status.report.draining:
        state = "draining" if status.report.instances else "drained"
    else:
        state = "cordoned" if status.report.cordoned else ""
    reached = "" if status.connected else "restarting" if status.restarting else "not connected"
    return ", ".join(filter(None, (state, reached))) or "ok"


def _days_text(expires_in_s: float | None) -> str:
    if expires_in_s is None:
        return "-"
    return "over" if expires_in_s <= 0 else f"{expires_in_s / 86_400:.1f} days"


def _link_row(status: NodeStatus, link: Link) -> tuple[str, ...]:
    reached = ("out of reach", "-")
    if not link.unreachable:
        reached = (f"{link.rtt_s * 1000:.2f} ms", f"{link.bytes_per_s / 1e6:.1f} MB/s")
    return (status.report.node_id, link.node_id, *reached, f"{link.age_s + status.report_age_s:.0f} s ago")


def _memory(device: Device) -> str:
    unusable = "" if device.usable else " (engine cannot use it)"
    return f"{device.device_id} {bytes_text(device.free_bytes)} / {bytes_text(device.total_bytes)}{unusable}"


def _model_row(model: AvailableModel) -> tuple[str, ...]:
    if model.problem is not None:
        state = f"{model.problem.reason}: {model.problem.message}"
    else:
        state = "warm" if model.warm else "cold"
    context = str(model.context_length) if model.context_length else "-"
    return (
        model.name,
        bytes_text(model.size_bytes),
        model.architecture or "-",
        model.quantization or "-",
        context,
        ", ".join(model.node_ids),
        state,
    )


def _pool_rows(pool: Pool) -> list[tuple[str, ...]]:
    """One row for each device that the pool has memory on; what is said of the pool as a whole stands in the first."""
    instance = pool.instance
    percent = f" {instance.percent:.0f} %" if instance.state == "STARTING" else ""
    why = f" ({instance.refusal.reason})" if instance.refusal is not None else ""
    whole = (
        instance.model,
        str(instance.pool_number),
        f"{instance.state}{percent}{why}",
        f"{instance.active_streams} / {max(0, instance.parallel - instance.active_streams)}",
        str(instance.context_per_slot),
        f"{_ms_text(instance.observed_ms_per_token)} / {_ms_text(instance.predicted_ms_per_token)}",
        instance.instance_id,
        instance.endpoint or "-",
    )
    devices = [_share_row(pool.node_id, share) for share in instance.shares] or [(pool.node_id, "-", "-", "-")]
    return [(*(whole if at == 0 else ("",) * len(whole)), *row) for at, row in enumerate(devices)]


def _ms_text(ms: float) -> str:
    return f"{ms:.1f}" if ms else "-"


def _share_row(coordinator: str, share: DeviceShare) -> tuple[str, ...]:
    memory = bytes_text(share.total_bytes)
    if share.logged_bytes is not None:
        predicted = bytes_text(share.total_bytes - share.margin_bytes)
        memory += f" ({predicted} predicted, {bytes_text(share.logged_bytes)} logged)"
    return (share.node_id or coordinator, share.device_id, layers_text(share), memory)
