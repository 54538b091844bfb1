"""`python -m tests.bench relay`: what SOLLOL adds to a token. README.md beside this says how to read the figures."""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.bench.load import measure

PATH = "/v1/chat/completions"


@contextmanager
def process(*arguments: str, ready: Path) -> Iterator[psutil.Process]:
    """A process of this bench's own modules, until it is ready and then until the block ends."""
    child = subprocess.Popen(
        [sys.executable, "-m", *arguments], cwd=Path(__file__).parents[2], stdin=subprocess.DEVNULL
    )
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
def pieces(directory: Path) -> Iterator[dict[str, object]]:
    engine, agent, head = (directory / f"{name}.sock" for name in ("engine", "agent", "head"))
    with (
        process("tests.bench.source", "--host", str(engine), ready=engine) as source,
        process("tests.bench.pieces", "agent", f"unix:{agent}", str(engine), ready=agent) as agent_process,
        process("tests.bench.pieces", "head", str(head), f"unix:{agent}", ready=head) as head_process,
    ):
        yield {
            "direct": f"unix:{engine}",
            "front": f"unix:{head}",
            "source": source,
            "agent": agent_process,
            "head": head_process,
        }


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


class Usage:
    """CPU seconds of each daemon between two calls."""

    def __init__(self, stack: dict[str, object]) -> None:
        self._processes = {name: stack[name] for name in ("agent", "head")}
        self._marks: list[dict[str, float]] = []

    def __call__(self) -> None:
        self._marks.append({name: cpu_s(process) for name, process in self._processes.items()})

    def used_s(self) -> dict[str, float]:
        first, last = self._marks
        return {name: last[name] - first[name] for name in first}


async def relay_row(stack: dict[str, object], streams: int, seconds: float) -> dict[str, float]:
    direct = await measure(stack["direct"], path=PATH, model="bench", streams=streams, seconds=seconds)
    usage = Usage(stack)
    relayed = await measure(stack["front"], path=PATH, model="bench", streams=streams, seconds=seconds, between=usage)
    tokens = max(1, len(relayed.delays_ns))
    used = usage.used_s()
    return {
        "streams": streams,
        "tokens_per_s": tokens / seconds,
        "direct_p50_ms": direct.percentile_ms(0.5),
        "direct_p99_ms": direct.percentile_ms(0.99),
        "added_p50_ms": relayed.percentile_ms(0.5) - direct.percentile_ms(0.5),
        "added_p99_ms": relayed.percentile_ms(0.99) - direct.percentile_ms(0.99),
        "agent_us_per_token": used["agent"] / tokens * 1e6,
        "head_us_per_token": used["head"] / tokens * 1e6,
        "both_us_per_token": sum(used.values()) / tokens * 1e6,
        "agent_rss_mib": stack["agent"].memory_info().rss / 2**20,
        "head_rss_mib": stack["head"].memory_info().rss / 2**20,
    }


def show(rows: list[dict[str, float]]) -> None:
    names = list(rows[0])
    print(" ".join(f"{name:>18}" for name in names))
    for row in rows:
        print(" ".join(f"{row[name]:>18.2f}" for name in names))


def relay(options: argparse.Namespace) -> list[dict[str, float]]:
    rows = []
    with tempfile.TemporaryDirectory(prefix="sollol-bench-") as directory, pieces(Path(directory)) as stack:
        for streams in options.streams:
            rows.append(asyncio.run(relay_row(stack, streams, options.seconds)))
    return rows


def main() -> None:
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("what", choices=["relay"])
    parser.add_argument("--streams", type=lambda text: [int(part) for part in text.split(",")], default=[1, 50, 200])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = relay(options)
    print(json.dumps(rows, indent=1)) if options.json else show(rows)


if __name__ == "__main__":
    main()
