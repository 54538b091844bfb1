"""Owns what this node knows of its coordinators' real speed, and gets it from the engines' own counters.

Off the token path: it hears of streams that begin and end, and asks an engine a moment after its last one has ended.
"""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import structlog
from msgspec import Struct
from sollol import kept
from sollol.errors import SollolError
from sollol.report import CoordinatorPlan, Instance, InstanceKind, InstanceState
from sollol.speed import PlanKey, SpeedObservation, plan_key

from agent.speed_meter import Meter, counters_of
from agent.speed_records import Record, Records
from agent.supervisor.health import ask

log = structlog.get_logger(__name__)

FILE_NAME = "speeds.json"
VERSION = 1
GAP_S = 1.0  # however short the requests are, engines are asked no more often


class _Kept(Struct):
    """`engine`: the build that they were observed with. Another one is another speed."""

    engine: str
    records: tuple[Record, ...]


class _Watched(Struct):
    identity: str
    key: PlanKey
    predicted_ms_per_token: float
    meter: Meter
    active: int = 0
    opened: int = 0


class Speeds:
    """`run()` asks; everybody else reads.

    Args:
        path: Where observations outlive a restart.
        engine: The build of this node's engine.
        threads: What an engine computes with when its plan does not say.
        plan_of: By instance id; None when it is no coordinator.
        socket_of: By instance id; raises SollolError for one that is not ready.
        identity_of: Of a model by its name; raises SollolError when it is gone.
        on_change: Called when there is a new observation.
        key: What the engines ask of whoever asks them; empty: nothing.
    """

    def __init__(
        self,
        path: Path,
        *,
        engine: str,
        threads: int,
        plan_of: Callable[[str], CoordinatorPlan | None],
        socket_of: Callable[[str], Path],
        identity_of: Callable[[str], str],
        on_change: Callable[[], None],
        key: str = "",
    ) -> None:
        self._key = key
        self._path, self._engine, self._threads = path, engine, threads
        self._plan_of, self._socket_of, self._identity_of = plan_of, socket_of, identity_of
        self._on_change = on_change
        before = kept.load(path, _Kept, version=VERSION)
        self._records = Records(before.records if before is not None and before.engine == engine else ())
        self._watched: dict[str, _Watched] = {}
        self._unlisted: dict[
            str, Instance
        ] = {}  # their models are not known, or not yet: engines are taken up before a scan
        self._since_unix_s = time.time()
        self._due: set[str] = set()
        self._wake = asyncio.Event()

    def observations(self) -> tuple[SpeedObservation, ...]:
        return self._records.observations()

    def observed_ms(self, instance_id: str) -> float:
        """Milliseconds per token of the model and plan that this coordinator runs; 0 when not known."""
        if (instance := self._unlisted.get(instance_id)) is not None:
            self._watch(instance)
        watched = self._watched.get(instance_id)
        return self._records.ms_per_token(watched.identity, watched.key) if watched is not None else 0.0

    def instance_changed(self, instance: Instance) -> None:
        if instance.kind is not InstanceKind.COORDINATOR:
            return
        if instance.state is not InstanceState.READY:
            self._watched.pop(instance.instance_id, None)
            self._unlisted.pop(instance.instance_id, None)
        elif instance.instance_id not in self._watched:
            self._watch(instance)

    def streams_changed(self, instance_id: str, active: int) -> None:
        """Tell how many streams an instance has now, with every one that begins or ends."""
        watched = self._watched.get(instance_id)
        if watched is None:
            return
        began, watched.active = active > watched.active, active
        if began:
            watched.opened += 1
            watched.meter.stream_opened(asyncio.get_running_loop().time())
            busy = [each for each in self._watched.values() if each.active]
            if active > 1 or len(busy) > 1:
                for each in busy:
                    each.meter.disturbed()
        elif not active:
            self._due.add(instance_id)
            self._wake.set()

    async def run(self) -> None:
        """Ask engines until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            due, self._due = self._due, set()
            news = [await self._look(instance_id) for instance_id in sorted(due)]
            if any(news):
                self._on_change()
                await self._save()
            await asyncio.sleep(GAP_S)

    def _watch(self, instance: Instance) -> None:
        plan = self._plan_of(instance.instance_id)
        if plan is None:
            return
        try:
            identity = self._identity_of(plan.model)
        except SollolError as error:
            if instance.instance_id not in self._unlisted:
                log.info("speed_not_watched", instance=instance.instance_id, problem=error.refusal.message)
            self._unlisted[instance.instance_id] = instance
            return
        late = self._unlisted.pop(instance.instance_id, None) is not None
        lenders = {backend.node_id: backend.threads for backend in plan.backends}

        def threads(node_id: str) -> int:
            return lenders.get(node_id, 0) if node_id else plan.threads or self._threads

        meter = Meter(asyncio.get_running_loop().time())
        if late or instance.started_unix_s < self._since_unix_s:  # what it has counted so far, nobody has watched
            meter.disturbed()
        self._watched[instance.instance_id] = _Watched(
            identity=identity,
            key=plan_key(plan.shares, plan.kv_type, threads),
            predicted_ms_per_token=plan.predicted_ms_per_token,
            meter=meter,
        )

    async def _look(self, instance_id: str) -> bool:
        """Whether it gave a sample. What a stream that begins meanwhile disturbs is looked at when that one ends."""
        watched = self._watched.get(instance_id)
        if watched is None or watched.active:
            return False
        opened = watched.opened
        try:
            answer = await ask(self._socket_of(instance_id), "/metrics", self._key)
        except SollolError:  # it has ended
            return False
        counters = counters_of(answer.body) if answer is not None else None
        if counters is None or watched.opened != opened:
            return False
        sample = watched.meter.look(counters)
        if sample is None:
            return False
        self._records.add(watched.identity, watched.key, sample, watched.predicted_ms_per_token)
        log.info(
            "speed_observed",
            instance=instance_id,
            tokens=sample.tokens,
            ms_per_token=round(sample.ms_per_token, 3),
            predicted_ms_per_token=round(watched.predicted_ms_per_token, 3),
            plan=watched.key,
        )
        return True

    async def _save(self) -> None:
        content = _Kept(self._engine, self._records.all())
        try:
            await asyncio.to_thread(kept.save, self._path, content, version=VERSION)
        except OSError as error:  # they stand in the report all the same
            log.warning("speeds_not_kept", path=str(self._path), problem=str(error))
