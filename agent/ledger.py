"""The only authority of promises on this node: bytes on devices, each promised to one pool.

Pure state behind one owner, the agent's event loop; the clock comes from outside. No promise is made that the newest
measurement does not cover, and none is ever taken back: a promise ends by its holder's word, by its time-out while
nothing runs on it, or when the process that runs on it is gone.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace
from sollol.errors import Reason, Refusal, SollolError, refuse
from sollol.report import Device, DeviceKind, Reservation

from agent.checks import MAX_BYTES, MAX_TTL_S

MAX_POOL_ID = 128

Change = Literal["reserved", "renewed", "replaced", "released", "lapsed", "bound", "restored", "freed"]


class LedgerEvent(Struct, frozen=True, kw_only=True):
    """One change of the ledger; `at_s` is the injected clock's time, `bytes` what the pool holds (or held)."""

    change: Change
    pool_id: str
    bytes: dict[str, int]
    at_s: float


class _Promise(Struct, frozen=True, kw_only=True):
    """`expires_s` is None exactly while engines run on it (its `holders`), and `bound_s` is when the newest began."""

    pool_id: str
    bytes: dict[str, int]
    expires_s: float | None
    bound_s: float = math.inf
    holders: frozenset[str] = frozenset()


class Ledger:
    """Reservations by pool id.

    Attributes:
        clock: Monotonic seconds.
        journal: Called once with every change, after it took effect.
    """

    def __init__(self, *, clock: Callable[[], float], journal: Callable[[LedgerEvent], None]) -> None:
        self._clock = clock
        self._journal = journal
        self._promises: dict[str, _Promise] = {}
        self._materialised: dict[str, dict[str, int]] = {}

    def reserve(
        self, pool_id: str, bytes_by_device: Mapping[str, int], ttl_s: float, devices: Sequence[Device]
    ) -> Refusal | None:
        """Promise bytes on all these devices to a pool, or on none of them.

        Idempotent by pool id: the same bytes again renew the time-out; other bytes replace a reservation that
        nothing runs on yet, or leave it as it was when they do not fit.

        Args:
            pool_id: Chosen by the caller, unique in the cluster.
            bytes_by_device: Device id to bytes.
            ttl_s: Seconds until it lapses unless an engine is started on it.
            devices: The newest measured devices (a report's devices do: only measured figures are read).

        Returns:
            None when reserved, else why not; nothing has changed then.
        """
        self.expire()
        held = self._promises.get(pool_id)
        refusal = _malformed(pool_id, bytes_by_device, ttl_s)
        if refusal is not None:
            return refusal
        wanted = dict(bytes_by_device)
        if held is not None and held.bytes == wanted:
            if held.expires_s is not None:
                self._put(replace(held, expires_s=self._clock() + ttl_s), "renewed")
            return None
        if held is not None and held.expires_s is None:
            return _refusal(Reason.INVALID_REQUEST, f"pool {pool_id!r} already runs on other bytes: take a new pool id")
        refusal = _unfit_device(wanted, devices) or self._short(pool_id, wanted, devices)
        if refusal is not None:
            return refusal
        promise = _Promise(pool_id=pool_id, bytes=wanted, expires_s=self._clock() + ttl_s)
        self._put(promise, "reserved" if held is None else "replaced")
        return None

    def release(self, pool_id: str) -> None:
        """Give back a reservation that nothing runs on.

        Unknown pools are a success. On a pool that an engine runs on this does nothing: its bytes are in use, and
        `freed` gives them back when the process is gone.
        """
        self.expire()
        held = self._promises.get(pool_id)
        if held is not None and held.expires_s is not None:
            self._drop(held, "released")

    def bind(self, pool_id: str, instance_id: str) -> dict[str, int]:
        """Note that an engine is being started on this pool's reservation: from now on it does not expire.

        Idempotent by instance. A pool may have two on one node, its coordinator and a backend: the reservation stands
        until the last of them is gone.

        Returns:
            The pool's bytes by device id.

        Raises:
            SollolError: RESERVATION_MISSING; it was never made, or has lapsed.
        """
        self.expire()
        held = self._promises.get(pool_id)
        if held is None:
            raise refuse(
                Reason.RESERVATION_MISSING,
                f"no reservation for pool {pool_id!r} on this node (never made, or lapsed): reserve again",
                retryable=True,
            )
        if instance_id not in held.holders:
            holders = held.holders | {instance_id}
            self._put(replace(held, expires_s=None, bound_s=self._clock(), holders=holders), "bound")
        return dict(held.bytes)

    def held(self, pool_id: str) -> dict[str, int]:
        """A pool's bytes by device id; empty when nothing is promised to it."""
        return dict(self._promises[pool_id].bytes) if pool_id in self._promises else {}

    def restore(self, pool_id: str, instance_id: str, bytes_by_device: Mapping[str, int]) -> None:
        """Promise again what an engine still runs on, whatever is free: an earlier agent had promised it.

        Raises:
            SollolError: INVALID_REQUEST; these bytes are no promise, or another engine of the pool runs on others.
        """
        if (refusal := _malformed(pool_id, bytes_by_device, MAX_TTL_S)) is not None:
            raise SollolError(refusal)
        held = self._promises.get(pool_id) or _Promise(pool_id=pool_id, bytes=dict(bytes_by_device), expires_s=None)
        if held.bytes != bytes_by_device:
            raise refuse(Reason.INVALID_REQUEST, f"pool {pool_id!r} runs on other bytes already")
        self._put(replace(held, bound_s=self._clock(), holders=held.holders | {instance_id}), "restored")

    def freed(self, pool_id: str, instance_id: str) -> None:
        """Give back what a pool held, when its last process is gone (or could not be started).

        Unknown pools and instances are fine.
        """
        held = self._promises.get(pool_id)
        if held is None:
            return
        left = held.holders - {instance_id}
        if left:
            self._promises[pool_id] = replace(held, holders=left)  # no bytes have changed hands
        else:
            self._drop(held, "freed")

    def expire(self) -> bool:
        """Drop what has lapsed; every other method does so first. Returns whether anything had."""
        now = self._clock()
        lapsed = [held for held in self._promises.values() if held.expires_s is not None and held.expires_s <= now]
        for held in lapsed:
            self._drop(held, "lapsed")
        return bool(lapsed)

    def reservations(self) -> tuple[Reservation, ...]:
        """Every live reservation, by pool id."""
        self.expire()
        now = self._clock()
        return tuple(
            Reservation(
                pool_id=held.pool_id,
                bytes=dict(held.bytes),
                expires_in_s=None if held.expires_s is None else held.expires_s - now,
            )
            for _, held in sorted(self._promises.items())
        )

    def with_ledger(
        self, devices: Sequence[Device], materialised: Mapping[str, Mapping[str, int]]
    ) -> tuple[Device, ...]:
        """Measured devices with `reserved_bytes` and `free_bytes` filled in.

        Args:
            devices: As measured; `measured_free_bytes` and `age_s` are read, `free_bytes` is not.
            materialised: Per pool and device, the bytes that its engine has already taken out of the measured free
                figure. Kept for the reservations that follow, until the next call.
        """
        self.expire()
        self._materialised = {pool: dict(taken) for pool, taken in materialised.items() if pool in self._promises}
        return tuple(
            replace(
                device,
                reserved_bytes=sum(held.bytes.get(device.device_id, 0) for held in self._promises.values()),
                free_bytes=self._free(device, devices, self._promises.values()),
            )
            for device in devices
        )

    def _short(self, pool_id: str, wanted: Mapping[str, int], devices: Sequence[Device]) -> Refusal | None:
        others = [held for held in self._promises.values() if held.pool_id != pool_id]
        for device in devices:
            needed = sum(wanted.get(part.device_id, 0) for part in _drawing_on(device, devices))
            free = self._free(device, devices, others)
            if needed > free:
                return _refusal(
                    Reason.MEMORY_SHORT,
                    f"{device.device_id} has {free} bytes free, {needed} are needed: place the model elsewhere, "
                    "unload another one, or choose a shorter context",
                    retryable=True,
                    numbers={"needed_bytes": needed, "free_bytes": free},
                )
        return None

    def _free(self, device: Device, devices: Sequence[Device], promises: Iterable[_Promise]) -> int:
        """What the measurement leaves after promises that are not yet part of it, and what the budget leaves at all."""
        drawing = _drawing_on(device, devices)
        reserved = outstanding = 0
        for held in promises:
            for part in drawing:
                share = held.bytes.get(part.device_id, 0)
                reserved += share
                outstanding += max(0, share - self._taken(held, part))
        budget = device.total_bytes if device.cap_bytes is None else min(device.cap_bytes, device.total_bytes)
        free = min(device.measured_free_bytes - outstanding, budget - reserved)
        if device.unified:
            free = min([free, *(self._free(cpu, devices, promises) for cpu in devices if cpu.kind is DeviceKind.CPU)])
        return max(0, free)

    def _taken(self, held: _Promise, device: Device) -> int:
        """Bytes of a promise that the device's measured figure already lacks.

        A measurement older than the engine's start cannot lack them, whatever the engine has taken since.
        """
        if self._clock() - device.age_s < held.bound_s:
            return 0
        return self._materialised.get(held.pool_id, {}).get(device.device_id, 0)

    def _put(self, promise: _Promise, change: Change) -> None:
        self._promises[promise.pool_id] = promise
        self._note(promise, change)

    def _drop(self, promise: _Promise, change: Change) -> None:
        del self._promises[promise.pool_id]
        self._materialised.pop(promise.pool_id, None)
        self._note(promise, change)

    def _note(self, promise: _Promise, change: Change) -> None:
        self._journal(
            LedgerEvent(change=change, pool_id=promise.pool_id, bytes=dict(promise.bytes), at_s=self._clock())
        )


def _drawing_on(device: Device, devices: Sequence[Device]) -> tuple[Device, ...]:
    """The devices whose promises come out of this device's bytes: itself, and for the CPU every unified GPU."""
    if device.kind is not DeviceKind.CPU:
        return (device,)
    return (device, *(other for other in devices if other.unified and other.kind is not DeviceKind.CPU))


def _malformed(pool_id: str, wanted: Mapping[str, int], ttl_s: float) -> Refusal | None:
    if not 0 < len(pool_id) <= MAX_POOL_ID or not pool_id.isprintable():
        return _refusal(Reason.INVALID_REQUEST, f"a pool id has 1 to {MAX_POOL_ID} printable characters")
    if not 0 < ttl_s <= MAX_TTL_S:
        return _refusal(Reason.INVALID_REQUEST, f"ttl_s must be above 0, at most {MAX_TTL_S:.0f} seconds, not {ttl_s}")
    if not any(wanted.values()):
        return _refusal(Reason.INVALID_REQUEST, "a reservation needs at least one device with more than 0 bytes")
    for device_id, size in wanted.items():
        if not 0 <= size <= MAX_BYTES:
            return _refusal(
                Reason.INVALID_REQUEST, f"{size} bytes on {device_id[:64]!r} are outside 0 to {MAX_BYTES}: fix the plan"
            )
    return None


def _unfit_device(wanted: Mapping[str, int], devices: Sequence[Device]) -> Refusal | None:
    known = {device.device_id: device for device in devices}
    for device_id in wanted:
        device = known.get(device_id)
        if device is None:
            return _refusal(
                Reason.STALE_REPORT,
                f"no device {device_id[:64]!r} on this node, only {', '.join(known)}: plan from its newest report",
                retryable=True,
            )
        if not device.usable:
            return _refusal(
                Reason.ENGINE_MISSING,
                f"the engine on this node cannot use {device_id}: install one with support for it, or plan without it",
                retryable=True,
            )
    return None


def _refusal(
    reason: Reason, message: str, *, retryable: bool = False, numbers: dict[str, int] | None = None
) -> Refusal:
    return refuse(reason, message, retryable=retryable, numbers=numbers).refusal
