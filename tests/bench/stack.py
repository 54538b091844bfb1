"""What is measured: a source, an agent and a head, as processes, until a block ends."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
PATH = "/v1/chat/completions"
MIB = 2**20


@dataclass(frozen=True)
class Stack:
    """`direct` is the source's address, `front` the head's: `unix:PATH` or `host:port`."""

    direct: str
    front: str
    agent: psutil.Process
    head: psutil.Process
    model: str

    def cpu_s(self) -> dict[str, float]:
        found = {}
        for name in ("agent", "head"):
            times = getattr(self, name).cpu_times()
            found[name] = times.user + times.system
        return found

    def rss_mib(self) -> dict[str, float]:
        return {name: getattr(self, name).memory_info().rss / MIB for name in ("agent", "head")}


@contextmanager
def process(*arguments: str, ready: Path) -> Iterator[psutil.Process]:
    """`python -m ARGUMENTS`, until `ready` exists and then until the block ends."""
    child = subprocess.Popen([sys.executable, "-m", *arguments], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    try:
        deadline = time.monotonic() + 20
        while not ready.exists():
            if child.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{arguments} did not start")
            time.sleep(0.05)
        yield psutil.Process(child.pid)
    finally:
        child.terminate()
        child.wait(10)


@contextmanager
def pieces(directory: Path) -> Iterator[Stack]:
    """Both ends of the relay without the daemons around them."""
    engine, agent, head = (directory / f"{name}.sock" for name in ("engine", "agent", "head"))
    with (
        process("tests.bench.source", "--host", str(engine), ready=engine),
        process("tests.bench.pieces", "agent", f"unix:{agent}", str(engine), ready=agent) as agent_process,
        process("tests.bench.pieces", "head", str(head), f"unix:{agent}", ready=head) as head_process,
    ):
        yield Stack(
            direct=f"unix:{engine}", front=f"unix:{head}", agent=agent_process, head=head_process, model="bench"
        )
