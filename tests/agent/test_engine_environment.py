import socket
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.engine.environment import engine_environment
from agent.supervisor.command import backend_argv

OURS = {"GGML_NO_BACKTRACE": "1", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def test_what_configures_the_engine_or_holds_secrets_does_not_reach_it():
    base = {
        "LLAMA_ARG_TOOLS": "all",
        "LLAMA_API_KEY": "k",
        "GGML_CUDA_FORCE_MMQ": "1",
        "MTMD_BACKEND_DEVICE": "CPU",
        "HF_TOKEN": "t",
        "AIP_MODE": "PREDICTION",
        "REDIS_PASSWORD": "p",
        "LD_PRELOAD": "/tmp/x.so",
        "PYTHONPATH": "/tmp",
    }
    assert set(engine_environment(base)) == {"PATH", "LANG", *OURS}


def test_which_gpus_are_visible_is_kept():
    visible = {
        "CUDA_VISIBLE_DEVICES": "1",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "HIP_VISIBLE_DEVICES": "0",
        "ROCR_VISIBLE_DEVICES": "0",
        "GGML_VK_VISIBLE_DEVICES": "0",
        "ZE_AFFINITY_MASK": "0",
    }
    assert visible.items() <= engine_environment(visible).items()


def test_path_home_and_language_are_kept_and_have_defaults():
    kept = {"PATH": "/opt/bin", "HOME": "/home/a", "LANG": "de_DE.UTF-8"}
    assert engine_environment(kept) == kept | OURS
    assert engine_environment({}) == {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8"} | OURS


def test_an_abort_never_waits_for_a_debugger():
    assert engine_environment({"GGML_NO_BACKTRACE": "0"})["GGML_NO_BACKTRACE"] == "1"


@pytest.mark.engine
def test_what_a_backend_is_sent_lies_in_huge_pages_where_the_system_has_them(
    engine_binary: Path, ports: Callable[[], int]
):
    """Weights in pages of 4 KiB take a third longer to read."""
    port, size = ports(), 64 << 20
    program = engine_binary.with_name("ggml-rpc-server")
    process = subprocess.Popen(
        backend_argv(program, host="127.0.0.1", port=port, devices=("CPU",), threads=1),
        env=engine_environment({}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with _connected(port) as link:
            _asked(link, 14, bytes(24))  # hello
            (buffer, _) = struct.unpack("<QQ", _asked(link, 0, struct.pack("<IQ", 0, size)))  # allocate
            _send(link, 5, struct.pack("<QB", buffer, 1))  # write all of it; that has no answer
            _asked(link, 15, b"")  # how many devices: answered once that is done
            rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
    finally:
        process.kill()
        process.wait()
    huge = next(int(line.split()[1]) << 10 for line in rollup.splitlines() if line.startswith("AnonHugePages:"))
    never = "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    assert (huge > size // 2) is not never


def _connected(port: int) -> socket.socket:
    deadline = time.monotonic() + 5
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=5)
        except ConnectionRefusedError:
            assert time.monotonic() < deadline, "the backend does not listen"
            time.sleep(0.01)


def _send(link: socket.socket, command: int, payload: bytes) -> None:
    link.sendall(struct.pack("<BQ", command, len(payload)) + payload)


def _asked(link: socket.socket, command: int, payload: bytes) -> bytes:
    _send(link, command, payload)
    (size,) = struct.unpack("<Q", link.recv(8, socket.MSG_WAITALL))
    return link.recv(size, socket.MSG_WAITALL)
