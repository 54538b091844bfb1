"""What the way between two nodes costs: `python -m tests.bench.tunnel --write docs/tunnel.md`, all on one machine."""

import argparse
import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import psutil
from sollol.directories import cache_directory
from sollol.report import DeviceShare, InstanceState

from agent.engine.built import built_engine
from agent.supervisor.owner import Limits
from agent.supervisor.supervisor import Supervisor
from tests.bench.stack import ROOT
from tests.certificates import authority, write_identity
from tests.forwarding import forwarding, tunnelling
from tests.supervised import plan_of, settled, site_of, supervising, wish_of
from tests.tiny_model import write_reciting_model

MIB = 1 << 20
SECRET = bytes(range(32))
MESSAGE_BYTES = 1000
ROUND_TRIPS = 3000
TOKENS = 400
Row = dict[str, float | str]


class Sink:
    """Takes what comes: after `e` it says it again, after `s` it says `k` once `size` bytes have arrived."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=16)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with connection, contextlib.suppress(ConnectionError):
                self._echo(connection) if connection.recv(1) == b"e" else self._take(connection)

    @staticmethod
    def _echo(connection: socket.socket) -> None:
        while data := connection.recv(1 << 16):
            connection.sendall(data)

    def _take(self, connection: socket.socket) -> None:
        buffer, left = bytearray(MIB), self._size
        while left and (size := connection.recv_into(buffer)):
            left -= size
        connection.sendall(b"k")


def round_trip_us(port: int) -> float:
    with _connected(port, b"e") as link:
        times = []
        for _ in range(ROUND_TRIPS):
            began = time.perf_counter()
            link.sendall(b"x" * MESSAGE_BYTES)
            left = MESSAGE_BYTES
            while left:
                left -= len(link.recv(1 << 16))
            times.append((time.perf_counter() - began) * 1e6)
    return statistics.median(times)


def mb_per_s(port: int, size: int, *, told: bool = True) -> float:
    """`told`: the sink's answer comes back. Else time ends when the last byte is written, which little buffers delay."""
    data = b"z" * MIB
    with _connected(port, b"s") as link:
        began = time.perf_counter()
        for _ in range(size // MIB):
            link.sendall(data)
        if told:
            link.recv(1)
        return size / (time.perf_counter() - began) / 1e6


def _connected(port: int, first: bytes) -> socket.socket:
    link = socket.create_connection(("127.0.0.1", port), timeout=60)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    link.sendall(first)
    return link


def memory_mib(*pids: int) -> str:
    """Of each process: what it alone uses, of all that is resident."""
    found = [psutil.Process(pid).memory_full_info() for pid in pids]
    return " + ".join(f"{each.uss / MIB:.1f} of {each.rss / MIB:.1f}" for each in found)


@contextlib.asynccontextmanager
async def ours(directory: Path, sink: Sink, tls: dict[str, Path] | None) -> AsyncIterator[tuple[int, tuple[int, ...]]]:
    """Yield the port to connect to, and the pids between it and the sink."""
    directory.mkdir()
    if tls is None:
        async with forwarding(directory, sink.port) as forwarder:
            yield forwarder.status.port, (forwarder.process.pid,)
        return
    lend = {"tls": tls["b"], "coordinator": "a", "pool": "p", "secret": SECRET}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    async with forwarding(directory, sink.port, **lend) as forwarder:
        to = ("127.0.0.1", forwarder.status.port)
        async with tunnelling(directory, port, to, lender="b", tls=tls["a"], pool="p", secret=SECRET) as tunnel:
            yield tunnel.route.port, (tunnel.process.pid, forwarder.process.pid)


@contextlib.contextmanager
def other(kind: str, sink: Sink, tls: dict[str, Path]) -> Iterator[tuple[int, tuple[int, ...]]]:
    target, processes = sink.port, []
    try:
        for end, identity in (("far", tls["b"]), ("near", tls["a"])):
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            argv = [sys.executable, "-P", "-m", "tests.bench.pumps", kind, end, str(port), str(target), str(identity)]
            environ = {**os.environ, "PYTHONPATH": str(ROOT)}
            processes.append(subprocess.Popen(argv, stdout=subprocess.PIPE, env=environ))
            assert processes[-1].stdout is not None
            assert processes[-1].stdout.readline() == b"listens\n"
            target = port
        yield target, tuple(process.pid for process in processes)
    finally:
        for process in processes:
            process.kill()
            process.communicate()


async def ways(directory: Path, tls: dict[str, Path], size: int, rounds: int) -> list[Row]:
    sink = Sink(size)
    rows = [_row("nothing", sink.port, (), size, rounds)]
    async with ours(directory / "plain", sink, None) as (port, pids):
        rows.append(await asyncio.to_thread(_row, "forwarder (direct)", port, pids, size, rounds))
    async with ours(directory / "tls", sink, tls) as (port, pids):
        rows.append(await asyncio.to_thread(_row, "tunnel, TLS, forwarder", port, pids, size, rounds))
    with other("asyncio", sink, tls) as (port, pids):
        rows.append(await asyncio.to_thread(_row, "the same with asyncio's TLS", port, pids, size, rounds))
    with other("threads", sink, tls) as (port, pids):
        rate = await asyncio.to_thread(lambda: mb_per_s(port, size, told=False))
        rows.append({"between": "blocking threads, one way only", "µs": "-", "MB/s": rate, "MiB": memory_mib(*pids)})
    return rows


def _row(between: str, port: int, pids: tuple[int, ...], size: int, rounds: int) -> Row:
    trip_us = min(round_trip_us(port) for _ in range(rounds))
    rate = max(mb_per_s(port, size) for _ in range(rounds))
    return {"between": between, "µs": trip_us, "MB/s": rate, "MiB": memory_mib(*pids) if pids else "-"}


async def tokens_per_s(coordinator: Supervisor, lenders: dict[str, Supervisor], secret: bytes, rounds: int) -> float:
    wish = {"coordinator_node": "a", "pool_secret": secret}
    backends = tuple([await each.start_backend(wish_of("p", **wish)) for each in lenders.values()])
    shares = [DeviceShare(device_id="CPU", layers=0)]
    shares += [
        DeviceShare(device_id="CPU", layers=layers, node_id=node_id)
        for node_id, layers in zip(lenders, (5, 4), strict=True)
    ]
    plan = msgspec.structs.replace(plan_of("m"), shares=tuple(shares), backends=backends, pool_secret=secret)
    await coordinator.start("p", plan)
    assert (await settled(coordinator, "p")).state is InstanceState.READY
    rates = []
    for _ in range(rounds):
        reader, writer = await asyncio.open_unix_connection(str(coordinator.socket_of("p")))
        body = json.dumps({"prompt": "hello", "n_predict": TOKENS, "ignore_eos": True})
        writer.write(f"POST /completion HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        said = (await reader.read(-1)).partition(b"\r\n\r\n")[2]
        writer.close()
        rates.append(json.loads(said)["timings"]["predicted_per_second"])
    await coordinator.stop("p")
    await asyncio.gather(*(each.stop("p") for each in lenders.values()))
    return max(rates)


async def pools(directory: Path, tls: dict[str, Path], rounds: int) -> list[Row]:
    engine = built_engine(cache_directory(os.environ))
    assert engine is not None, "no engine: sollol engine build"
    model = directory / "m.gguf"
    write_reciting_model(model)
    found: dict[str, float] = {}
    for way in ("direct", "tunnel"):
        async with contextlib.AsyncExitStack() as stack:
            agents = {}
            for number, name in enumerate("abc"):
                site = site_of(
                    engine.parent / "ggml-rpc-server", name, range(19_000 + 40 * number, 19_040 + 40 * number)
                )
                site = msgspec.structs.replace(site, tls_dir=tls[name] if way == "tunnel" else None)
                where = directory / f"{way}-{name}"
                agent = supervising(where, (str(engine),), resolve=lambda _: model, limits=Limits(), site=site)
                agents[name] = await stack.enter_async_context(agent)
            coordinator = agents.pop("a")
            found[way] = await tokens_per_s(coordinator, agents, SECRET if way == "tunnel" else b"", rounds)
    ratio = found["tunnel"] / found["direct"]
    return [{"tokens/s, direct": found["direct"], "through tunnels": found["tunnel"], "ratio": ratio}]


def table(rows: list[Row]) -> str:
    def text(content: float | str) -> str:
        return content if isinstance(content, str) else f"{content:.2f}" if content < 10 else f"{content:.0f}"

    lines = [list(rows[0]), ["---"] * len(rows[0]), *([text(each) for each in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


PAGE = """# What the tunnel costs

Made by `make tunnel-bench` (`python -m tests.bench.tunnel --write docs/tunnel.md`); do not edit. One machine with {cores} cores plays both
nodes, and client and backend too, so every figure is a lower bound, and only ratios within one run say something.

## One connection

A round trip of {message} bytes there and back (median, the best of {rounds} runs), {size} MiB one way (the best of {rounds}), and the memory of each
process: its own of what is resident.

{ways}

TLS 1.3, `{cipher}`, done by OpenSSL in user space; kTLS: {ktls}. The asyncio rows do no admission and no
counting. Threads that block are the limit of what one direction could do, and no choice: an OpenSSL connection must not be read and
written at once.

## A pool over three nodes

A tiny model, nine layers on two backends, whose tokens cost little more than the hand-over between processes: the worst case for a
tunnel. {tokens} tokens, the best of {rounds} answers.

{pools}
"""


def ktls() -> str:
    try:
        modules = Path("/proc/sys/net/ipv4/tcp_available_ulp").read_text().split()
    except OSError:
        modules = []
    return "this kernel has it" if "tls" in modules else "not in this kernel"


async def page(size: int, rounds: int) -> str:
    with tempfile.TemporaryDirectory(prefix="sollol-bench-", dir="/tmp") as name:
        directory, ca = Path(name), authority()
        tls = {each: write_identity(directory / f"pki-{each}", ca, "agent", each) for each in "abc"}
        ways_rows, pool_rows = await ways(directory, tls, size, rounds), await pools(directory, tls, rounds)
    return PAGE.format(
        cores=os.cpu_count(),
        message=MESSAGE_BYTES,
        rounds=rounds,
        size=size // MIB,
        ways=table(ways_rows),
        cipher="TLS_AES_256_GCM_SHA384",
        ktls=ktls(),
        tokens=TOKENS,
        pools=table(pool_rows),
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.tunnel", description=__doc__)
    parser.add_argument("--mib", type=int, default=512, help="sent one way")
    parser.add_argument("--rounds", type=int, default=3, help="of each measurement; the best counts")
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    text = asyncio.run(page(options.mib * MIB, options.rounds))
    print(text)
    if options.write:
        options.write.write_text(text)


if __name__ == "__main__":
    main()
