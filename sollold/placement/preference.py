"""Which of several equally good nodes: preferred labels first, then pack or spread, then the node id."""

from sollol.report import InstanceState, Report

from sollold.placement.filters import free_bytes
from sollold.placement.job import Job, has_label

LIVE_STATES = frozenset({InstanceState.STARTING, InstanceState.READY})


def tie_order(job: Job, report: Report) -> tuple[int, int, int, str]:
    """Sorts the node to be taken first.

    `pack` takes the node with the most live instances, then the least free memory, so that whole nodes stay empty for
    big models; `spread` the opposite, so that one node's death costs the least.
    """
    liked = sum([has_label(report.labels, label) for label in job.prefer]) if job.prefer else 0
    sign = -1 if job.strategy == "pack" else 1
    running = sum([instance.state in LIVE_STATES for instance in report.instances]) if report.instances else 0
    return -liked, sign * running, -sign * free_bytes(report), report.node_id
