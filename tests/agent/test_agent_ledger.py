import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from msgspec.structs import replace
from sollol.errors import Reason, Retry, SollolError
from sollol.report import Device, DeviceKind, Reservation

from agent.ledger import MAX_BYTES, Ledger


def device(device_id: str, free: int, total: int | None = None, **more) -> Device:
    kind = DeviceKind.CPU if device_id == "CPU" else DeviceKind.GPU
    total = free if total is None else total
    return Device(device_id=device_id, kind=kind, total_bytes=total, free_bytes=free, measured_free_bytes=free, **more)


NODE = (device("CPU", 800, 1000), device("CUDA0", 400, 500))


class Bench:
    """A ledger with its clock and journal in hand."""

    def __init__(self) -> None:
        self.now = 100.0
        self.events = []
        self.ledger = Ledger(clock=lambda: self.now, journal=self.events.append)

    @property
    def changes(self) -> list[tuple[str, str]]:
        return [(event.change, event.pool_id) for event in self.events]

    def free(self, devices=NODE, materialised=None) -> dict[str, int]:
        found = self.ledger.with_ledger(devices, materialised or {})
        return {device.device_id: device.free_bytes for device in found}


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.fixture
def ledger(bench: Bench) -> Ledger:
    return bench.ledger


def test_what_an_earlier_agent_had_promised_is_promised_again_whatever_is_free(bench: Bench, ledger: Ledger):
    ledger.restore("p", "p", {"CPU": 900})
    ledger.restore("p", "p.backend", {"CPU": 900})
    assert ledger.held("p") == {"CPU": 900}
    assert ledger.reservations() == (Reservation(pool_id="p", bytes={"CPU": 900}),), "it does not lapse"
    bench.now += 10_000
    assert bench.free()["CPU"] == 0
    ledger.freed("p", "p")
    assert ledger.held("p"), "its backend runs on it still"
    ledger.freed("p", "p.backend")
    assert ledger.held("p") == {}
    assert bench.changes == [("restored", "p"), ("restored", "p"), ("freed", "p")]


def test_what_a_restored_pool_has_taken_is_not_counted_twice(bench: Bench, ledger: Ledger):
    ledger.restore("p", "p", {"CPU": 150})
    bench.now += 1
    assert bench.free(materialised={"p": {"CPU": 100}})["CPU"] == 800 - 50


@pytest.mark.parametrize("wanted", [{}, {"CPU": 0}, {"CPU": -1}, {"CPU": MAX_BYTES + 1}])
def test_what_is_no_promise_is_not_restored(ledger: Ledger, wanted: dict[str, int]):
    with pytest.raises(SollolError):
        ledger.restore("p", "p", wanted)
    assert ledger.reservations() == ()


def test_two_engines_of_a_pool_cannot_be_restored_on_different_bytes(ledger: Ledger):
    ledger.restore("p", "p", {"CPU": 300})
    with pytest.raises(SollolError) as refused:
        ledger.restore("p", "p.backend", {"CPU": 200})
    assert refused.value.refusal.reason is Reason.INVALID_REQUEST
    assert ledger.held("p") == {"CPU": 300}


def test_a_promise_takes_from_what_is_free(bench: Bench, ledger: Ledger):
    assert ledger.reserve("p", {"CPU": 300, "CUDA0": 100}, 30, NODE) is None
    cpu, cuda = ledger.with_ledger(NODE, {})
    assert (cpu.reserved_bytes, cpu.free_bytes, cpu.measured_free_bytes) == (300, 500, 800)
    assert (cuda.reserved_bytes, cuda.free_bytes) == (100, 300)
    assert ledger.reservations() == (Reservation(pool_id="p", bytes={"CPU": 300, "CUDA0": 100}, expires_in_s=30),)


def test_all_devices_or_none(bench: Bench, ledger: Ledger):
    refusal = ledger.reserve("p", {"CPU": 300, "CUDA0": 401}, 30, NODE)
    assert refusal is not None
    assert (refusal.reason, refusal.retry) == (Reason.MEMORY_SHORT, Retry.RETRYABLE)
    assert refusal.numbers == {"needed_bytes": 401, "free_bytes": 400}
    assert "CUDA0" in refusal.message
    assert bench.free() == {"CPU": 800, "CUDA0": 400}
    assert bench.events == []


def test_the_last_byte_can_be_promised_once(ledger: Ledger):
    assert ledger.reserve("a", {"CPU": 800}, 30, NODE) is None
    assert ledger.reserve("b", {"CPU": 1}, 30, NODE).reason is Reason.MEMORY_SHORT


def test_asking_again_for_the_same_bytes_renews_the_time_out_even_when_memory_got_short(bench: Bench, ledger: Ledger):
    ledger.reserve("p", {"CPU": 700}, 30, NODE)
    bench.now += 20
    assert ledger.reserve("p", {"CPU": 700}, 30, (device("CPU", 5),)) is None
    bench.now += 20
    assert [item.expires_in_s for item in ledger.reservations()] == [10]
    assert bench.changes == [("reserved", "p"), ("renewed", "p")]


def test_asking_again_for_other_bytes_replaces_the_reservation_whole(bench: Bench, ledger: Ledger):
    ledger.reserve("p", {"CPU": 700}, 30, NODE)
    assert ledger.reserve("p", {"CPU": 800, "CUDA0": 10}, 30, NODE) is None  # its own 700 do not stand in the way
    assert bench.free() == {"CPU": 0, "CUDA0": 390}
    assert bench.changes[-1] == ("replaced", "p")


def test_a_replacement_that_does_not_fit_leaves_the_old_reservation(bench: Bench, ledger: Ledger):
    ledger.reserve("p", {"CPU": 700}, 30, NODE)
    assert ledger.reserve("p", {"CPU": 801}, 30, NODE) is not None
    assert ledger.reservations()[0].bytes == {"CPU": 700}


def test_a_promise_that_nothing_runs_on_lapses(bench: Bench, ledger: Ledger):
    ledger.reserve("p", {"CPU": 800}, 30, NODE)
    bench.now += 30
    assert ledger.reserve("q", {"CPU": 800}, 30, NODE) is None
    assert bench.changes == [("reserved", "p"), ("lapsed", "p"), ("reserved", "q")]
    with pytest.raises(SollolError) as caught:
        ledger.bind("p", "p")
    assert (caught.value.refusal.reason, caught.value.refusal.retry) == (Reason.RESERVATION_MISSING, Retry.RETRYABLE)


def test_a_promise_that_an_engine_runs_on_stays_until_its_process_is_gone(bench: Bench, ledger: Ledger):
    ledger.reserve("p", {"CPU": 800}, 30, NODE)
    assert ledger.bind("p", "p") == {"CPU": 800}
    assert ledger.bind("p", "p") == {"CPU": 800}
    bench.now += 1e6
    ledger.release("p")
    assert ledger.reservations() == (Reservation(pool_id="p", bytes={"CPU": 800}, expires_in_s=None),)
    ledger.freed("p", "p")
    assert ledger.reservations() == ()
    assert bench.changes == [("reserved", "p"), ("bound", "p"), ("freed", "p")]


def test_a_promise_with_a_coordinator_and_a_backend_stays_until_the_last_of_them_is_gone(bench: Bench, ledger: Ledger):
    ledger.reserve("p", {"CPU": 800}, 30, NODE)
    ledger.bind("p", "p.backend")
    ledger.bind("p", "p")
    ledger.freed("p", "p.backend")
    ledger.freed("p", "p.backend")
    bench.now += 1e6
    assert ledger.reservations() == (Reservation(pool_id="p", bytes={"CPU": 800}, expires_in_s=None),)
    ledger.freed("p", "p")
    assert ledger.reservations() == ()


def test_a_bound_pool_keeps_its_bytes_whatever_is_asked_for_it(bench: Bench, ledger: Ledger):
    ledger.reserve("p", {"CPU": 100}, 30, NODE)
    ledger.bind("p", "p")
    assert ledger.reserve("p", {"CPU": 100}, 30, NODE) is None
    assert ledger.reserve("p", {"CPU": 200}, 30, NODE).reason is Reason.INVALID_REQUEST
    assert ledger.reservations() == (Reservation(pool_id="p", bytes={"CPU": 100}, expires_in_s=None),)


def test_giving_back_is_idempotent(bench: Bench, ledger: Ledger):
    ledger.release("never heard of")
    ledger.freed("never heard of", "p")
    ledger.reserve("p", {"CPU": 100}, 30, NODE)
    ledger.release("p")
    ledger.release("p")
    assert bench.changes == [("reserved", "p"), ("released", "p")]


@pytest.mark.parametrize(
    ("pool_id", "wanted", "ttl_s", "reason"),
    [
        ("p", {"CPU": -1}, 30, Reason.INVALID_REQUEST),
        ("p", {"CPU": MAX_BYTES + 1}, 30, Reason.INVALID_REQUEST),
        ("p", {"CPU": 1 << 200}, 30, Reason.INVALID_REQUEST),
        ("p", {"CPU": 0}, 30, Reason.INVALID_REQUEST),
        ("p", {}, 30, Reason.INVALID_REQUEST),
        ("p", {"CPU": 1}, 0, Reason.INVALID_REQUEST),
        ("p", {"CPU": 1}, -1, Reason.INVALID_REQUEST),
        ("p", {"CPU": 1}, math.nan, Reason.INVALID_REQUEST),
        ("p", {"CPU": 1}, math.inf, Reason.INVALID_REQUEST),
        ("", {"CPU": 1}, 30, Reason.INVALID_REQUEST),
        ("p" * 1000, {"CPU": 1}, 30, Reason.INVALID_REQUEST),
        ("p\0", {"CPU": 1}, 30, Reason.INVALID_REQUEST),
        ("p", {"CUDA7": 1}, 30, Reason.STALE_REPORT),
        ("p", {"NVIDIA1": 1}, 30, Reason.ENGINE_MISSING),
    ],
)
def test_a_senseless_wish_is_one_typed_refusal_and_changes_nothing(ledger, pool_id, wanted, ttl_s, reason):
    devices = (*NODE, device("NVIDIA1", 100, usable=False))
    assert ledger.reserve(pool_id, wanted, ttl_s, devices).reason is reason
    assert ledger.reservations() == ()


def test_bytes_that_the_engine_already_took_are_not_subtracted_twice(bench: Bench, ledger: Ledger):
    ledger.reserve("p", {"CPU": 300, "CUDA0": 100}, 30, NODE)
    ledger.bind("p", "p")
    loaded = (
        device("CPU", 750, 1000),
        device("CUDA0", 300, 500),
    )  # 50 of the CPU's are mapped weights: still available
    assert bench.free(loaded, {"p": {"CPU": 50, "CUDA0": 100}}) == {"CPU": 500, "CUDA0": 300}
    assert ledger.reserve("q", {"CUDA0": 301}, 30, loaded) is not None
    assert ledger.reserve("q", {"CUDA0": 300}, 30, loaded) is None


def test_a_measurement_from_before_the_engines_start_cannot_lack_its_bytes(bench: Bench, ledger: Ledger):
    bench.now = 200
    ledger.reserve("p", {"CUDA0": 100}, 30, NODE)
    ledger.bind("p", "p")
    bench.now = 260
    old, fresh = (replace(NODE[1], age_s=age_s) for age_s in (100.0, 1.0))
    assert bench.free((NODE[0], old), {"p": {"CUDA0": 100}})["CUDA0"] == 300
    assert bench.free((NODE[0], fresh), {"p": {"CUDA0": 100}})["CUDA0"] == 400


def test_an_engine_that_takes_more_than_its_promise_frees_nothing_for_others(bench: Bench, ledger: Ledger):
    ledger.reserve("p", {"CPU": 300}, 30, NODE)
    ledger.bind("p", "p")
    assert bench.free((device("CPU", 100, 1000),), {"p": {"CPU": 700}}) == {"CPU": 100}


def test_a_cap_bounds_all_promises_together_whatever_is_free(bench: Bench, ledger: Ledger):
    capped = (replace(NODE[0], cap_bytes=350),)
    assert bench.free(capped) == {"CPU": 350}
    assert ledger.reserve("p", {"CPU": 200}, 30, capped) is None
    assert ledger.reserve("q", {"CPU": 151}, 30, capped).numbers == {"needed_bytes": 151, "free_bytes": 150}


def test_what_other_processes_take_shrinks_free_to_zero_and_not_below(bench: Bench, ledger: Ledger):
    ledger.reserve("p", {"CPU": 300}, 30, NODE)
    assert bench.free((device("CPU", 200, 1000),)) == {"CPU": 0}


def test_unified_memory_is_promised_once(bench: Bench, ledger: Ledger):
    shared = (device("CPU", 800, 1000), device("Vulkan0", 600, 1000, unified=True))
    assert ledger.reserve("p", {"Vulkan0": 500}, 30, shared) is None
    assert bench.free(shared) == {"CPU": 300, "Vulkan0": 100}
    assert ledger.reserve("q", {"CPU": 250}, 30, shared) is None
    assert bench.free(shared) == {"CPU": 50, "Vulkan0": 50}


def test_cpu_and_unified_gpu_together_must_fit_the_ram(ledger: Ledger):
    shared = (device("CPU", 800, 1000), device("Vulkan0", 600, 1000, unified=True))
    refusal = ledger.reserve("p", {"CPU": 400, "Vulkan0": 401}, 30, shared)
    assert refusal.numbers == {"needed_bytes": 801, "free_bytes": 800}


DEVICES = st.sampled_from(["CPU", "CUDA0", "Vulkan0"])
POOLS = st.sampled_from(["a", "b", "c", "d"])
INSTANCES = st.sampled_from(["coordinator", "backend"])


class LedgerMachine(RuleBasedStateMachine):
    """Whatever heads and processes do, in whatever order: no byte is promised twice, and a model predicts each answer."""

    @initialize(cpu=st.integers(0, 100), cuda=st.integers(0, 100), gtt=st.integers(0, 100), cap=st.integers(0, 120))
    def begin(self, cpu: int, cuda: int, gtt: int, cap: int) -> None:
        self.devices = (
            device("CPU", cpu, 100, cap_bytes=cap),
            device("CUDA0", cuda, 100),
            device("Vulkan0", gtt, 100, unified=True),
        )
        self.bench = Bench()
        self.ledger = self.bench.ledger
        self.promised: dict[str, dict[str, int]] = {}
        self.running: dict[str, set[str]] = {}
        self.ends: dict[str, float] = {}

    @rule(pool=POOLS, wanted=st.dictionaries(DEVICES, st.integers(0, 60), max_size=3), ttl_s=st.integers(1, 20))
    def reserve(self, pool: str, wanted: dict[str, int], ttl_s: int) -> None:
        before = self.ledger.reservations()
        if self.ledger.reserve(pool, wanted, ttl_s, self.devices) is None:
            if self.promised.get(pool) != wanted:
                assert self.ends.get(pool) != math.inf
            self.promised[pool] = wanted
            if self.ends.get(pool) != math.inf:
                self.ends[pool] = self.bench.now + ttl_s
        else:
            assert self.ledger.reservations() == before

    @rule(pool=POOLS)
    def reserve_again(self, pool: str) -> None:
        if pool in self.promised:
            assert self.ledger.reserve(pool, self.promised[pool], 20, self.devices) is None
            if self.ends[pool] != math.inf:
                self.ends[pool] = self.bench.now + 20

    @rule(pool=POOLS, instance=INSTANCES)
    def bind(self, pool: str, instance: str) -> None:
        if pool in self.promised:
            assert self.ledger.bind(pool, instance) == self.promised[pool]
            self.ends[pool] = math.inf
            self.running.setdefault(pool, set()).add(instance)
        else:
            with pytest.raises(SollolError):
                self.ledger.bind(pool, instance)

    @rule(pool=POOLS)
    def release(self, pool: str) -> None:
        self.ledger.release(pool)
        if self.ends.get(pool, 0) != math.inf:
            self._forget(pool)

    @rule(pool=POOLS, instance=INSTANCES)
    def process_ends(self, pool: str, instance: str) -> None:
        self.ledger.freed(pool, instance)
        running = self.running.get(pool, set())
        running.discard(instance)
        if not running:
            self._forget(pool)

    @rule(seconds=st.integers(1, 15))
    def time_passes(self, seconds: int) -> None:
        self.bench.now += seconds
        for pool in [pool for pool, end in self.ends.items() if end <= self.bench.now]:
            self._forget(pool)

    def _forget(self, pool: str) -> None:
        self.promised.pop(pool, None)
        self.running.pop(pool, None)
        self.ends.pop(pool, None)

    @invariant()
    def promises_are_what_was_promised(self) -> None:
        assert {item.pool_id: item.bytes for item in self.ledger.reservations()} == self.promised

    @invariant()
    def no_byte_is_promised_twice(self) -> None:
        def promised(*device_ids: str) -> int:
            return sum(held.get(device_id, 0) for held in self.promised.values() for device_id in device_ids)

        cpu, cuda, unified = self.devices
        assert promised("CPU", "Vulkan0") <= min(cpu.measured_free_bytes, cpu.cap_bytes)
        assert promised("CUDA0") <= cuda.measured_free_bytes
        assert promised("Vulkan0") <= unified.measured_free_bytes

    @invariant()
    def what_is_shown_free_can_be_had(self) -> None:
        for shown in self.ledger.with_ledger(self.devices, {}):
            if shown.free_bytes:
                assert self.ledger.reserve("probe", {shown.device_id: shown.free_bytes}, 1, self.devices) is None
                self.ledger.release("probe")
            assert self.ledger.reserve("probe", {shown.device_id: shown.free_bytes + 1}, 1, self.devices) is not None

    @invariant()
    def the_journal_tells_the_whole_story(self) -> None:
        told: dict[str, dict[str, int]] = {}
        for event in self.bench.events:
            if event.change in ("released", "lapsed", "freed"):
                assert told.pop(event.pool_id) == event.bytes
            else:
                told[event.pool_id] = event.bytes
        self.ledger.expire()
        assert told == self.promised


LedgerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestLedgerMachine = LedgerMachine.TestCase
