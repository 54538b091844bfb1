import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from sollol.report import Device, DeviceKind
from structlog.testing import capture_logs

from agent import probe as probe_module
from agent.gpus import Amd, Nvidia
from agent.probe import Probe
from tests.fakes.sysfs import GIB, FakeGpu, FakeNvml, amd_card, write_tree

RTX = FakeGpu("NVIDIA GeForce RTX 3090", 24 * GIB, 20 * GIB, bus_bits=384, clock_mhz=9751)


def listed(device_id: str, description: str, total: int, free: int = 0) -> SimpleNamespace:
    return SimpleNamespace(device_id=device_id, description=description, total_bytes=total, free_bytes=free)


@pytest.fixture(autouse=True)
def bandwidth_is_known(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(probe_module, "cpu_bandwidth", lambda *_args, threads, **_more: 6.25e9 * threads)


@pytest.fixture(autouse=True)
def ram(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    memory = SimpleNamespace(total=64 * GIB, available=50 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    return memory


class Bench:
    def __init__(
        self, root: Path, nvml: FakeNvml | None = None, caps: dict[str, int] | None = None, **environ: str
    ) -> None:
        self.now = 0.0
        drivers = [Amd(root)] + ([Nvidia(lambda: nvml)] if nvml else [])
        self.probe = Probe(
            drivers=drivers,
            caps=caps or {},
            state_dir=root / "state",
            root=root,
            threads=2,
            environ=environ,
            clock=lambda: self.now,
        )

    async def gpus(self) -> list[Device]:
        cpu, *gpus = await self.probe.measure()
        assert cpu.device_id == "CPU"
        return gpus


async def test_the_cpu_comes_first_with_what_the_system_has_free(tmp_path: Path):
    write_tree(tmp_path, {"proc/cpuinfo": "processor\t: 0\nmodel name\t: Good Old CPU"})
    assert await Bench(tmp_path).probe.measure() == (
        Device(
            device_id="CPU",
            kind=DeviceKind.CPU,
            name="Good Old CPU",
            total_bytes=64 * GIB,
            free_bytes=50 * GIB,
            measured_free_bytes=50 * GIB,
            bandwidth_bytes_per_s=12.5e9,
        ),
    )


async def test_the_cgroups_limit_clamps_what_the_system_says(tmp_path: Path):
    group = {"memory.max": 8 * GIB, "memory.current": 5 * GIB, "memory.stat": f"inactive_file {GIB}"}
    write_tree(tmp_path, {"proc/self/cgroup": "0::/a"})
    write_tree(tmp_path / "sys/fs/cgroup/a", group)
    (cpu,) = await Bench(tmp_path).probe.measure()
    assert (cpu.total_bytes, cpu.free_bytes) == (8 * GIB, 4 * GIB)


async def test_caps_go_to_the_device_they_name(tmp_path: Path):
    bench = Bench(tmp_path, FakeNvml([RTX]), caps={"CUDA0": 10 * GIB, "NOSUCH": 1})
    bench.probe.heard_engine([listed("CUDA0", RTX.name, 24 * GIB)])
    with capture_logs() as logs:
        cpu, gpu = await bench.probe.measure()
        await bench.probe.measure()
    assert (cpu.cap_bytes, gpu.cap_bytes) == (None, 10 * GIB)
    assert [(entry["event"], entry["device"]) for entry in logs] == [("cap_of_no_device", "NOSUCH")]


async def test_a_gpu_that_the_engine_lists_has_its_id_and_the_drivers_live_figures(tmp_path: Path):
    nvml = FakeNvml([RTX])
    bench = Bench(tmp_path, nvml)
    bench.probe.heard_engine([listed("CUDA0", RTX.name, 24 * GIB, 23 * GIB)])
    (gpu,) = await bench.gpus()
    assert (gpu.device_id, gpu.vendor, gpu.usable, gpu.unified) == ("CUDA0", "NVIDIA", True, False)
    assert (gpu.total_bytes, gpu.free_bytes, gpu.measured_free_bytes) == (24 * GIB, 20 * GIB, 20 * GIB)
    assert gpu.bandwidth_bytes_per_s == pytest.approx(936e9, rel=0.001)  # as its data sheet says


async def test_a_gpu_that_the_engine_does_not_list_is_shown_as_unusable(tmp_path: Path):
    (gpu,) = await Bench(tmp_path, FakeNvml([RTX])).gpus()
    assert (gpu.device_id, gpu.usable, gpu.total_bytes) == ("NVIDIA0", False, 24 * GIB)


async def test_a_gpu_without_an_id_of_its_own_is_a_gpu(tmp_path: Path):
    (gpu,) = await Bench(tmp_path, FakeNvml([replace(RTX, uuid=None)])).gpus()
    assert gpu.total_bytes == 24 * GIB


async def test_name_then_size_then_order_tell_which_gpu_is_which(tmp_path: Path):
    small = FakeGpu(b"NVIDIA GeForce GTX 1060", 6 * GIB, 5 * GIB)
    twins = [FakeGpu("NVIDIA Tesla P40", 24 * GIB, free * GIB) for free in (3, 4)]
    bench = Bench(tmp_path, FakeNvml([small, *twins, RTX]))
    names = [RTX.name, "NVIDIA Tesla P40", "NVIDIA Tesla P40"]  # CUDA: fastest first; the small one is hidden from it
    bench.probe.heard_engine([listed(f"CUDA{at}", name, 24 * GIB) for at, name in enumerate(names)])
    gpus = await bench.gpus()
    assert [(gpu.device_id, gpu.free_bytes // GIB, gpu.usable) for gpu in gpus] == [
        ("CUDA0", 20, True),
        ("CUDA1", 3, True),
        ("CUDA2", 4, True),
        ("NVIDIA0", 5, False),
    ]


@pytest.mark.parametrize(
    ("visible", "free"),
    [
        (None, [1, 2, 3]),
        ("1", [2]),
        ("2,0", [3, 1]),
        ("GPU-cc,GPU-aa", [3, 1]),
        ("GPU-c", [3]),
        ("1,7,0", [2]),  # CUDA stops at what names nothing
        ("", []),
        ("-1", []),
    ],
)
async def test_of_twins_the_engine_has_those_that_cuda_shows_it(tmp_path: Path, visible: str | None, free: list[int]):
    twins = [FakeGpu("Tesla P40", 24 * GIB, (at + 1) * GIB, uuid=f"GPU-{name * 2}") for at, name in enumerate("abc")]
    bench = Bench(tmp_path, FakeNvml(twins), **({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}))
    bench.probe.heard_engine([listed(f"CUDA{at}", "Tesla P40", 24 * GIB) for at in range(len(free))])
    gpus = await bench.gpus()
    assert [gpu.free_bytes // GIB for gpu in gpus if gpu.usable] == free
    assert len(gpus) == 3  # the others are shown, and cannot be used


async def test_of_gpus_of_several_kinds_names_tell_what_cudas_numbers_do_not(tmp_path: Path):
    """CUDA puts the fastest first: its number 0 is NVML's number 1 here."""
    bench = Bench(tmp_path, FakeNvml([FakeGpu("GTX 1060", 6 * GIB, GIB), RTX]), CUDA_VISIBLE_DEVICES="0")
    bench.probe.heard_engine([listed("CUDA0", RTX.name, 24 * GIB)])
    assert [(gpu.free_bytes // GIB, gpu.usable) for gpu in await bench.gpus()] == [(20, True), (1, False)]
    bench = Bench(
        tmp_path, FakeNvml([RTX, RTX, FakeGpu("A", GIB)]), CUDA_VISIBLE_DEVICES="1", CUDA_DEVICE_ORDER="PCI_BUS_ID"
    )
    bench.probe.heard_engine([listed("CUDA0", RTX.name, 24 * GIB)])
    assert [gpu.device_id for gpu in await bench.gpus()] == ["CUDA0", "NVIDIA0", "NVIDIA2"]


async def test_one_gpu_under_two_backends_is_one_memory(tmp_path: Path):
    bench = Bench(tmp_path, FakeNvml([RTX]))
    bench.probe.heard_engine([listed("CUDA0", RTX.name, 24 * GIB), listed("Vulkan0", RTX.name, 24 * GIB)])
    assert [gpu.device_id for gpu in await bench.gpus()] == ["CUDA0"]


async def test_a_device_without_memory_is_none(tmp_path: Path):
    bench = Bench(tmp_path)
    bench.probe.heard_engine([listed("BLAS", "OpenBLAS", 0)])
    assert await bench.gpus() == []


async def test_a_device_that_only_the_engine_knows_has_its_figures_and_their_age(tmp_path: Path):
    bench = Bench(tmp_path)
    bench.probe.heard_engine([listed("Vulkan0", "Intel(R) Arc(tm) A770 Graphics (DG2)", 16 * GIB, 15 * GIB)])
    bench.now = 90
    (gpu,) = await bench.gpus()
    assert (gpu.device_id, gpu.vendor, gpu.unified) == ("Vulkan0", "Intel", False)
    assert (gpu.total_bytes, gpu.measured_free_bytes, gpu.age_s) == (16 * GIB, 15 * GIB, 90)


async def test_until_its_next_list_an_outdated_engine_has_nothing_free(tmp_path: Path):
    bench = Bench(tmp_path, FakeNvml([RTX]))
    devices = [listed("Vulkan0", "Intel(R) Arc(tm) A770 Graphics (DG2)", 16 * GIB, 15 * GIB)]
    devices += [listed("CUDA0", RTX.name, 10 * GIB, 9 * GIB), listed("Vulkan1", "Intel(R) UHD Graphics", GIB, GIB)]
    bench.probe.heard_engine(devices)
    assert [gpu.free_bytes // GIB for gpu in await bench.gpus()] == [15, 9, 1]
    bench.probe.engine_outdated()
    assert [gpu.free_bytes // GIB for gpu in await bench.gpus()] == [0, 0, 1]  # the last one has what the CPU has
    bench.probe.heard_engine(devices)
    assert [gpu.free_bytes // GIB for gpu in await bench.gpus()] == [15, 9, 1]


@pytest.mark.parametrize(
    ("device_id", "description"),
    [("Metal", "Apple M2"), ("MTL0", "Apple M2 Max"), ("Vulkan0", "Intel(R) UHD Graphics 620 (KBL GT2)")],
)
async def test_gpus_without_memory_of_their_own_are_unified(tmp_path: Path, device_id: str, description: str, ram):
    bench = Bench(tmp_path)
    bench.probe.heard_engine([listed(device_id, description, 48 * GIB, 48 * GIB)])
    ram.available = 30 * GIB
    (gpu,) = await bench.gpus()
    assert (gpu.unified, gpu.total_bytes, gpu.free_bytes, gpu.age_s) == (True, 48 * GIB, 30 * GIB, 0)


@pytest.mark.parametrize("total", [None, 0, 8 * GIB])
async def test_an_nvidia_gpu_whose_driver_counts_no_or_too_little_memory_is_unified(tmp_path: Path, total: int | None):
    """GB10: NVML answers NOT_SUPPORTED; other drivers say 0, or count a carve-out only."""
    bench = Bench(tmp_path, FakeNvml([FakeGpu("NVIDIA GB10", total, bus_bits=256, clock_mhz=4266)]))
    bench.probe.heard_engine([listed("CUDA0", "NVIDIA GB10", 60 * GIB, 40 * GIB)])
    (gpu,) = await bench.gpus()
    assert (gpu.device_id, gpu.unified) == ("CUDA0", True)
    assert gpu.free_bytes == 50 * GIB  # what the system calls available, not what CUDA calls free


async def test_an_amd_board_has_its_vram(tmp_path: Path):
    amd_card(tmp_path, 0, vram=(24 * GIB, 4 * GIB), gtt=(32 * GIB, 0), mem_info_vram_vendor="samsung")
    bench = Bench(tmp_path)
    bench.probe.heard_engine([listed("ROCm0", "AMD Radeon RX 7900 XTX", 24 * GIB)])
    (gpu,) = await bench.gpus()
    assert (gpu.device_id, gpu.name, gpu.vendor) == ("ROCm0", "AMD Radeon RX 7900 XTX", "AMD")
    assert (gpu.total_bytes, gpu.free_bytes, gpu.unified) == (24 * GIB, 20 * GIB, False)


async def test_an_integrated_amd_gpu_has_its_gtt_which_is_ram(tmp_path: Path, ram):
    """Strix Halo: 512 MiB carved out, the GTT is what it works in, and both are RAM."""
    amd_card(tmp_path, 1, vram=(GIB // 2, 0), gtt=(62 * GIB, 2 * GIB))
    bench = Bench(tmp_path)
    (gpu,) = await bench.gpus()
    assert (gpu.unified, gpu.total_bytes, gpu.free_bytes) == (True, 62 * GIB, 50 * GIB)
    ram.available = 63 * GIB
    (gpu,) = await bench.gpus()
    assert gpu.free_bytes == 60 * GIB


async def test_cards_of_other_makers_and_broken_ones_are_left_out(tmp_path: Path):
    amd_card(tmp_path, 0, vram=(GIB, 0), gtt=(GIB, 0), vendor="0x10de")
    write_tree(tmp_path / "sys/class/drm/card1/device", {"vendor": "0x1002"})
    write_tree(tmp_path / "sys/class/drm/card1-DP-1", {"status": "connected"})
    amd_card(tmp_path, 10, vram=(GIB, 0), gtt=(GIB, 0))
    amd_card(tmp_path, 2, vram=(2 * GIB, 0), gtt=(GIB, 0))
    assert [gpu.total_bytes for gpu in await Bench(tmp_path).gpus()] == [2 * GIB, GIB]


async def test_two_vendors_stand_side_by_side(tmp_path: Path):
    amd_card(tmp_path, 0, vram=(16 * GIB, 0), gtt=(32 * GIB, 0), board_info="type : oam")
    bench = Bench(tmp_path, FakeNvml([RTX]))
    bench.probe.heard_engine(
        [listed("Vulkan0", RTX.name, 24 * GIB), listed("Vulkan1", "AMD Radeon VII (RADV VEGA20)", 16 * GIB)]
    )
    gpus = await bench.gpus()
    assert [(gpu.device_id, gpu.vendor, gpu.usable) for gpu in gpus] == [
        ("Vulkan0", "NVIDIA", True),
        ("Vulkan1", "AMD", True),
    ]


async def test_without_nvml_or_driver_there_are_no_nvidia_gpus_and_no_complaints(tmp_path: Path):
    def not_installed():
        raise ImportError

    with capture_logs() as logs:
        assert await Bench(tmp_path, FakeNvml([RTX], broken=True)).gpus() == []
        probe = Probe(drivers=[Nvidia(not_installed)], caps={}, state_dir=tmp_path, root=tmp_path, threads=2)
        assert len(await probe.measure()) == 1
    assert logs == []


async def test_it_says_once_that_an_nvidia_gpu_is_known_to_the_engine_only(tmp_path: Path):
    def not_installed():
        raise ImportError("No module named 'pynvml'")

    probe = Probe(drivers=[Nvidia(not_installed)], caps={}, state_dir=tmp_path, root=tmp_path, threads=2)
    assert not probe.engine_alone
    probe.heard_engine([listed("CUDA0", RTX.name, 24 * GIB, 23 * GIB)])
    with capture_logs() as logs:
        await probe.measure()
        await probe.measure()
    assert [(entry["event"], entry["device"]) for entry in logs] == [("gpu_known_to_engine_only", "CUDA0")]
    assert "No module named 'pynvml'" in logs[0]["problem"]
    assert probe.engine_alone


@pytest.mark.parametrize(
    ("device", "alone"),
    [
        (listed("CUDA0", RTX.name, 24 * GIB), False),
        (listed("CUDA0", RTX.name, 10 * GIB), True),  # a part of it
        (listed("Vulkan0", "Intel(R) Arc(tm) A770 Graphics (DG2)", 16 * GIB), True),
        (listed("Vulkan0", "Intel(R) UHD Graphics 620 (KBL GT2)", 16 * GIB), False),  # it has what the CPU has
    ],
)
async def test_the_engine_alone_knows_what_no_driver_tells(tmp_path: Path, device: SimpleNamespace, alone: bool):
    bench = Bench(tmp_path, FakeNvml([RTX]))
    bench.probe.heard_engine([device])
    await bench.gpus()
    assert bench.probe.engine_alone is alone


async def test_a_lost_driver_keeps_its_last_figures_for_a_while_and_is_found_again(tmp_path: Path):
    nvml = FakeNvml([RTX])
    bench = Bench(tmp_path, nvml)
    with capture_logs() as logs:
        await bench.gpus()
        nvml.broken = True
        bench.now = 10
        (gpu,) = await bench.gpus()
        assert (gpu.free_bytes, gpu.age_s) == (20 * GIB, 10)
        bench.now = 40
        (gpu,) = await bench.gpus()
        assert (gpu.free_bytes, gpu.age_s) == (0, 40)  # nobody has seen it for too long
        nvml.broken = False
        (gpu,) = await bench.gpus()
        assert (gpu.free_bytes, gpu.age_s, nvml.inits) == (20 * GIB, 0, 2)
    assert [entry["event"] for entry in logs] == ["gpu_driver_silent", "gpu_driver_back"]


async def test_a_lost_gpu_takes_no_other_with_it(tmp_path: Path):
    twins = [FakeGpu("NVIDIA Tesla P40", 24 * GIB, free * GIB) for free in (3, 4)]
    bench = Bench(tmp_path, FakeNvml(twins))
    bench.probe.heard_engine([listed(f"CUDA{at}", "NVIDIA Tesla P40", 24 * GIB) for at in range(2)])
    with capture_logs() as logs:
        await bench.gpus()
        twins[0].lost = True
        for _ in range(2):
            assert [(gpu.device_id, gpu.free_bytes // GIB) for gpu in await bench.gpus()] == [
                ("CUDA0", 0),
                ("CUDA1", 4),
            ]
    assert [(entry["event"], entry["index"]) for entry in logs] == [("gpu_lost", 0)]


async def test_of_a_part_of_a_gpu_only_what_the_engine_sees_of_it_is_there(tmp_path: Path):
    """MIG, or a virtual GPU: NVML tells of all 80 GB."""
    whole = FakeGpu("NVIDIA A100-SXM4-80GB", 80 * GIB, 60 * GIB)
    bench = Bench(tmp_path, FakeNvml([whole]))
    bench.probe.heard_engine([listed("CUDA0", "NVIDIA A100-SXM4-80GB MIG 3g.20gb", 20 * GIB, 19 * GIB)])
    bench.now = 5
    (gpu,) = await bench.gpus()
    assert (gpu.total_bytes, gpu.free_bytes, gpu.measured_free_bytes, gpu.age_s) == (20 * GIB, 19 * GIB, 19 * GIB, 5)
    whole.free = 8 * GIB
    assert (await bench.gpus())[0].free_bytes == 8 * GIB


async def test_a_hanging_driver_delays_one_measurement_and_then_nobody(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(probe_module, "DRIVER_WITHIN_S", 10)
    hang = threading.Event()
    nvml = FakeNvml([RTX])
    bench = Bench(tmp_path, nvml)
    await bench.gpus()
    for driver in bench.probe._drivers:
        driver._reading._deadline_s = 0.05  # from here on: a good reading may be slow on a busy machine
    nvml.before = lambda: hang.wait(10)
    with capture_logs() as logs:
        for now in (5, 6, 7):
            bench.now = now
            (gpu,) = await bench.gpus()
            assert (gpu.free_bytes, gpu.age_s) == (20 * GIB, now)
    assert [entry["event"] for entry in logs] == ["gpu_driver_silent"]
    hang.set()
