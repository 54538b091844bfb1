"""One placement: filter every node, score the rest, choose, and keep all of it as the record."""

from collections import Counter
from collections.abc import Sequence
from operator import attrgetter
from typing import Protocol

import msgspec
from sollol.errors import Reason, Refusal, Retry, refuse
from sollol.names import closest, quoted
from sollol.report import CoordinatorPlan, Decision, Model, NodeStatus, NodeVerdict, PlacementWish

from sollold.placement.classic import ClassicPolicy
from sollold.placement.corrections import correction_in, learned
from sollold.placement.explain import node_table
from sollold.placement.filters import Filter, filters_for, find_model, free_bytes, usual
from sollold.placement.fit import FitPolicy
from sollold.placement.job import Job, PlacementDefaults, job_for
from sollold.placement.observed import observed_of
from sollold.placement.split import best_split
from sollold.placement.together import (
    kept_apart,
    together,
    too_few_lenders,
    with_less_context,
    with_ready,
    with_split,
)

_SILENT = frozenset({Reason.STALE_REPORT, Reason.AGENT_UNREACHABLE})
MOST_ROWS = 32  # of the table in a refusal's message; the record itself has every node


class Policy(Protocol):
    """How good a node is, once no filter refuses it."""

    name: str
    unit: str
    estimate_mb: int | None

    def judge(self, node: NodeStatus, model: Model | None, /) -> NodeVerdict:
        """Score one node, or refuse it for what the score shows."""

    def choose(self, nodes: Sequence[NodeStatus], verdicts: Sequence[NodeVerdict], /) -> int | None:
        """Return the index of the node to take."""

    def plan(self, node: NodeStatus, model: Model | None, /) -> CoordinatorPlan | None: ...

    def estimate_bytes(self, verdicts: Sequence[NodeVerdict], /) -> int: ...


def decide(
    wish: PlacementWish,
    nodes: Sequence[NodeStatus],
    defaults: PlacementDefaults,
    *,
    head_host: str = "",
    files_known: bool = True,
) -> Decision:
    """Choose the node for one more coordinator of `wish.model`.

    Same wish, nodes and defaults: same decision, on any machine, whatever the order of the nodes.

    Args:
        wish: What the asker wants.
        nodes: Every node the head knows, stale ones too.
        defaults: The head's answers for what the wish leaves open.
        head_host: The head's own host, for `wish.local`.
        files_known: False for a list of machines that says nothing about engines and model files (classic only).

    Raises:
        SollolError: the wish itself is invalid (INVALID_REQUEST). That nothing fits is a Decision with a refusal.
    """
    job = job_for(wish, defaults, head_host=head_host)
    if job.policy == "fit" and not files_known:
        raise refuse(Reason.INVALID_REQUEST, "policy fit needs the model's GGUF header: use policy classic")
    ordered = sorted(nodes, key=attrgetter("report.node_id"))
    models = [find_model(node.report, job.model) for node in ordered]
    known = learned(ordered, models)
    if known:
        job = msgspec.structs.replace(job, learned=known)
    observed = observed_of(ordered, models)
    if observed:
        job = msgspec.structs.replace(job, observed=observed)
    decision = _decided(job, ordered, models, files_known=files_known)
    if decision.refusal is not None and decision.refusal.reason is Reason.NO_FIT and job.allow_reduced_context:
        decision = with_less_context(
            job, decision, models, lambda less: _decided(less, ordered, models, files_known=True)
        )
    if not known:
        return decision
    return msgspec.structs.replace(decision, correction=correction_in(decision, known, ordered, models))


def _decided(job: Job, ordered: Sequence[NodeStatus], models: Sequence[Model | None], *, files_known: bool) -> Decision:
    policy: Policy = ClassicPolicy(job) if job.policy == "classic" else FitPolicy(job)
    filters = filters_for(job, files_known=files_known)
    verdicts = [_verdict(job, policy, filters, node, model) for node, model in zip(ordered, models, strict=True)]
    best = policy.choose(ordered, verdicts)
    decision = Decision(
        model=job.model,
        policy=policy.name,
        unit=policy.unit,
        nodes=tuple(verdicts),
        estimate_bytes=policy.estimate_bytes(verdicts if best is None else [verdicts[best]]),
        estimate_mb=policy.estimate_mb,
    )
    split = best_split(job, ordered, models, verdicts, best) if job.policy == "fit" else None
    if split is not None:
        return with_split(decision, split)
    if best is None or (job.backends_per_pool and job.policy == "fit"):
        refusal = _cluster_refusal(job, decision, ordered, models, files_known=files_known)
        return msgspec.structs.replace(decision, refusal=refusal)
    verdicts[best] = msgspec.structs.replace(verdicts[best], best=True)
    placed = msgspec.structs.replace(
        decision,
        nodes=tuple(verdicts),
        coordinator=verdicts[best].node_id,
        coordinator_host=verdicts[best].host,
        plan=policy.plan(ordered[best], models[best]),
    )
    return placed if job.policy == "classic" else with_ready(placed, models[best])


def _verdict(
    job: Job, policy: Policy, filters: tuple[Filter, ...], node: NodeStatus, model: Model | None
) -> NodeVerdict:
    if usual(job, node, model):
        return policy.judge(node, model)
    for check in filters:
        refusal = check(job, node, model)
        if refusal is not None:
            report = node.report
            free = free_bytes(report)
            return NodeVerdict(node_id=report.node_id, host=report.host, refusal=refusal, free_bytes=free)
    return policy.judge(node, model)


def _cluster_refusal(
    job: Job, decision: Decision, nodes: Sequence[NodeStatus], models: Sequence[Model | None], *, files_known: bool
) -> Refusal:
    if not nodes:
        return Refusal(
            reason=Reason.NO_NODES,
            message="no node has reported: start agents (`sollol up` on one machine, `sollol-agent` on several)",
            retry=Retry.RETRYABLE,
        )
    if all(verdict.refusal is not None and verdict.refusal.reason in _SILENT for verdict in decision.nodes):
        return Refusal(
            reason=Reason.NO_NODES,
            message=f"none of {len(nodes)} known nodes has reported lately: are their agents running?",
            retry=Retry.RETRYABLE,
        )
    copies = [model for model in models if model is not None]
    if files_known and not copies:
        return _not_found(decision.model, nodes)
    problems = [model.problem for model in copies if model.problem is not None]
    if copies and len(problems) == len(copies):
        return msgspec.structs.replace(
            problems[0], message=f"every copy of {decision.model} is unusable: {problems[0].message}"
        )
    return too_few_lenders(job, nodes) or _no_fit(job, decision, nodes)


def _not_found(name: str, nodes: Sequence[NodeStatus]) -> Refusal:
    known = {known_as for node in nodes for model in node.report.models for known_as in (model.name, *model.aliases)}
    close = closest(name, known)
    hint = f"closest: {', '.join(close)}" if close else "`sollol models` lists what there is"
    return Refusal(reason=Reason.MODEL_NOT_FOUND, message=f"no node has a model named {quoted(name)}; {hint}")


def _no_fit(job: Job, decision: Decision, nodes: Sequence[NodeStatus]) -> Refusal:
    """Worth asking again when any node may take it later (it may come back, or stop something), or all together may."""
    all_in_all = together(job, nodes, decision.nodes)
    usable = len(all_in_all.nodes)
    refusals = [verdict.refusal for verdict in decision.nodes if verdict.refusal is not None]
    counts = Counter(refusal.reason.value for refusal in refusals)
    summary = ", ".join(f"{reason} on {count}" for reason, count in sorted(counts.items()))
    if job.backends_per_pool:
        summary = f"not with exactly {job.backends_per_pool} backends{f' ({summary})' if summary else ''}"
    retryable = any(refusal.retry is Retry.RETRYABLE for refusal in refusals)
    if usable > 1 and job.policy == "fit":
        retryable = retryable or 0 < decision.estimate_bytes <= all_in_all.total_bytes
    largest = max(decision.nodes, key=lambda verdict: (_largest_layers(verdict), verdict.free_bytes))
    numbers = largest.refusal.numbers if largest.refusal is not None else {}
    layers = f"{numbers.get('largest_layers')} of {numbers.get('all_layers')} layers"
    fit = f"\nlargest possible fit: {layers} on {largest.node_id}" if "largest_layers" in numbers else ""
    if fit and usable > 1:
        free = f"{all_in_all.free_bytes:,} bytes free of {decision.estimate_bytes:,} needed"
        fit += f"; {usable} nodes together have {free}{kept_apart(job, nodes)}"
    return Refusal(
        reason=Reason.NO_FIT,
        message=f"no node can take {decision.model}: {summary}\n{node_table(decision, MOST_ROWS)}{fit}",
        retry=Retry.RETRYABLE if retryable else Retry.FATAL,
        numbers={
            "nodes": len(decision.nodes),
            "needed_bytes": decision.estimate_bytes,
            "largest_free_bytes": max(verdict.free_bytes for verdict in decision.nodes),
            "usable_nodes": usable,
            "free_together_bytes": all_in_all.free_bytes,
        },
    )


def _largest_layers(verdict: NodeVerdict) -> int:
    return -1 if verdict.refusal is None else verdict.refusal.numbers.get("largest_layers", -1)
