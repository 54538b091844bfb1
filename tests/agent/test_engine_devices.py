from agent.engine.devices import EngineDevice, parse_build, parse_devices

LISTING = """\
Available devices:
  CUDA0: NVIDIA GeForce RTX 3060 (12044 MiB, 11875 MiB free)
  ROCm0: AMD Radeon RX 7900 XTX (gfx1100) (24560 MiB, 24510 MiB free)
  BLAS: OpenBLAS (0 MiB, 0 MiB free)
  CPU: AMD Ryzen 9 (64000 MiB, 64000 MiB free)
"""


def test_devices_keep_the_engines_order_and_their_names_may_hold_brackets():
    assert parse_devices(LISTING)[:2] == (
        EngineDevice(
            device_id="CUDA0",
            description="NVIDIA GeForce RTX 3060",
            total_bytes=12044 << 20,
            free_bytes=11875 << 20,
        ),
        EngineDevice(
            device_id="ROCm0",
            description="AMD Radeon RX 7900 XTX (gfx1100)",
            total_bytes=24560 << 20,
            free_bytes=24510 << 20,
        ),
    )


def test_the_cpu_is_not_a_device_to_offload_to():
    assert [device.device_id for device in parse_devices(LISTING)] == ["CUDA0", "ROCm0", "BLAS"]


def test_no_devices_and_log_lines_between_them_read_as_none():
    assert parse_devices("Available devices:\n  (none)\n") == ()
    assert parse_devices("") == ()
    assert parse_devices("ggml_cuda_init: found 1 CUDA devices:\n  Device 0: NVIDIA, compute capability 8.6\n") == ()


def test_the_build_is_the_version_line_without_its_label():
    printed = "version: 0.5.0-dev (build 336, commit sdist0.3.36)\nbuilt with GNU 12.2.0 for Linux x86_64\n"
    assert parse_build(printed) == "0.5.0-dev (build 336, commit sdist0.3.36)"
    assert parse_build("ggml_cuda_init: found 1 CUDA devices\nversion: 6000 (abc)\n") == "6000 (abc)"
    assert parse_build("something else") == ""
