"""Puts a plan into the record, and says what the nodes could do together when nothing fits."""

from collections.abc import Callable, Sequence

from msgspec import Struct
from msgspec.structs import replace
from sollol.errors import Reason, Refusal, Retry
from sollol.memory import CELLS
from sollol.report import Decision, DeviceShare, Model, NodeStatus, NodeVerdict, RpcTransport

from sollold.placement.filters import free_bytes, total_bytes
from sollold.placement.job import Job
from sollold.placement.lenders import may_lend, only_short
from sollold.placement.links import Links, measured
from sollold.placement.ready import ready_parts
from sollold.placement.split import Split

MOST_APART = 4  # nodes, or pairs of them, named in a refusal's message


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


class Together(Struct, frozen=True, kw_only=True):
    """Nodes that could hold a part of the model: what their usable devices have free, and would have if nothing ran
    there.
    """

    nodes: tuple[NodeStatus, ...]
    free_bytes: int
    total_bytes: int


def together(job: Job, nodes: Sequence[NodeStatus], verdicts: Sequence[NodeVerdict]) -> Together:
    """No nodes for a job that must not be split."""
    usable = tuple(
        node
        for node, verdict in zip(nodes, verdicts, strict=True)
        if job.max_nodes > 1 and (verdict.refusal is None or only_short(verdict) or may_lend(job, node))
    )
    return Together(
        nodes=usable,
        free_bytes=sum(free_bytes(node.report) for node in usable),
        total_bytes=sum(total_bytes(node.report) for node in usable),
    )


def kept_apart(job: Job, nodes: Sequence[NodeStatus]) -> str:
    """Why nodes that have the room together may still not be of one plan."""
    pairs = sorted(measured(job.links, nodes).unreachable)
    told = [f"{one} cannot reach {other}" for one, other in pairs[:MOST_APART]]
    more = f" and {len(pairs) - MOST_APART} more" if len(pairs) > MOST_APART else ""
    apart = f"; {', '.join(told)}{more}" if told else ""
    ways = {way: [node for node in nodes if node.report.rpc_transport is way] for way in RpcTransport}
    if not all(ways.values()):
        return apart
    by_tunnel, directly = _names(ways[RpcTransport.TUNNEL]), _names(ways[RpcTransport.DIRECT])
    differ = f"RPC bytes of {by_tunnel} travel by tunnel, of {directly} directly"
    return f"{apart}; {differ}: set rpc_transport alike, and give a certificate to all or to none"


def _names(nodes: Sequence[NodeStatus]) -> str:
    more = f" and {len(nodes) - MOST_APART} more" if len(nodes) > MOST_APART else ""
    return ", ".join(node.report.node_id for node in nodes[:MOST_APART]) + more


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
