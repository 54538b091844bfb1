"""Compares the memory model with what llama.cpp logs, over a grid: `python -m tests.memory_grid --write docs/memory-model.md`.

Each load starts a real llama-server with the command line that an agent builds, here with backends on loopback, and
ends it as soon as it has logged its buffers: some 650 loads in two or three minutes on one core.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
from sollol.directories import cache_directory
from sollol.gguf_split import read_model
from sollol.memory import device_shares
from sollol.report import CoordinatorPlan, DeviceKind, DeviceShare, ModelShape
from sollol.shape import shape_of

from agent.engine.built import built_engine
from agent.supervisor.buffers import HOST, Buffers, logged_buffers
from agent.supervisor.command import coordinator_argv, coordinator_environment
from tests.many_architectures import ARCHITECTURES, write_model
from tests.memory_report import Load, Point, as_csv, as_markdown

LOADED = "reserve took"  # the last that an engine logs of its buffers; it warms up then
LOAD_TIMEOUT_S = 60
START_TIMEOUT_S = 5
MOST_BACKENDS = 3
PORTS = range(20_000, 32_000)
EVERY = slice(None)

LOADS = (
    Load(context=512, parallel=1, kv_type="f16", ubatch=512),
    Load(context=4096, parallel=1, kv_type="f16", ubatch=512),
    Load(context=4096, parallel=3, kv_type="f16", ubatch=512),
    Load(context=16384, parallel=1, kv_type="f16", ubatch=512),
    Load(context=8192, parallel=2, kv_type="q8_0", ubatch=512),
    Load(context=4096, parallel=1, kv_type="f32", ubatch=512),
    Load(context=4096, parallel=2, kv_type="f16", ubatch=128),
    Load(context=8192, parallel=1, kv_type="bf16", ubatch=2048),
    Load(context=6000, parallel=4, kv_type="q4_0", ubatch=256),
)


def splits_of(layers: int) -> tuple[tuple[int, ...], ...]:
    """Layers on the coordinator's CPU, then on backends: all of them here, on one, two and three, and both mixed."""
    every = layers + 1
    half, third = every // 2, every // 3
    return (
        (every,),
        (0, every),
        (0, half, every - half),
        (0, third, third, every - 2 * third),
        (half, every - half),
        (third, third, every - 2 * third),
    )


@contextmanager
def lent_backends(engine: Path, ports: Callable[[], int], count: int) -> Iterator[list[str]]:
    """Start `ggml-rpc-server`s and yield their addresses."""
    binary = engine.with_name("ggml-rpc-server")
    with ExitStack() as stack:
        addresses = []
        for port in [ports() for _ in range(count)]:
            process = subprocess.Popen(
                [binary, "-H", "127.0.0.1", "-p", str(port), "-t", "1"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                restore_signals=False,  # a coordinator that is killed must not end them by SIGPIPE
            )
            stack.callback(process.wait, timeout=10)
            stack.callback(process.kill)
            _wait_until_it_listens(process)
            addresses.append(f"127.0.0.1:{port}")
        yield addresses


def _wait_until_it_listens(process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not any(link.status == psutil.CONN_LISTEN for link in psutil.Process(process.pid).net_connections("tcp4")):
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"{process.args!r} does not listen")
        time.sleep(0.01)


def predicted_shares(shape: ModelShape, split: Sequence[int], load: Load) -> tuple[DeviceShare, ...]:
    return device_shares(
        shape,
        [(HOST if not at else f"RPC{at - 1}", DeviceKind.CPU, count) for at, count in enumerate(split)],
        context_per_slot=load.context,
        parallel=load.parallel,
        kv_type=load.kv_type,
        ubatch=load.ubatch,
    )


def logged_by_engine(
    engine: Path, addresses: Sequence[str], model: Path, shares: tuple[DeviceShare, ...], load: Load
) -> dict[str, Buffers]:
    """Load `model` as an agent would, and end the engine as soon as it has its buffers."""
    plan = CoordinatorPlan(
        model=model.stem,
        parallel=load.parallel,
        context_per_slot=load.context,
        shares=shares,
        kv_type=load.kv_type,
        batch=max(512, load.ubatch),
        ubatch=load.ubatch,
        threads=1,
    )
    used = [share.device_id for share in shares[1:]]
    socket_path = model.with_suffix(".sock")
    argv = coordinator_argv(
        (str(engine), *(("--rpc", ",".join(addresses[: len(used)])) if used else ())),
        plan,
        model_path=model,
        socket_path=socket_path,
        gpu_devices=tuple(used),
        threads=1,
    )
    lines = _log_until_loaded(argv)
    socket_path.unlink(missing_ok=True)
    found = logged_buffers(lines)
    whole = len(found) == len(shares) and all(buffers.compute for buffers in found.values())
    assert whole, f"{model.stem} did not load as planned: {argv}\n{''.join(lines[-12:])}"
    return found


def _log_until_loaded(argv: Sequence[str]) -> list[str]:
    lines = []
    with subprocess.Popen(
        argv,
        # Stays open: at its end an engine that is ready exits, perhaps before its log is written.
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=coordinator_environment(os.environ),
    ) as process:
        late = threading.Timer(LOAD_TIMEOUT_S, process.kill)
        late.start()
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if LOADED in line:
                break
        late.cancel()
        process.kill()
    return lines


def points_of(
    engine: Path, addresses: Sequence[str], name: str, model: Path, loads: Sequence[Load], *, splits: slice = EVERY
) -> Iterator[Point]:
    """Every device of every load of one model in `splits` of those there are."""
    shape = shape_of(read_model([model]))
    for split in splits_of(shape.layers)[splits]:
        for load in loads:
            shares = predicted_shares(shape, split, load)
            logged = logged_by_engine(engine, addresses, model, shares, load)
            for at, share in enumerate(shares):
                buffers = logged[HOST if not at else addresses[at - 1]]
                yield Point(
                    model=name,
                    split=split,
                    device=at,
                    load=load,
                    predicted=(share.weight_bytes, share.kv_bytes, share.compute_bytes),
                    margin=share.margin_bytes,
                    logged=(buffers.model + buffers.mapped, buffers.kv, buffers.compute + buffers.output),
                    repacked=bool(buffers.model and buffers.mapped),
                )


def _free_ports() -> Iterator[int]:
    for port in PORTS:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        yield port


def main() -> None:
    parser = argparse.ArgumentParser(description="compare predicted memory with what the engine logs")
    parser.add_argument("--write", type=Path, help="the page to write, and every point beside it as .csv")
    parser.add_argument("--only", nargs="*", default=list(ARCHITECTURES), help="models, by name")
    arguments = parser.parse_args()
    engine = built_engine(cache_directory(os.environ))
    if engine is None:
        sys.exit("no llama-server: run `sollol engine build` first")
    points: list[Point] = []
    began = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as folder,
        lent_backends(engine, _free_ports().__next__, MOST_BACKENDS) as addresses,
    ):
        for name in arguments.only:
            model = Path(folder) / "model.gguf"
            write_model(model, ARCHITECTURES[name])
            points += points_of(engine, addresses, name, model, LOADS)
            print(f"{name}: {len(points)} devices so far, {time.monotonic() - began:.0f} s", file=sys.stderr)
    page = as_markdown(points)
    if arguments.write is None:
        print(page)
        return
    arguments.write.parent.mkdir(exist_ok=True)
    arguments.write.write_text(page)
    arguments.write.with_suffix(".csv").write_text(as_csv(points))


if __name__ == "__main__":
    main()
