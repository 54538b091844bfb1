"""Decisions side by side: one row for each variant of a wish. Decides nothing."""

from collections.abc import Sequence

from sollol.report import CoordinatorPlan, Decision

from sollold.placement.explain import layers_text

COLUMNS = ("VARIANT", "FITS", "COORDINATOR", "NODES", "LAYERS", "TOTAL BYTES", "KV BYTES", "MS/TOKEN", "WHY NOT")


def compared(variants: Sequence[tuple[str, Decision]]) -> list[tuple[str, ...]]:
    """The rows of a table with these columns."""
    return [_row(name, decision) for name, decision in variants]


def _row(name: str, decision: Decision) -> tuple[str, ...]:
    if decision.refusal is not None:
        why = f"{decision.refusal.reason}: {decision.refusal.message.splitlines()[0]}"
        return (name, "no", "-", "-", "-", "-", "-", "-", why)
    reduced = decision.reduced_context_from is not None and decision.plan is not None
    fits = f"with a context of {decision.plan.context_per_slot}" if reduced and decision.plan else "yes"
    score = next((verdict.score for verdict in decision.nodes if verdict.best), None)
    ms = "-" if score is None or decision.unit != "ms/token" else f"{score:.3f}"
    return (name, fits, decision.coordinator, *_plan_cells(decision), ms, "")


def _plan_cells(decision: Decision) -> tuple[str, str, str, str]:
    """Nodes, layers, bytes and those of the KV cache; policy classic plans nothing for models it knows by name only."""
    plan = decision.plan
    if plan is None:
        return "1", "-", "-", "-"
    nodes = {share.node_id or decision.coordinator for share in plan.shares}
    total, kv = (sum(getattr(share, part) for share in plan.shares) for part in ("total_bytes", "kv_bytes"))
    return str(len(nodes)), _layers(plan, decision.coordinator), f"{total:,}", f"{kv:,}"


def _layers(plan: CoordinatorPlan, coordinator: str) -> str:
    held = (share for share in plan.shares if share.layers)
    return ", ".join(f"{share.node_id or coordinator}/{share.device_id} {layers_text(share)}" for share in held)
