"""Puts a plan into the record, and says what the nodes could do together when nothing fits."""

from collections.abc import Callable, Sequence

from msgspec.structs import replace
from sollol.errors import Reason, Refusal, Retry
from sollol.memory import CELLS
from sollol.report import Decision, DeviceShare, Model, NodeStatus, NodeVerdict

from sollold.placement.filters import free_bytes
from sollold.placement.job import Job
from sollold.placement.lenders import may_lend, only_short
from sollold.placement.links import Links
from sollold.placement.ready import ready_parts
from sollold.placement.split import Split


def with_split(decision: Decision, split: Split) -> Decision:
    """The decision for this plan: its coordinator is the best node, and each other node of it lends."""
    verdicts = list(decision.nodes)
    chosen = verdicts[split.coordinator]
    held: dict[str, list[DeviceShare]] = {}
    for share in split.plan.shares:
        held.setdefault(share.node_id or chosen.node_id, []).append(share)
    for at, verdict in enumerate(verdicts):
        shares = tuple(held.get(verdict.node_id, ()))
        if shares:
            needed = sum(share.total_bytes for share in shares)
            verdicts[at] = replace(verdict, shares=shares, needed_bytes=needed)
    verdicts[split.coordinator] = replace(
        verdicts[split.coordinator],
        score=sum(part.value for part in split.parts),
        parts=split.parts,
        refusal=None,
        best=True,
    )
    return replace(
        decision,
        nodes=tuple(verdicts),
        estimate_bytes=sum(share.total_bytes for share in split.plan.shares),
        coordinator=chosen.node_id,
        coordinator_host=chosen.host,
        plan=split.plan,
        ready_s=sum(part.value for part in split.ready),
        ready_parts=split.ready,
        links=split.links,
    )


def with_ready(decision: Decision, model: Model | None) -> Decision:
    """The decision for a single node, with what it takes until the model is ready there."""
    if decision.plan is None or model is None:
        return decision
    parts = ready_parts(decision.coordinator, model, decision.plan, Links())
    return replace(decision, ready_s=sum(part.value for part in parts), ready_parts=parts)


def free_together(job: Job, nodes: Sequence[NodeStatus], verdicts: Sequence[NodeVerdict]) -> tuple[int, int]:
    """How many nodes could hold a part of the model, and what their usable devices have free; none for a job that must
    not be split.
    """
    if job.max_nodes == 1:
        return 0, 0
    usable = [
        node
        for node, verdict in zip(nodes, verdicts, strict=True)
        if verdict.refusal is None or only_short(verdict) or may_lend(job, node)
    ]
    return len(usable), sum(free_bytes(node.report) for node in usable)


def too_few_lenders(job: Job, nodes: Sequence[NodeStatus]) -> Refusal | None:
    """Why there cannot be as many backends as asked for: each is on a node of its own."""
    if job.policy != "fit" or not job.backends_per_pool:
        return None
    able = sum(may_lend(job, node) for node in nodes)
    if able >= job.backends_per_pool:
        return None
    return Refusal(
        reason=Reason.NO_FIT,
        message=f"{job.backends_per_pool} backends are asked for, and {able} of {len(nodes)} nodes can lend: a backend "
        "needs a node with a fresh report, an engine with RPC, and the required labels; ask for fewer, or add nodes",
        retry=Retry.RETRYABLE if len(nodes) >= job.backends_per_pool else Retry.FATAL,
        numbers={"nodes": len(nodes), "needed_backends": job.backends_per_pool, "usable_nodes": able},
    )


def with_less_context(
    job: Job, refused: Decision, models: Sequence[Model | None], decide: Callable[[Job], Decision]
) -> Decision:
    """The decision for the longest context that fits somewhere, in whole blocks of cells; `refused` when none does.

    Less context never needs more bytes, so the blocks are halved until they are found.
    """
    trained = max((model.shape.context_length for model in models if model and model.shape), default=0)
    asked = min(job.context_per_slot, trained or job.context_per_slot)
    best = refused
    low, high = 0, -(-asked // CELLS)  # `low` blocks fit, `high` do not
    while high - low > 1:
        middle = (low + high) // 2
        tried = decide(replace(job, context_per_slot=middle * CELLS))
        if tried.refusal is None:
            low, best = middle, replace(tried, reduced_context_from=asked)
        else:
            high = middle
    return best
