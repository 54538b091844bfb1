"""Lines as llama-server 0.5.0 logs them with `-lv 4`."""

import pytest

from agent.supervisor.buffers import MIB, Buffers, logged_buffers

SPLIT = """\
0.00.031.002 I load_tensors: loading model tensors, this can take a while... (load_mode = mmap)
0.00.036.627 I load_tensors:   CPU_Mapped model buffer size =     8.00 MiB
0.00.036.628 I load_tensors: RPC0[127.0.0.1:7500] model buffer size =    24.51 MiB
0.00.036.629 I load_tensors: RPC0[127.0.0.1:7501] model buffer size =    18.02 MiB
0.00.037.288 I llama_context: flash_attn            = auto
0.00.037.300 I llama_context:        CPU  output buffer size =     0.06 MiB
0.00.037.463 I llama_kv_cache: RPC0[127.0.0.1:7500] KV buffer size =     8.00 MiB
0.00.037.464 I llama_kv_cache: RPC0[127.0.0.1:7500] KV buffer size =     1.50 MiB
0.00.037.465 I llama_memory_recurrent: RPC0[127.0.0.1:7501] RS buffer size =     0.89 MiB
0.00.047.762 I sched_reserve: RPC0[127.0.0.1:7500] compute buffer size =    32.04 MiB
0.00.047.763 I sched_reserve: RPC0[127.0.0.1:7501] compute buffer size =    31.04 MiB
0.00.047.764 I sched_reserve:        CPU compute buffer size =    21.05 MiB
0.00.047.765 I sched_reserve: graph: nodes = 270, splits = 4, input objects = 3, input tensors = 7
"""


def mib(size: float) -> int:
    return round(size * MIB)


def test_buffers_are_told_apart_by_device_and_purpose():
    assert logged_buffers(SPLIT.splitlines()) == {
        "CPU": Buffers(mapped=mib(8), compute=mib(21.05), output=mib(0.06)),
        "127.0.0.1:7500": Buffers(model=mib(24.51), kv=mib(9.5), compute=mib(32.04)),
        "127.0.0.1:7501": Buffers(model=mib(18.02), kv=mib(0.89), compute=mib(31.04)),
    }


def test_only_what_follows_the_last_attempt_counts():
    attempt = "I load_tensors: loading model tensors, this can take a while...\nI sched_reserve: CPU compute buffer size = 0.00 MiB"
    assert logged_buffers((SPLIT + attempt).splitlines()) == {"CPU": Buffers()}
    assert logged_buffers((attempt + "\n" + SPLIT).splitlines()) == logged_buffers(SPLIT.splitlines())


@pytest.mark.parametrize(
    ("name", "device", "field"),
    [
        ("CPU", "CPU", "model"),
        ("CPU_REPACK", "CPU", "model"),
        ("CPU_Mapped", "CPU", "mapped"),
        ("CUDA_Host", "CPU", "model"),
        ("CUDA0", "CUDA0", "model"),
        ("MTL0_Mapped", "MTL0", "mapped"),
        ("RPC0[10.0.0.7:7512]", "10.0.0.7:7512", "model"),
        ("RPC2[10.0.0.7:7512]", "10.0.0.7:7512/2", "model"),
        ("RPC0[[fe80::1]:7512]", "[fe80::1]:7512", "model"),
    ],
)
def test_devices_have_the_names_that_plans_use(name, device, field):
    line = f"load_tensors: {name:>12} model buffer size =   123.40 MiB"
    assert logged_buffers([line]) == {device: Buffers(**{field: mib(123.4)})}


def test_a_log_without_sizes_says_nothing():
    assert logged_buffers([]) == {}
    assert logged_buffers(["I load_tensors: loading model tensors", "E failed", "KV buffer size = many MiB"]) == {}
