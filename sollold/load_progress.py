"""How far a load is: the engine's own percent for what stays on its node, and bytes that arrived for what is sent.

The engine counts a tensor as loaded once it is handed to the network. Each backend's node counts what has arrived, of
the bytes of weights planned for it.
"""

import asyncio
from collections.abc import Callable, Mapping

from sollol.inference import NodeProgress, Progress
from sollol.report import Instance, InstanceKind, NodeStatus

EVERY_S = 0.5
_MOST = 99.0  # until the engine serves


def progress_of(coordinator: Instance, node_id: str, status: Callable[[str], NodeStatus | None]) -> Progress:
    """The progress of a coordinator that starts on `node_id`, given what is known of the other nodes."""
    planned = _planned(coordinator)
    sent = {lender: size for lender, size in planned.items() if lender}
    total = sum(planned.values())
    if not sent or not total:
        return Progress(state="loading", percent=coordinator.percent, node_id=node_id)
    nodes = tuple(NodeProgress(node_id=lender, percent=_arrived(coordinator, status(lender))) for lender in sent)
    done = planned.get("", 0) * coordinator.percent + sum(sent[each.node_id] * each.percent for each in nodes)
    return Progress(state="loading", percent=min(_MOST, done / total), node_id=node_id, nodes=nodes)


def _planned(coordinator: Instance) -> Mapping[str, int]:
    """Bytes of weights by the node they are sent to; "" for those that the coordinator keeps."""
    planned: dict[str, int] = {}
    for share in coordinator.shares:
        planned[share.node_id] = planned.get(share.node_id, 0) + share.weight_bytes
    return planned


def _arrived(coordinator: Instance, lender: NodeStatus | None) -> float:
    for instance in lender.report.instances if lender is not None else ():
        if instance.kind is InstanceKind.BACKEND and instance.pool_id == coordinator.pool_id:
            return instance.percent
    return 0.0


class LoadProgress:
    """Tells the progress of one load: with each change of its coordinator, and of its backends by and by."""

    def __init__(
        self, node_id: str, status: Callable[[str], NodeStatus | None], on_progress: Callable[[Progress], None]
    ) -> None:
        self._node_id, self._status, self._on_progress = node_id, status, on_progress
        self._coordinator: Instance | None = None
        self._told: Progress | None = None

    def heard(self, coordinator: Instance) -> None:
        self._coordinator = coordinator
        self._tell()

    async def keep_telling(self) -> None:
        while True:
            await asyncio.sleep(EVERY_S)
            self._tell()

    def _tell(self) -> None:
        if self._coordinator is not None:
            progress = progress_of(self._coordinator, self._node_id, self._status)
            if progress != self._told:
                self._told = progress
                self._on_progress(progress)
