"""What is left on a node that is drained, and which pools are to be stopped. Pure."""

from collections.abc import Iterable

from sollol.report import Instance, InstanceKind, InstanceState, NodeStatus, Pool

# Those with a process. One that starts is left alone until it is ready: its load is somebody's, and goes elsewhere by
# itself afterwards. One that is lost is ended by its agent.
_RUNNING = frozenset({InstanceState.STARTING, InstanceState.READY, InstanceState.STOPPING, InstanceState.LOST})


def nodes_of(coordinator: str, instance: Instance) -> frozenset[str]:
    """The nodes that a coordinator's pool has parts on."""
    return frozenset({coordinator, *(share.node_id for share in instance.shares if share.node_id)})


def left_on(node_id: str, statuses: Iterable[NodeStatus]) -> tuple[Pool, ...]:
    """What still runs there, and the pools elsewhere that it lends to."""
    return tuple(
        Pool(node_id=status.report.node_id, instance=instance)
        for status in statuses
        for instance in status.report.instances
        if instance.state in _RUNNING
        and (status.report.node_id == node_id or node_id in nodes_of(status.report.node_id, instance))
    )


def to_stop(statuses: Iterable[NodeStatus]) -> tuple[Pool, ...]:
    """The pools with a part on a draining node, whether or not they have streams; of those whose agent can be asked."""
    seen = tuple(statuses)
    draining = {status.report.node_id for status in seen if status.report.draining}
    if not draining:
        return ()
    return tuple(
        Pool(node_id=status.report.node_id, instance=instance)
        for status in seen
        for instance in status.report.instances
        if status.connected
        and instance.kind is InstanceKind.COORDINATOR
        and instance.state is InstanceState.READY
        and not draining.isdisjoint(nodes_of(status.report.node_id, instance))
    )
