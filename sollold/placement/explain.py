"""Shows a Decision to people and programs. Decides and computes nothing: everything is in the record."""

from collections.abc import Sequence
from typing import Any

import msgspec
from sollol.correction import Correction
from sollol.link import PlanLink
from sollol.report import CoordinatorPlan, Decision, DeviceShare, NodeVerdict

SCHEMA = "sollol.place/v1"
_LAST_COLUMNS = ("hop_ms", "busy_ms", "scaled_ms", "observed_ms")
SHARE_COLUMNS = ("layers", "weights", "KV", "compute", "margin", "total")


def explain(decision: Decision) -> str:
    """The whole record as text: the node-by-node table, then the outcome."""
    lines = [_title(decision), node_table(decision)] if decision.nodes else [_title(decision)]
    if decision.correction is not None:
        lines.append(_corrected(decision.correction))
    if decision.refusal is not None:
        lines.append(f"Not placed: {decision.refusal.reason}: {decision.refusal.message.splitlines()[0]}")
        lines.extend(line for line in decision.refusal.message.splitlines() if line.startswith("largest possible fit"))
        return "\n".join(lines)
    best = next(verdict for verdict in decision.nodes if verdict.best)
    unit = "" if decision.unit == "MB" else f" {decision.unit}"
    lines.append(f"Selected {_classic_name(best)} for coordinator (score={_number(best.score or 0)}{unit})")
    lines.extend(_speed_line(best))
    if decision.reduced_context_from is not None and decision.plan is not None:
        given = decision.plan.context_per_slot
        lines.append(f"Context reduced from {decision.reduced_context_from} to {given} tokens: no more fits")
    if decision.plan is not None:
        lines.append(split_table(decision, decision.plan, best) if best.shares else plan_table(decision.plan))
    if decision.ready_s is not None:
        lines.append(_ready(decision, decision.ready_s))
    return "\n".join(lines)


def _corrected(by: Correction) -> str:
    added = f", and {bytes_text(by.added_bytes)} more on each device" if by.added_bytes else ""
    factors = f"weights x {by.weights:.3f}, KV x {by.kv:.3f}, compute x {by.compute:.3f}"
    return f"Memory corrected by what earlier loads logged: {factors}{added}"


def node_table(decision: Decision, most: int | None = None) -> str:
    """One line for each node (the first `most` of them), in the order of the record."""
    shown = decision.nodes[:most]
    if decision.unit == "MB":
        table = "\n".join(_classic_line(verdict) for verdict in shown)
    else:
        names = _part_names(shown)
        rows = [("node", "needed", "free", *names, decision.unit, "verdict")]
        rows.extend(_fit_row(verdict, names) for verdict in shown)
        table = _aligned(rows)
    hidden = len(decision.nodes) - len(shown)
    return f"{table}\n  and {hidden} more nodes" if hidden else table


def plan_table(plan: CoordinatorPlan) -> str:
    rows: list[tuple[str, ...]] = [("device", *SHARE_COLUMNS), *map(_share_row, plan.shares)]
    return f"{_plan_title(plan)}\n{_aligned(rows)}"


def split_table(decision: Decision, plan: CoordinatorPlan, coordinator: NodeVerdict) -> str:
    """A plan over several nodes: who holds which layers, over which link, and what a token costs where."""
    cost = {part.name: part.value for part in coordinator.parts}
    links = {link.node_id: link for link in decision.links}
    rows: list[tuple[str, ...]] = [("node", "device", *SHARE_COLUMNS, "read ms", "rtt ms", "MB/s")]
    for share in plan.shares:
        lent = cost.get(f"read_ms.{share.node_id}/{share.device_id}") if share.node_id else None
        read_ms = cost.get("read_ms." + share.device_id) if lent is None else lent
        reads = "-" if not share.layers or read_ms is None else f"{read_ms:.3f}"
        link = links.get(share.node_id)
        hop = ("-", "-") if link is None else (f"{link.rtt_s * 1000:.3f}", f"{link.bytes_per_s / 1e6:.1f}")
        rows.append((share.node_id or coordinator.node_id, *_share_row(share), reads, *hop))
    return "\n".join((_plan_title(plan), _aligned(rows), *_assumed(decision.links), _per_token(cost, coordinator)))


def _assumed(links: Sequence[PlanLink]) -> list[str]:
    names = ", ".join(link.node_id for link in links if link.age_s is None)
    return [f"Not measured yet, assumed: the link to {names}"] if names else []


def _per_token(cost: dict[str, float], coordinator: NodeVerdict) -> str:
    hops = [(name.partition(".")[2], value) for name, value in cost.items() if name.startswith("hop_ms.")]
    each = ", ".join(f"{node_id} {value:.3f}" for node_id, value in hops)
    read = sum(value for name, value in cost.items() if name.startswith("read_ms."))
    return (
        f"Per token: {read:.3f} ms reading + {sum(value for _, value in hops):.3f} ms for hops ({each}) "
        f"+ {cost.get('busy_ms', 0.0):.3f} ms for other pools{_as_observed(cost)} = {coordinator.score or 0.0:.3f} ms"
    )


def _ready(decision: Decision, ready_s: float) -> str:
    doing = {"start_s": "starting", "read_s": "reading on ", "move_s": "moving to "}
    terms = []
    for part in decision.ready_parts:
        what, _, node_id = part.name.partition(".")
        terms.append(f"{part.value:.1f} s {doing[what]}{node_id}")
    return f"Until ready: {' + '.join(terms)} = {ready_s:.1f} s"


def _as_observed(cost: dict[str, float]) -> str:
    known = [cost[name] for name in ("observed_ms", "scaled_ms") if name in cost]
    return "".join(f" {'-' if value < 0 else '+'} {abs(value):.3f} ms as observed" for value in known)


def _speed_line(best: NodeVerdict) -> list[str]:
    """What was predicted and what was observed, where anything was."""
    cost = {part.name: part.value for part in best.parts}
    predicted = sum(cost.values()) - sum(cost.get(name, 0.0) for name in ("busy_ms", "observed_ms", "scaled_ms"))
    if "observed_ms" in cost:
        return [f"Predicted {predicted:.3f} ms/token, observed on this plan {predicted + cost['observed_ms']:.3f}"]
    if "scaled_ms" in cost:
        scaled = predicted + cost["scaled_ms"]
        return [f"Predicted {predicted:.3f} ms/token, {scaled:.3f} by what was observed of this model on other plans"]
    return []


def _plan_title(plan: CoordinatorPlan) -> str:
    return f"Plan: {plan.parallel} x {plan.context_per_slot} tokens of context, KV {plan.kv_type}, ubatch {plan.ubatch}"


def as_json(decision: Decision) -> dict[str, Any]:
    """The record for programs. Scores and parts are in `unit`; in megabytes they are whole numbers."""
    return {
        "schema": SCHEMA,
        "model": decision.model,
        "policy": decision.policy,
        "unit": decision.unit,
        "estimate_mb": decision.estimate_mb,
        "estimate_bytes": decision.estimate_bytes,
        "nodes": [_verdict_json(verdict, megabytes=decision.unit == "MB") for verdict in decision.nodes],
        "coordinator": decision.coordinator or None,
        "coordinator_host": decision.coordinator_host or None,
        "plan": msgspec.to_builtins(decision.plan),
        "reduced_context_from": decision.reduced_context_from,
        **({} if decision.unit == "MB" else _ready_json(decision)),
        "correction": msgspec.to_builtins(decision.correction),
        "refusal": msgspec.to_builtins(decision.refusal),
    }


def _ready_json(decision: Decision) -> dict[str, Any]:
    return {
        "ready_s": decision.ready_s,
        "ready_parts": {part.name: part.value for part in decision.ready_parts},
        "links": msgspec.to_builtins(decision.links),
    }


def _verdict_json(verdict: NodeVerdict, *, megabytes: bool) -> dict[str, Any]:
    score = None if verdict.score is None else _plain(verdict.score)
    return {
        "node_id": verdict.node_id,
        "host": verdict.host,
        **({"score_mb": score} if megabytes else {}),
        "score": score,
        "parts": {part.name: _plain(part.value) for part in verdict.parts},
        "refusal": msgspec.to_builtins(verdict.refusal),
        "needed_bytes": verdict.needed_bytes,
        "free_bytes": verdict.free_bytes,
        "best": verdict.best,
        "shares": msgspec.to_builtins(verdict.shares),
    }


def _title(decision: Decision) -> str:
    if decision.unit == "MB":
        return f"Selecting coordinator node for {decision.model} (estimated {decision.estimate_mb}MB needed)"
    size = f" ({bytes_text(decision.estimate_bytes)} needed)" if decision.estimate_bytes else ""
    return (
        f"Selecting coordinator node for {decision.model}{size}, policy {decision.policy}, lowest {decision.unit} wins"
    )


def _classic_name(verdict: NodeVerdict) -> str:
    return verdict.host if verdict.host == verdict.node_id else f"{verdict.node_id} ({verdict.host})"


def _classic_line(verdict: NodeVerdict) -> str:
    """The line of the seed's guide, character for character."""
    name = _classic_name(verdict)
    if verdict.score is None:
        return f"  {name}: {_why(verdict)}"
    part = {item.name: _number(item.value) for item in verdict.parts}
    best = " [ok] BEST" if verdict.best else ""
    return f"  {name}: RAM={part['ram_mb']}MB, GPU_VRAM={part['vram_mb']}MB, score={_number(verdict.score)}{best}"


def _part_names(verdicts: Sequence[NodeVerdict]) -> list[str]:
    names: dict[str, None] = {}
    for verdict in verdicts:
        names.update(dict.fromkeys(_column(part.name) for part in verdict.parts))
    return sorted(names, key=lambda name: (_LAST_COLUMNS.index(name) if name in _LAST_COLUMNS else -1, name))


def _column(part: str) -> str:
    """Where a part stands in the table of nodes: those of the nodes that lend to a plan stand together."""
    if part.startswith("hop_ms."):
        return "hop_ms"
    return "read_ms.lent" if "/" in part else part


def _fit_row(verdict: NodeVerdict, names: list[str]) -> tuple[str, ...]:
    part: dict[str, float] = {}
    for item in verdict.parts:
        column = _column(item.name)
        part[column] = part.get(column, 0.0) + item.value
    values = [f"{part[name]:.3f}" if name in part else "-" for name in names]
    score = "-" if verdict.score is None else f"{verdict.score:.3f}"
    needed = f"{verdict.needed_bytes:,}" if verdict.needed_bytes else "-"
    return (verdict.node_id, needed, f"{verdict.free_bytes:,}", *values, score, _outcome(verdict))


def _outcome(verdict: NodeVerdict) -> str:
    if verdict.best:
        return "BEST"
    if verdict.shares:
        count = sum(share.layers for share in verdict.shares)
        ranges = ", ".join(layers_text(share) for share in verdict.shares)
        return f"lends {count} layer{'s' * (count != 1)}: {ranges}"
    return "ok" if verdict.refusal is None else _why(verdict)


def _why(verdict: NodeVerdict) -> str:
    return "" if verdict.refusal is None else f"{verdict.refusal.reason}: {verdict.refusal.message}"


def _share_row(share: DeviceShare) -> tuple[str, ...]:
    sizes = (share.weight_bytes, share.kv_bytes, share.compute_bytes, share.margin_bytes, share.total_bytes)
    return (share.device_id, layers_text(share), *(f"{size:,}" for size in sizes))


def layers_text(share: DeviceShare) -> str:
    """Which layers a share holds: `0-15`, `16-31 + output`, `none`."""
    layers = "none" if share.first_layer is None else f"{share.first_layer}-{share.last_layer}"
    held = 0 if share.first_layer is None or share.last_layer is None else share.last_layer - share.first_layer + 1
    if share.layers > held:
        layers = "output" if share.first_layer is None else f"{layers} + output"
    return layers


def _aligned(rows: list[tuple[str, ...]]) -> str:
    """Columns two spaces apart, numbers to the right; the last column is free text when it is the verdict."""
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    return "\n".join("  " + _line(row, widths, free_last=rows[0][-1] == "verdict") for row in rows)


def _line(row: tuple[str, ...], widths: list[int], *, free_last: bool) -> str:
    last = len(row) - 1
    cells = [
        cell.ljust(width) if at == 0 or (free_last and at == last) else cell.rjust(width)
        for at, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()


def bytes_text(size: int) -> str:
    """`4_567_890_123` as `4.25 GiB`."""
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size} B"


def _plain(value: float) -> float:
    return int(value) if value == int(value) else value


def _number(value: float) -> str:
    return f"{value:.0f}" if value == int(value) else f"{value:.3f}"
