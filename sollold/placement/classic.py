"""The seed's formula, exactly, in its megabytes of 2**20 bytes: totals, model size guessed from the name.

    score = RAM + sum(VRAM) - 2048 x billions in the name + 5000 when the node has a GPU; the best positive score wins.

It knows nothing of quantization, context or free memory: the node's ledger, asked before anything starts, is what keeps
a wrong guess from hurting.
"""

from collections.abc import Sequence

from sollol.errors import Reason, Refusal
from sollol.names import billions_in
from sollol.report import CoordinatorPlan, DeviceKind, Model, NodeStatus, NodeVerdict, Report, ScorePart

from sollold.placement.filters import free_bytes
from sollold.placement.fit import FitPolicy
from sollold.placement.job import Job
from sollold.placement.preference import tie_order

MB = 2**20
MB_PER_BILLION = 2048
UNNAMED_ESTIMATE_MB = 16384
GPU_BONUS_MB = 5000


def estimate_mb(name: str) -> int:
    billions = billions_in(name)
    return UNNAMED_ESTIMATE_MB if billions is None else MB_PER_BILLION * billions


class ClassicPolicy:
    name = "classic"
    unit = "MB"

    def __init__(self, job: Job) -> None:
        self._job = job
        self.estimate_mb: int | None = estimate_mb(job.model)

    def judge(self, node: NodeStatus, _model: Model | None) -> NodeVerdict:
        report = node.report
        parts = _parts(report, self.estimate_mb or 0)
        score = sum(part.value for part in parts)
        return NodeVerdict(
            node_id=report.node_id,
            host=report.host,
            score=score,
            parts=parts,
            refusal=None if score > 0 else _too_low(score),
            needed_bytes=(self.estimate_mb or 0) * MB,
            free_bytes=free_bytes(report),
        )

    def choose(self, nodes: Sequence[NodeStatus], verdicts: Sequence[NodeVerdict]) -> int | None:
        fitting = [at for at, verdict in enumerate(verdicts) if verdict.refusal is None]
        return min(
            fitting, key=lambda at: (-(verdicts[at].score or 0), *tie_order(self._job, nodes[at].report)), default=None
        )

    def plan(self, node: NodeStatus, model: Model | None) -> CoordinatorPlan | None:
        """By the memory model, as for fit. Where fit sees no room all stays on the CPU, and the ledger decides."""
        return FitPolicy(self._job).plan(node, model)

    def estimate_bytes(self, _verdicts: Sequence[NodeVerdict]) -> int:
        return (self.estimate_mb or 0) * MB


def _parts(report: Report, estimate: int) -> tuple[ScorePart, ...]:
    gpus = [device for device in report.devices if device.kind is DeviceKind.GPU]
    return (
        ScorePart("ram_mb", report.devices[0].total_bytes // MB),
        ScorePart("vram_mb", sum(gpu.total_bytes // MB for gpu in gpus if not gpu.unified)),
        ScorePart("estimate_mb", -estimate),
        ScorePart("gpu_bonus_mb", GPU_BONUS_MB if gpus else 0),
    )


def _too_low(score: float) -> Refusal:
    return Refusal(
        reason=Reason.SCORE_TOO_LOW,
        message=f"scores {score:.0f} MB; classic takes only positive scores",
        numbers={"short_mb": round(1 - score)},
    )
