"""`make demo`: a model that no download is needed for, a head and two unequal agents, one streamed answer, the numbers.

Everything runs on this machine, as this user, in a directory that is gone afterwards.
"""

import asyncio
import ctypes
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import psutil

from tests.tiny_model import write_reciting_model

MODEL = "tiny-reciter"
QUESTION = "Who are you?"
TOKENS = 400
REPEATS = 7
READY_WITHIN_S = 120
STOPPED_WITHIN_S = 40
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Answer:
    """One streamed answer as its reader saw it."""

    text: str
    tokens: int
    first_token_s: float
    total_s: float


@dataclass(frozen=True)
class Cluster:
    url: str
    head: str
    run_dir: Path
    environ: dict[str, str]


def title(text: str) -> None:
    shown = f"\x1b[1;36m{text}\x1b[0m" if sys.stdout.isatty() else text
    print(f"\n{shown}", flush=True)


def free_ports(count: int) -> int:
    """The first of `count` neighbouring ports that nobody listens on."""
    for first in range(7460, 7660, count):
        if all(is_free(port) for port in range(first, first + count)):
            return first
    raise SystemExit("demo: no free ports between 7460 and 7660")


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


@asynccontextmanager
async def cluster(home: Path) -> AsyncIterator[Cluster]:
    """`sollol up` with two agents; stopped on leaving, and it must say so with exit status 0."""
    http = free_ports(4)
    grpc, agent = http + 1, http + 2
    (home / "run").mkdir(mode=0o700)
    environ = os.environ | {
        "XDG_RUNTIME_DIR": str(home / "run"),
        "PYTHONUNBUFFERED": "1",
        # A toy this small runs slower on more threads, and their spinning would be measured as ours on a small machine.
        "SOLLOL_AGENT_THREADS": "1",
    }
    up = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "sollold.cli", "up", "--models", str(home / "models"), "--agents", "2"),
        *(
            "--http-port",
            str(http),
            "--grpc-port",
            str(grpc),
            "--agent-port",
            str(agent),
            "--state",
            str(home / "state"),
        ),
        env=environ,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        await asyncio.wait_for(announced(up), READY_WITHIN_S)
        yield Cluster(f"http://127.0.0.1:{http}", f"127.0.0.1:{grpc}", home / "run", environ)
    finally:
        if up.returncode is None:
            up.terminate()
        status = await asyncio.wait_for(up.wait(), STOPPED_WITHIN_S)
    if status != 0:
        raise SystemExit(f"demo: sollol up ended with status {status}")


async def announced(up: asyncio.subprocess.Process) -> None:
    """Pass on what `sollol up` says until it is ready."""
    assert up.stdout is not None
    while line := await up.stdout.readline():
        print("  " + line.decode().rstrip(), flush=True)
        if line.startswith(b"Ctrl-C"):
            return
    raise SystemExit("demo: sollol up ended before it was ready")


async def command(found: Cluster, *words: str) -> None:
    """Run one `sollol` command and show it."""
    title("$ sollol " + " ".join(words))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "sollold.cli", "--head", found.head, *words),
        env=found.environ,
        stdin=asyncio.subprocess.DEVNULL,
    )
    if status := await asyncio.wait_for(process.wait(), 60):
        raise SystemExit(f"demo: sollol {words[0]} ended with status {status}")


async def ask(session: aiohttp.ClientSession, url: str, *, show: bool = False) -> Answer:
    """Stream one chat completion and time it, token by token."""
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": TOKENS,
        "temperature": 0,
        "stream": True,
    }
    pieces: list[str] = []
    first_token_s = 0.0
    begun = time.perf_counter()
    async with session.post(f"{url}/v1/chat/completions", json=body) as response:
        if response.status != 200:
            raise SystemExit(f"demo: {response.status}: {await response.text()}")
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise SystemExit(f"demo: {event['error']}")
            piece = next((choice["delta"].get("content") for choice in event["choices"]), None)
            if piece:
                first_token_s = first_token_s or time.perf_counter() - begun
                pieces.append(piece)
                if show:
                    print(piece, end="", flush=True)
    return Answer("".join(pieces), len(pieces), first_token_s, time.perf_counter() - begun)


def engine_socket(run_dir: Path) -> str:
    """Where the engine itself listens: the one unix socket of a coordinator."""
    found = [str(path) for path in run_dir.rglob("*.sock") if path.is_socket() and "redis" not in str(path)]
    if len(found) != 1:
        raise SystemExit(f"demo: expected one engine socket, found {found}")
    return found[0]


async def compare(through: aiohttp.ClientSession, found: Cluster) -> None:
    """The same request to the head and to the engine itself, in turns, so that both see the same machine."""
    asked: dict[str, list[Answer]] = {"head": [], "engine": []}
    connector = aiohttp.UnixConnector(engine_socket(found.run_dir))
    async with aiohttp.ClientSession(connector=connector) as direct:
        for _ in range(REPEATS):
            asked["head"].append(await ask(through, found.url))
            asked["engine"].append(await ask(direct, "http://engine"))
    texts = {answer.text for answers in asked.values() for answer in answers}
    if len(texts) != 1:
        raise SystemExit("demo: the head and the engine gave different answers")
    title(f"What SOLLOL's two hops add (the same request {REPEATS} times each way, medians)")
    through_it, alone = medians(asked["head"]), medians(asked["engine"])
    tokens = asked["head"][0].tokens
    print("                        first token   whole answer     tokens/s")
    for name, (first_s, total_s) in (("through SOLLOL", through_it), ("the engine alone", alone)):
        print(f"  {name:<18}{first_s * 1e3:12.1f} ms{total_s * 1e3:12.1f} ms{tokens / total_s:13.0f}")
    added_s = (through_it[1] - alone[1]) / tokens
    print(
        f"  added             {(through_it[0] - alone[0]) * 1e3:12.1f} ms{(through_it[1] - alone[1]) * 1e3:12.1f} ms"
        f"   {added_s * 1e6:.0f} µs per token, {100 * (through_it[1] / alone[1] - 1):+.0f} %"
    )
    print("  (The toy takes some hundred µs per token; a real model takes ten thousand and more.)")


def medians(answers: list[Answer]) -> tuple[float, float]:
    return (
        statistics.median(answer.first_token_s for answer in answers),
        statistics.median(answer.total_s for answer in answers),
    )


async def demo(home: Path) -> None:
    begun = time.perf_counter()
    title("A model: 3 MB, made here; it knows one text by heart and recites it whatever you ask")
    (home / "models").mkdir()
    write_reciting_model(home / "models" / f"{MODEL}.gguf")
    title("$ sollol up --models … --agents 2     (a head, two unequal agents, a private Redis)")
    async with cluster(home) as found, aiohttp.ClientSession() as session:
        await command(found, "nodes")
        await command(found, "place", MODEL)
        title(f"$ curl {found.url}/v1/chat/completions     (“{QUESTION}”, streamed; the model is loaded first)")
        cold = await ask(session, found.url, show=True)
        warm = await ask(session, found.url)
        print(
            f"\n\n  first token after {cold.first_token_s:.2f} s with loading the model, {warm.first_token_s * 1e3:.1f} ms"
            f" when it is loaded; {warm.tokens} tokens, {warm.tokens / warm.total_s:.0f} tokens/s"
        )
        await command(found, "pools")
        await compare(session, found)
        print()
    left = psutil.Process().children(recursive=True)
    if left:
        raise SystemExit(f"demo: still running: {[process.name() for process in left]}")
    print(f"Nothing is left running. The whole demo took {time.perf_counter() - begun:.0f} s.")
    print("Next: .venv/bin/sollol up --models DIRECTORY-WITH-YOUR-GGUF-FILES")


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)  # in step with what `sollol` itself prints, in a file too
    # Orphans become our children instead of init's: "nothing is left running" can then be checked.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with tempfile.TemporaryDirectory(prefix="sollol-demo-") as home:  # short: unix sockets live in it
        asyncio.run(demo(Path(home)))


if __name__ == "__main__":
    main()
