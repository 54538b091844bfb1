import os
import threading
from pathlib import Path

import pytest

from agent import bandwidth
from agent.bandwidth import boot_id, cpu_bandwidth, measure

MIB = 1 << 20


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Buffer sizes of each measurement asked for, without making any."""
    sizes: list[int] = []

    def fake(buffer_bytes: int, _threads: int) -> float:
        sizes.append(buffer_bytes)
        return 1e9 * len(sizes)

    monkeypatch.setattr(bandwidth, "measure", fake)
    return sizes


def test_a_real_measurement_is_within_what_memories_do():
    assert 1e8 < measure(16 * MIB, 1) < 1e13


def test_with_too_little_memory_the_bandwidth_is_unknown():
    assert measure(1000, 2) == 0.0


def test_it_is_measured_once_per_boot(tmp_path: Path, measured: list[int]):
    state = tmp_path / "made" / "as needed"
    assert cpu_bandwidth(state, boot="b1", free_bytes=1 << 40, threads=2) == 1e9
    assert cpu_bandwidth(state, boot="b1", free_bytes=1 << 40, threads=2) == 1e9
    assert cpu_bandwidth(state, boot="b2", free_bytes=1 << 40, threads=2) == 2e9
    assert measured == [256 * MIB, 256 * MIB]


def test_it_is_measured_again_for_another_number_of_threads(tmp_path: Path, measured: list[int]):
    assert cpu_bandwidth(tmp_path, boot="b", free_bytes=1 << 40, threads=1) == 1e9
    assert cpu_bandwidth(tmp_path, boot="b", free_bytes=1 << 40, threads=2) == 2e9
    assert cpu_bandwidth(tmp_path, boot="b", free_bytes=1 << 40, threads=2) == 2e9
    assert len(measured) == 2


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_as_many_threads_read_at_once_as_engines_use(monkeypatch: pytest.MonkeyPatch, threads: int):
    together = threading.Barrier(threads)
    timed = bandwidth._timed

    def waiting(touch, addresses, byte, size):
        together.reset()

        def touch_together(*place):
            together.wait(timeout=5)  # breaks, and nothing is read, when there are fewer
            return touch(*place)

        return timed(touch_together, addresses, byte, size)

    monkeypatch.setattr(bandwidth, "_timed", waiting)
    assert measure(16 * MIB, threads) > 0
    assert not together.broken


def test_agents_of_one_machine_measure_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    alone = []

    def meets_nobody(_buffer_bytes: int, _threads: int) -> float:
        with pytest.raises(threading.BrokenBarrierError):
            meeting.wait(timeout=0.05)
        meeting.reset()
        alone.append(True)
        return 1e9

    meeting = threading.Barrier(2)
    monkeypatch.setattr(bandwidth, "measure", meets_nobody)
    starts = [
        threading.Thread(
            target=cpu_bandwidth, args=(tmp_path / name,), kwargs={"boot": "b", "free_bytes": 1 << 40, "threads": 1}
        )
        for name in "abc"
    ]
    for start in starts:
        start.start()
    for start in starts:
        start.join(10)
    assert alone == [True, True, True]


def test_whoever_else_holds_the_turn_costs_a_wait_only(
    tmp_path: Path, measured: list[int], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(bandwidth, "_TURN_WITHIN_S", 0.1)
    with bandwidth._turn():
        assert cpu_bandwidth(tmp_path, boot="b", free_bytes=1 << 40, threads=1) == 1e9
    assert len(measured) == 1


def test_it_takes_a_quarter_of_what_is_free_at_most(tmp_path: Path, measured: list[int]):
    cpu_bandwidth(tmp_path, boot="b", free_bytes=100 * MIB, threads=2)
    assert measured == [25 * MIB]


@pytest.mark.parametrize("kept", [b"", b"nonsense", b"[]", b'{"boot_id": "b", "cores": 2, "bytes_per_s": 5.0}'])
def test_a_file_that_does_not_fit_is_replaced(tmp_path: Path, measured: list[int], kept: bytes):
    (tmp_path / bandwidth.FILE_NAME).write_bytes(kept)
    assert cpu_bandwidth(tmp_path, boot="b", free_bytes=1 << 40, threads=2) == 1e9
    assert cpu_bandwidth(tmp_path, boot="b", free_bytes=1 << 40, threads=2) == 1e9
    assert len(measured) == 1


def test_a_state_directory_that_cannot_be_written_costs_a_measurement_only(tmp_path: Path, measured: list[int]):
    (tmp_path / "file").touch()
    assert cpu_bandwidth(tmp_path / "file" / "state", boot="b", free_bytes=1 << 40, threads=2) == 1e9
    assert len(measured) == 1


def test_the_boot_has_an_id_on_linux_and_none_elsewhere(tmp_path: Path):
    assert len(boot_id()) == 36
    assert boot_id(tmp_path) == ""
    assert bandwidth.usable_cores() == len(os.sched_getaffinity(0))
