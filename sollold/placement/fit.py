"""Placement by what the GGUF header says: feasible in bytes, best in predicted milliseconds per token.

Generating one token reads every active weight once, so memory bandwidth bounds it:

    score = sum over devices (bytes read per token / bandwidth) + busy_ms; the lowest wins.

`busy_ms` is what other pools cost: each instance that is generating on the node takes an equal turn at the same
memory, so it is the sum of the reads times the number of such instances. What was observed of the model corrects that
by one part more: `observed_ms` where this very plan ran before, else `scaled_ms`. Nodes within 5 % of the best are
equals, for a prediction is not better than that: preferred labels, pack or spread, and the node id order those, in this
sequence.
"""

from collections.abc import Sequence

from msgspec.structs import replace
from sollol.errors import Reason, Refusal, Retry
from sollol.report import CoordinatorPlan, Model, ModelShape, NodeStatus, NodeVerdict, Report, ScorePart

from sollold.placement.corrections import corrections_for
from sollold.placement.filters import free_bytes, total_bytes
from sollold.placement.job import Job
from sollold.placement.layout import Layout, Layouts, layouts_for, read_ms, read_parts
from sollold.placement.preference import tie_order

EQUAL_WITHIN = 1.05
IDLE = ScorePart("busy_ms", 0.0)


class FitPolicy:
    name = "fit"
    unit = "ms/token"
    estimate_mb: int | None = None

    def __init__(self, job: Job) -> None:
        self._job = job
        self._load = job.load
        self._by_identity: dict[int, Layouts] = {}

    def judge(self, node: NodeStatus, model: Model | None) -> NodeVerdict:
        # The filters let only models with a readable header through.
        assert model is not None
        assert model.shape is not None
        report = node.report
        layouts = self._by_identity.get(id(model.shape)) or self._layouts(model.shape)
        layout = layouts.best(report.devices)
        if layout is None:
            return _short(report, layouts)
        parts = read_parts(layout, report.devices)
        reads_ms = parts[0].value if len(parts) == 1 else sum([part.value for part in parts])
        busy_ms = reads_ms * generating(report) if report.instances else 0.0
        parts.append(ScorePart("busy_ms", busy_ms) if busy_ms else IDLE)
        score = reads_ms + busy_ms
        if self._job.observed:
            parts.append(self._correction(report, layout, reads_ms))
            score += parts[-1].value
        return NodeVerdict(
            node_id=report.node_id,
            host=report.host,
            score=score,
            parts=tuple(parts),
            needed_bytes=layout.total_bytes,
            free_bytes=free_bytes(report),
        )

    def choose(self, nodes: Sequence[NodeStatus], verdicts: Sequence[NodeVerdict]) -> int | None:
        scores = [verdict.score for verdict in verdicts if verdict.score is not None]
        if not scores:
            return None
        limit = min(scores) * EQUAL_WITHIN
        job = self._job
        equals = [
            (tie_order(job, nodes[at].report), at)
            for at, verdict in enumerate(verdicts)
            if verdict.score is not None and verdict.score <= limit
        ]
        return min(equals)[1]

    def plan(self, node: NodeStatus, model: Model | None) -> CoordinatorPlan | None:
        """The layout `judge` scored; everything on the CPU where nothing fits; None without a header."""
        if model is None or model.shape is None:
            return None
        layouts = self._layouts(model.shape)
        devices = node.report.devices
        layout = layouts.best(devices) or layouts.on_cpu(devices[0])
        return replace(layouts.plan(model.name, layout), predicted_ms_per_token=read_ms(layout, devices))

    def estimate_bytes(self, verdicts: Sequence[NodeVerdict]) -> int:
        """The least that any node would need for it."""
        return min([verdict.needed_bytes for verdict in verdicts if verdict.needed_bytes], default=0)

    def _correction(self, report: Report, layout: Layout, predicted_ms: float) -> ScorePart:
        job, engine = self._job, report.engine
        threads = engine.threads if engine is not None else 0
        return job.observed.correction(report.node_id, layout.shares, job.kv_type, lambda _: threads, predicted_ms)

    def _layouts(self, shape: ModelShape) -> Layouts:
        """By identity first: hashing a shape costs more than judging a node."""
        layouts = self._by_identity.get(id(shape))
        if layouts is None:
            known = corrections_for(self._job.learned, shape, self._load)
            layouts = self._by_identity[id(shape)] = layouts_for(shape, self._load, known)
        return layouts


def generating(report: Report) -> int:
    """How many instances on the node are producing tokens now."""
    return sum(instance.active_streams > 0 for instance in report.instances)


def _short(report: Report, layouts: Layouts) -> NodeVerdict:
    needed = layouts.on_cpu(report.devices[0]).total_bytes
    free = free_bytes(report)
    layers = layouts.most_layers(report.devices)
    return NodeVerdict(
        node_id=report.node_id,
        host=report.host,
        needed_bytes=needed,
        free_bytes=free,
        refusal=Refusal(
            reason=Reason.MEMORY_SHORT,
            message=f"needs {needed:,} bytes, {free:,} free: {layers} of {layouts.all_layers} layers would fit",
            retry=Retry.RETRYABLE if needed <= total_bytes(report) else Retry.FATAL,
            numbers={
                "needed_bytes": needed,
                "free_bytes": free,
                "largest_layers": layers,
                "all_layers": layouts.all_layers,
            },
        ),
    )
