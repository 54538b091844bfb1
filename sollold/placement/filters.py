"""Facts that keep a model off a node, cheapest first. A filter says "cannot"; "rather not" is a score's business.

Adding one: a function, a line in `filters_for`, a test.
"""

from collections.abc import Callable

from sollol.errors import Reason, Refusal, Retry
from sollol.report import DeviceKind, InstanceState, Model, NodeStatus, Report

from sollold.placement.job import Job, has_label, label_text

Filter = Callable[[Job, NodeStatus, Model | None], Refusal | None]


def filters_for(job: Job, *, files_known: bool) -> tuple[Filter, ...]:
    """The filters that can refuse a node for this job, in the order of their asking.

    Args:
        job: What is to be placed.
        files_known: False for a list of machines that says nothing about their agents, engines and model files.
    """
    always = True
    policy: tuple[tuple[bool, Filter], ...] = (
        (always, stale_report),
        (files_known, out_of_reach),
        (always, cordoned),
        (bool(job.pinned_node), not_pinned),
        (job.local, not_local),
        (bool(job.require), label_missing),
        (job.min_cpus > 0, cpus_short),
        (job.min_memory_bytes > 0, memory_short),
        (files_known, engine_missing),
        (files_known, model_absent),
        (files_known, model_unusable),
        (files_known, backing_off),
    )
    return tuple(check for active, check in policy if active)


def usual(job: Job, node: NodeStatus, model: Model | None) -> bool:
    """Whether no filter can refuse the node, told without asking each: that took a quarter of a whole decision.

    False says nothing. A filter that comes to the policy comes here too; a test compares them.
    """
    report = node.report
    return (
        job.takes_any_node
        and node.connected
        and node.report_age_s <= job.stale_after_s
        and not report.cordoned
        and report.engine is not None
        and model is not None
        and model.problem is None
        and not report.instances
    )


def find_model(report: Report, name: str) -> Model | None:
    """The node's model of this name, else the first that has it as an alias."""
    for model in report.models:
        if model.name == name:
            return model
    for model in report.models:
        if name in model.aliases:
            return model
    return None


def free_bytes(report: Report) -> int:
    """What all usable devices have free together; unified memory is the CPU's and counts once."""
    devices = report.devices
    free = devices[0].free_bytes  # the CPU
    if len(devices) == 1:
        return free
    for device in devices[1:]:
        if device.usable and not device.unified:
            free += device.free_bytes
    return free


def total_bytes(report: Report) -> int:
    """The same devices, were nothing running there; a human's cap counts."""
    return sum(
        device.total_bytes if device.cap_bytes is None else min(device.cap_bytes, device.total_bytes)
        for device in report.devices
        if device.kind is DeviceKind.CPU or (device.usable and not device.unified)
    )


def stale_report(job: Job, node: NodeStatus, _model: Model | None) -> Refusal | None:
    if node.report_age_s <= job.stale_after_s:
        return None
    return Refusal(
        reason=Reason.STALE_REPORT,
        message=f"last report is {node.report_age_s:.1f} s old (limit {job.stale_after_s:g} s): is its agent running?",
        retry=Retry.RETRYABLE,
        numbers={"age_ms": round(node.report_age_s * 1000), "stale_after_ms": round(job.stale_after_s * 1000)},
    )


def out_of_reach(_job: Job, node: NodeStatus, _model: Model | None) -> Refusal | None:
    """It may be back in a moment; whoever has nobody else waits for it."""
    if node.connected:
        return None
    doing = "is being restarted" if node.restarting else "does not answer"
    message = f"out of reach: its agent {doing} ({node.report_age_s:.1f} s)"
    return Refusal(reason=Reason.AGENT_UNREACHABLE, message=message, retry=Retry.RETRYABLE)


def cordoned(_job: Job, node: NodeStatus, _model: Model | None) -> Refusal | None:
    if not node.report.cordoned:
        return None
    message = "cordoned by an operator: takes no new models"
    return Refusal(reason=Reason.CORDONED, message=message, retry=Retry.RETRYABLE)  # until it is uncordoned


def not_pinned(job: Job, node: NodeStatus, _model: Model | None) -> Refusal | None:
    if node.report.node_id == job.pinned_node:
        return None
    return Refusal(reason=Reason.NOT_PINNED, message=f"not the pinned node {job.pinned_node}")


def not_local(job: Job, node: NodeStatus, _model: Model | None) -> Refusal | None:
    if node.report.host in job.own_hosts:
        return None
    return Refusal(reason=Reason.NOT_LOCAL, message=f"on {node.report.host}, not on the head's own host")


def label_missing(job: Job, node: NodeStatus, _model: Model | None) -> Refusal | None:
    missing = [label_text(label) for label in job.require if not has_label(node.report.labels, label)]
    if not missing:
        return None
    return Refusal(reason=Reason.LABEL_MISSING, message=f"lacks the required label {', '.join(missing)}")


def cpus_short(job: Job, node: NodeStatus, _model: Model | None) -> Refusal | None:
    have = node.report.cpu_count
    if have >= job.min_cpus:
        return None
    return Refusal(
        reason=Reason.CPUS_SHORT,
        message=f"has {have} CPUs, {job.min_cpus} asked for",
        numbers={"needed_cpus": job.min_cpus, "cpus": have},
    )


def memory_short(job: Job, node: NodeStatus, _model: Model | None) -> Refusal | None:
    free = free_bytes(node.report)
    if free >= job.min_memory_bytes:
        return None
    return Refusal(
        reason=Reason.MEMORY_SHORT,
        message=f"has {free} bytes free, at least {job.min_memory_bytes} asked for",
        numbers={"needed_bytes": job.min_memory_bytes, "free_bytes": free},
    )


def engine_missing(_job: Job, node: NodeStatus, _model: Model | None) -> Refusal | None:
    if node.report.engine is not None:
        return None
    return Refusal(reason=Reason.ENGINE_MISSING, message="has no llama-server: run `sollol engine build` there")


def model_absent(job: Job, _node: NodeStatus, model: Model | None) -> Refusal | None:
    if model is not None:
        return None
    return Refusal(reason=Reason.MODEL_ABSENT, message=f"does not have {job.model} on disk")


def model_unusable(_job: Job, _node: NodeStatus, model: Model | None) -> Refusal | None:
    """MODEL_CORRUPT or MODEL_UNSUPPORTED, as the agent that read the header says."""
    return None if model is None else model.problem


def backing_off(job: Job, node: NodeStatus, _model: Model | None) -> Refusal | None:
    """A coordinator for this model keeps failing there: its supervisor, not we, decides when to try again.

    Pools run under the name that was asked for, which on this node may be an alias.
    """
    for instance in node.report.instances:
        if instance.state is InstanceState.BACKOFF and instance.model == job.model:
            return Refusal(
                reason=Reason.BACKING_OFF,
                message=f"{instance.instance_id} failed there and waits before its next start",
                retry=Retry.RETRYABLE,
            )
    return None
