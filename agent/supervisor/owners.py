"""Every instance that runs, and those that ended not long ago, in the order of their starts."""

import asyncio
from collections.abc import Iterator

from sollol.errors import Reason, refuse
from sollol.report import InstanceKind, InstanceState

from agent.supervisor.files import Directories, files_of, remove_oldest_logs
from agent.supervisor.lending import forwarder_id
from agent.supervisor.owner import Owner
from agent.supervisor.tunnelling import tunnel_id

KEPT_RECORDS = 20
KEPT_RECORD_S = 600.0
LONGEST_ID = 200
USEFUL = frozenset({InstanceState.STARTING, InstanceState.READY})


class Owners:
    """By instance id. Forgets what is too old to keep, and its log."""

    def __init__(self, directories: Directories) -> None:
        self._directories = directories
        self._all: dict[str, Owner] = {}

    def __iter__(self) -> Iterator[Owner]:
        return iter(tuple(self._all.values()))

    def get(self, instance_id: str) -> Owner | None:
        return self._all.get(instance_id)

    def find(self, instance_id: str) -> Owner:
        """Raises SollolError: INSTANCE_NOT_FOUND."""
        try:
            return self._all[instance_id]
        except KeyError:
            message = f"this node runs no instance {instance_id[:LONGEST_ID]}; it may have ended long ago"
            raise refuse(Reason.INSTANCE_NOT_FOUND, message, retryable=True) from None

    def add(self, owner: Owner) -> None:
        self._all[owner.view.instance_id] = owner

    def live(self) -> list[Owner]:
        return [item for item in self if item.is_live]

    async def leave(self) -> None:
        """Let those that start or serve, and shall not stop, run on, and know them no more."""
        useful = [item for item in self if item.view.state in USEFUL and not item.shall_stop]
        await asyncio.gather(*(item.leave() for item in useful))
        for item in useful:
            del self._all[item.view.instance_id]

    def make_room(self, instance_id: str, *, now_s: float) -> None:
        """Forget what is too old to keep, and the last one of this id: the order of records is the order of starts."""
        existing = self._all.pop(instance_id, None)
        if existing is not None:
            existing.dismiss()
        self.forget_old(now_s=now_s)
        running = [files_of(name, self._directories).log for name in self._names_in_use()]
        remove_oldest_logs(self._directories.log, keep=running)

    def _names_in_use(self) -> list[str]:
        live = [item.view for item in self.live()]
        beside = [
            forwarder_id(view.pool_id) if view.kind is InstanceKind.BACKEND else tunnel_id(view.pool_id)
            for view in live
        ]
        return [*(view.instance_id for view in live), *beside]

    def forget_old(self, *, now_s: float) -> None:
        ended = [item for item in reversed(self._all.values()) if item.ended_s is not None]
        for place, item in enumerate(ended):
            if place >= KEPT_RECORDS or now_s - (item.ended_s or 0.0) > KEPT_RECORD_S:
                item.dismiss()
                del self._all[item.view.instance_id]
