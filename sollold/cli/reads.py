"""`sollol nodes`, `models`, `pools`: what the head knows, as a table or as JSON."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import msgspec
from sollol.inference import AvailableModel
from sollol.report import Device, DeviceShare, NodeStatus, Pool

from sollold.cli.connection import ask
from sollold.cli.output import print_json, print_table
from sollold.placement.explain import bytes_text, layers_text


def nodes(options: argparse.Namespace) -> int:
    found = ask(options, lambda client: client.nodes())
    ordered = sorted(found, key=lambda status: status.report.node_id)
    _print(options, "nodes", ordered, _NODE_HEAD, [_node_row(status) for status in ordered])
    return 0


def models(options: argparse.Namespace) -> int:
    found = ask(options, lambda client: client.list_models())
    _print(options, "models", found, _MODEL_HEAD, [_model_row(model) for model in found])
    return 0


def pools(options: argparse.Namespace) -> int:
    found = ask(options, lambda client: client.pools())
    ordered = sorted(found, key=lambda pool: (pool.instance.model, pool.instance.instance_id))
    _print(options, "pools", ordered, _POOL_HEAD, [row for pool in ordered for row in _pool_rows(pool)])
    return 0


_NODE_HEAD = ("NODE", "ADDRESS", "SEEN", "STATE", "CPUS", "MEMORY FREE / TOTAL", "MODELS", "POOLS", "ENGINE")
_MODEL_HEAD = ("MODEL", "SIZE", "ARCHITECTURE", "QUANTIZATION", "CONTEXT", "NODES", "STATE")
_POOL_HEAD = ("POOL", "MODEL", "NODE", "STATE", "STREAMS", "CONTEXT", "MEMORY")


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
    state = "cordoned" if report.cordoned else "ok" if status.connected else "not connected"
    return (
        report.node_id,
        report.address,
        f"{status.report_age_s:.0f} s ago",
        state,
        str(report.cpu_count),
        ", ".join(_memory(device) for device in report.devices),
        str(len(report.models)),
        str(len(report.instances)),
        report.engine.build if report.engine else "none: run `sollol engine build` there",
    )


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
    """The coordinator's node first; then a row for each node that lends to it."""
    instance = pool.instance
    percent = f" {instance.percent:.0f} %" if instance.state == "STARTING" else ""
    why = f" ({instance.refusal.reason})" if instance.refusal is not None else ""
    by_node: dict[str, list[str]] = {pool.node_id: []}
    for share in instance.shares:
        by_node.setdefault(share.node_id or pool.node_id, []).append(_share_text(share))
    own, *lenders = by_node.items()
    first = (
        instance.instance_id,
        instance.model,
        pool.node_id,
        f"{instance.state}{percent}{why}",
        f"{instance.active_streams} / {instance.parallel}",
        str(instance.context_per_slot),
        ", ".join(own[1]),
    )
    return [first, *(("", "", node_id, "lends", "", "", ", ".join(texts)) for node_id, texts in lenders)]


def _share_text(share: DeviceShare) -> str:
    layers = layers_text(share)
    return f"{share.device_id} {bytes_text(share.total_bytes)}{f' layers {layers}' if share.layers else ''}"
