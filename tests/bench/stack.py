"""What is measured: the two daemons as they are installed, with the pacing source as the agent's engine."""

import contextlib
import json
import random
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.gguf_bytes import gguf, llama_metadata, llama_tensors

ROOT = Path(__file__).parents[2]
PATH = "/v1/chat/completions"
MODEL = "bench"
SLOTS = 512
MIB = 2**20
PORTS = range(20000, 32000)  # below the ephemeral range, and not the ports of an installation
START_WITHIN_S = 30.0


@dataclass(frozen=True)
class Stack:
    """`direct` is the source's address, `front` the head's: `unix:PATH` or `host:port`."""

    direct: str
    front: str
    agent: psutil.Process
    head: psutil.Process

    def cpu_s(self) -> dict[str, float]:
        found = {}
        for name in ("agent", "head"):
            times = getattr(self, name).cpu_times()
            found[name] = times.user + times.system
        return found

    def memory_mib(self) -> dict[str, float]:
        """Resident memory, and what of it no other process shares (libraries' code is shared)."""
        found = {}
        for name in ("agent", "head"):
            memory = getattr(self, name).memory_full_info()
            found |= {f"{name}_rss_mib": memory.rss / MIB, f"{name}_private_mib": memory.uss / MIB}
        return found


@contextmanager
def daemons(directory: Path, profiles: Path | None = None) -> Iterator[Stack]:
    """A head and an agent with one loaded model, until the block ends.

    Args:
        directory: Empty; for everything that they write. A short path, for sockets lie there.
        profiles: Where each daemon leaves its cProfile (`agent.prof`, `head.prof`) as it ends.
    """
    places = {name: directory / name for name in ("models", "state", "log", "run")}
    for place in places.values():
        place.mkdir()
    (places["models"] / f"{MODEL}.gguf").write_bytes(gguf(llama_metadata(), llama_tensors()))
    agent_port, http_port, grpc_port = _free_ports(3)
    agent_flags = {
        "node-id": MODEL,
        "port": agent_port,
        "engine": _launcher(directory / "llama-server"),
        "model-dirs": places["models"],
        "ollama-dir": "",
        "huggingface-dir": "",
        "state-dir": places["state"],
        "log-dir": places["log"],
        "run-dir": places["run"],
        "caps": f"CPU={2048 * MIB}",
    }
    head_flags = {
        "agents": f"127.0.0.1:{agent_port}",
        "state-dir": directory / "head",
        "http-port": http_port,
        "grpc-port": grpc_port,
        "parallel": SLOTS,
        "context-per-slot": 256,
    }
    front = f"127.0.0.1:{http_port}"
    with ExitStack() as running:
        agent = running.enter_context(_daemon("agent", "agent", agent_flags, directory, profiles))
        head = running.enter_context(_daemon("head", "sollold", head_flags, directory, profiles))
        _until(lambda: b"ready" in _asked(f"http://{front}/readyz"), (agent, head), directory)
        _until(lambda: b"[DONE]" in _asked(f"http://{front}{PATH}", _one_token()), (agent, head), directory)
        (engine,) = places["run"].glob("*.sock")
        yield Stack(
            direct=f"unix:{engine}", front=front, agent=psutil.Process(agent.pid), head=psutil.Process(head.pid)
        )


def _launcher(path: Path) -> Path:
    """Write a program that runs the source: agents start engines with an environment from scratch."""
    path.write_text(f'#!/bin/sh\nexport PYTHONPATH="{ROOT}"\nexec "{sys.executable}" -m tests.bench.source "$@"\n')
    path.chmod(0o700)
    return path


@contextmanager
def _daemon(
    name: str, module: str, flags: dict[str, object], directory: Path, profiles: Path | None
) -> Iterator[subprocess.Popen[bytes]]:
    """`python -m MODULE FLAGS` until the block ends."""
    profiled = ("-m", "cProfile", "-o", str(profiles / f"{name}.prof")) if profiles is not None else ()
    every = {**flags, "redis-url": "", "log-format": "json", "exit-with-parent": "true"}
    command = [sys.executable, *profiled, "-m", module, *(f"--{flag}={content}" for flag, content in every.items())]
    with (directory / f"{name}.log").open("wb") as log:
        child = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=log, stderr=log)
    try:
        yield child
    finally:
        child.terminate()
        child.wait(30)
        child.stdin.close()


def _free_ports(count: int) -> list[int]:
    found = []
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            break
    return found


def _until(answers: Callable[[], bool], children: tuple[subprocess.Popen[bytes], ...], directory: Path) -> None:
    deadline = time.monotonic() + START_WITHIN_S
    while not answers():
        if any(child.poll() is not None for child in children) or time.monotonic() > deadline:
            logs = "".join(f"--- {log.name}\n{log.read_text()[-2000:]}\n" for log in sorted(directory.glob("*.log")))
            raise SystemExit(f"the daemons did not start\n{logs}")
        time.sleep(0.05)


def _asked(url: str, body: bytes | None = None) -> bytes:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=START_WITHIN_S) as answer:
            return answer.read()
    except (urllib.error.URLError, ConnectionError) as error:
        return str(error).encode()


def _one_token() -> bytes:
    """The first request has the model loaded."""
    return json.dumps(
        {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1, "stream": True}
    ).encode()
