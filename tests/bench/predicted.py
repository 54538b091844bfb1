"""Predicted against measured speed of plans: what is compared, what is asked of it, and how it is written down. Pure."""

from collections.abc import Sequence
from itertools import combinations
from statistics import median

from msgspec import Struct

DIFFERENT = 1.15  # pairs of plans that differ by more than this must be in the right order
RIGHT_ORDER = 0.9  # of those, so many at least
WORST_ERROR = 0.15  # once a plan has been observed
MIB = 2**20
INTRODUCTION = """\
# Predicted and measured speed

Made by `python -m tests.bench.predictions --write docs/speed.md`: a head and three agents on one machine of two cores,
real llama.cpp, models of two sizes, both larger than the cache that this machine shares with others (how much of a
smaller one is cached, and so its speed, changes by half from second to second). Each plan is the head's own decision
for a wish. It is loaded, answers once through the head, and is then measured: the median of three more answers, as
their reader sees them, from the first token to the last. Figures are tokens per second of one stream. *observed* is
what placement counts with after the one answer. "own" is the coordinator's own process; every other part is a backend
behind its forwarder, n1 on the coordinator's node.

Plans with more engine threads than cores are not among them: threads that wait for each other spin, and what they wait
for does not run. With two threads the engine shares its cores with agent, head and reader, which the prediction leaves
out. Pairs are of models whose weights are stored alike: a prediction counts bytes, and Q4_0 costs this machine more to
unpack than to read (over RPC, where llama.cpp does not repack it, even more), which only observation tells.
"""


class Plan(Struct, frozen=True, kw_only=True):
    """One plan that ran; times are ms per token, `measured_ms` the median of several runs, `runs_ms` all of them.

    `model`: its size and how its weights are stored, `large-F16`.
    """

    model: str
    read_bytes: int
    threads: int
    backends: int
    layers: str
    predicted_ms: float
    observed_ms: float  # what the head says once the agent has observed one answer
    runs_ms: tuple[float, ...]

    @property
    def measured_ms(self) -> float:
        return median(self.runs_ms)

    @property
    def kind(self) -> str:
        return self.model.rpartition("-")[2]


class Verdict(Struct, frozen=True, kw_only=True):
    pairs: int
    right: int
    worst_error: float

    @property
    def holds(self) -> bool:
        return self.right >= RIGHT_ORDER * self.pairs and self.worst_error <= WORST_ERROR


def verdict(plans: Sequence[Plan]) -> Verdict:
    pairs = [pair for pair in combinations(plans, 2) if _comparable(*pair) and _differ(*pair)]
    return Verdict(
        pairs=len(pairs),
        right=sum(
            (one.predicted_ms < other.predicted_ms) == (one.measured_ms < other.measured_ms) for one, other in pairs
        ),
        worst_error=max(error(plan.observed_ms, plan) for plan in plans),
    )


def error(ms: float, plan: Plan) -> float:
    """Of tokens per second, as a part of what was measured."""
    return abs(plan.measured_ms / ms - 1)


def scaled_ms(plan: Plan, plans: Sequence[Plan]) -> float:
    """What a head would predict had it observed all other plans of the model, but not this one."""
    others = [each.observed_ms / each.predicted_ms for each in plans if each.model == plan.model and each is not plan]
    return plan.predicted_ms * (median(others) if others else 1.0)


def _comparable(one: Plan, other: Plan) -> bool:
    """Bytes say nothing of what it costs to unpack them: models of one kind of weights are compared."""
    return one.kind == other.kind


def _differ(one: Plan, other: Plan) -> bool:
    slow, fast = max(one.measured_ms, other.measured_ms), min(one.measured_ms, other.measured_ms)
    return slow > fast * DIFFERENT


HEAD = ("model", "threads", "backends", "layers", "predicted", "measured", "error", "observed", "error")


def row(plan: Plan) -> tuple[str, ...]:
    return (
        f"{plan.model}, {plan.read_bytes / MIB:.0f} MiB",
        str(plan.threads),
        str(plan.backends or "none"),
        plan.layers,
        f"{1000 / plan.predicted_ms:.1f}",
        f"{1000 / plan.measured_ms:.1f}",
        _percent(plan.predicted_ms, plan),
        f"{1000 / plan.observed_ms:.1f}",
        _percent(plan.observed_ms, plan),
    )


def _percent(ms: float, plan: Plan) -> str:
    return f"{100 * (plan.measured_ms / ms - 1):+.0f} %"


def summary(plans: Sequence[Plan]) -> list[str]:
    found = verdict(plans)
    order = f"{found.right} in the right order (asked: {100 * RIGHT_ORDER:.0f} %)"
    return [
        f"{len(plans)} plans, {found.pairs} pairs that differ by more than {100 * (DIFFERENT - 1):.0f} %: {order}.",
        f"Worst error after one observation: {100 * found.worst_error:.1f} % (asked: {100 * WORST_ERROR:.0f} %).",
        *(_medians(kind, [plan for plan in plans if plan.kind == kind], plans) for kind in _kinds(plans)),
    ]


def _medians(kind: str, some: Sequence[Plan], plans: Sequence[Plan]) -> str:
    predicted = median(error(plan.predicted_ms, plan) for plan in some)
    scaled = median(error(scaled_ms(plan, plans), plan) for plan in some)
    observed = median(error(plan.observed_ms, plan) for plan in some)
    return (
        f"Median error of {kind} plans: {100 * predicted:.0f} % as predicted, {100 * scaled:.0f} % had only the other "
        f"plans of the model run, {100 * observed:.0f} % after one observation."
    )


def _kinds(plans: Sequence[Plan]) -> list[str]:
    return list(dict.fromkeys(plan.kind for plan in plans))


def as_table(plans: Sequence[Plan]) -> str:
    table = [HEAD, *map(row, plans)]
    widths = [max(len(row[at]) for row in table) for at in range(len(HEAD))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
    return "\n".join([*lines, "", *summary(plans)])


def as_page(plans: Sequence[Plan]) -> str:
    table = [HEAD, ("---",) * len(HEAD), *map(row, plans)]
    lines = "\n".join(f"| {' | '.join(row)} |" for row in table)
    return f"{INTRODUCTION}\n{lines}\n\n" + "\n".join(f"- {line}" for line in summary(plans)) + "\n"
