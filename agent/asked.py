"""What the gRPC service asks of the owners of state."""

from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from sollol.errors import Refusal
from sollol.link import Link
from sollol.report import BackendEndpoint, CoordinatorPlan, Device, Instance, Report, Reservation

from agent.supervisor.lending import BackendWish


class Reporter(Protocol):
    def current(self) -> Report:
        """The newest report."""

    def watch(self) -> AsyncIterator[Report]:
        """The newest report, then every newer one."""

    def changed(self) -> None:
        """Something that reports show has changed: report soon."""


class Cordon(Protocol):
    @property
    def cordoned(self) -> bool: ...

    @property
    def draining(self) -> bool: ...

    def set(self, *, cordoned: bool, draining: bool) -> None:
        """Raises OSError when it cannot be kept."""


class Ledger(Protocol):
    def reserve(
        self, pool_id: str, bytes_by_device: Mapping[str, int], ttl_s: float, devices: Sequence[Device]
    ) -> Refusal | None: ...

    def release(self, pool_id: str) -> None: ...

    def bind(self, pool_id: str, instance_id: str) -> dict[str, int]: ...

    def freed(self, pool_id: str, instance_id: str) -> None: ...

    def reservations(self) -> tuple[Reservation, ...]: ...


class Supervisor(Protocol):
    async def start(self, pool_id: str, plan: CoordinatorPlan) -> Instance: ...

    async def start_backend(self, wish: BackendWish) -> BackendEndpoint: ...

    def watch(self, instance_id: str) -> AsyncIterator[Instance]: ...

    async def stop(self, instance_id: str, *, at_once: bool = False) -> None: ...

    def instances(self) -> tuple[Instance, ...]: ...

    def log_path(self, instance_id: str) -> Path: ...


class Relaying(Protocol):
    async def serve(self, context: Any) -> None: ...


class Links(Protocol):
    async def measure(self, node_id: str, host: str, port: int) -> Link: ...


class Sink(Protocol):
    async def serve(self, context: Any, *, node_id: str, boot_id: str) -> None: ...
