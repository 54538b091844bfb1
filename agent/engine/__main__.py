"""`python -m agent.engine build|show`: builds llama.cpp into the cache, or says which engine this node would run."""

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
from sollol.directories import cache_directory
from sollol.errors import SURFACES, Reason, SollolError, refuse

from agent.engine.build import BuildProgress, build_engine
from agent.engine.built import built_engine
from agent.engine.find import FoundEngine, find_engine

_GIB = 1 << 30


def main(argv: list[str]) -> int:
    """Exit status: 0, or the one that stands for the refusal's reason; 130 after Ctrl-C."""
    options = _parse(argv)
    try:
        with asyncio.Runner() as runner:
            return runner.run(_build(options) if options.action == "build" else _show(options))
    except SollolError as error:
        for line in error.refusal.log_lines:
            _say_error(f"  {line}")
        _say_error(f"error: {error.refusal.message}")
        return SURFACES[error.refusal.reason].exit_code
    except KeyboardInterrupt:
        return SURFACES[Reason.CANCELLED].exit_code


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="sollol engine", description=__doc__.split(": ", 1)[1] if __doc__ else None)
    actions = parser.add_subparsers(dest="action", required=True)
    cache = argparse.ArgumentParser(add_help=False)
    cache.add_argument(
        "--cache", type=Path, default=cache_directory(os.environ), help="where built engines live (%(default)s)"
    )
    build = actions.add_parser("build", parents=[cache], help="compile llama.cpp once; about ten minutes on two cores")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    build.add_argument("--jobs", type=int, default=cores, help="files compiled at the same time (%(default)s)")
    show = actions.add_parser("show", parents=[cache], help="say which engine would run, and what it can")
    show.add_argument("--engine", type=Path, help="look at this one instead of searching")
    show.add_argument("--built", action="store_true", help="only ask whether one was built; its path, or exit status 5")
    show.add_argument("--json", action="store_true", help="for programs")
    return parser.parse_args(argv)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _say_error(line: str) -> None:
    sys.stderr.write(line + "\n")


async def _build(options: argparse.Namespace) -> int:
    task = asyncio.current_task()
    assert task is not None
    # A service manager's or a terminal's goodbye ends the compiler too, and leaves a build that can go on.
    for number in (signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        with _bar() if sys.stdout.isatty() else _lines() as on_progress:
            built = await build_engine(
                options.cache, jobs=options.jobs, on_progress=on_progress, environment=os.environ
            )
    except asyncio.CancelledError:
        _say_error("interrupted; the next build goes on from here")
        return SURFACES[Reason.CANCELLED].exit_code
    _say(str(built))
    return 0


@contextmanager
def _lines() -> Iterator[Callable[[BuildProgress], None]]:
    """One line per stage, and per tenth of the compiling."""
    said = ""

    def hear(progress: BuildProgress) -> None:
        nonlocal said
        tenths = progress.done * 10 // progress.total if progress.total else 0
        line = f"{progress.stage} {tenths * 10} %" if progress.total else progress.stage
        if line != said:
            said = line
            _say(line)

    yield hear


@contextmanager
def _bar() -> Iterator[Callable[[BuildProgress], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: PLC0415 - slow to import

    columns = (TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def hear(progress: BuildProgress) -> None:
            bar.update(task, description=progress.stage, completed=progress.done, total=progress.total or None)

        yield hear


async def _show(options: argparse.Namespace) -> int:
    if options.built:
        built = built_engine(options.cache)
        if built is None:
            raise refuse(Reason.ENGINE_MISSING, f"no engine was built in {options.cache}: run `sollol engine build`")
        _say(str(built))
        return 0
    search_path = os.environ.get("PATH", os.defpath)
    found = await find_engine(options.engine, search_path=search_path, cache_dir=options.cache, environ=os.environ)
    if found is None:
        what = "put llama-server on PATH, run `sollol engine build`, or `pip install sollol[prebuilt]`"
        raise refuse(Reason.ENGINE_MISSING, f"no engine on this machine: {what}")
    _say(_as_json(found) if options.json else _as_text(found))
    return 0


def _as_json(found: FoundEngine) -> str:
    return msgspec.json.encode(
        {
            **msgspec.to_builtins(found.engine),
            "argv": found.argv,
            "rpc_server": str(found.rpc_server) if found.rpc_server else None,
            "devices": found.devices,
        }
    ).decode()


def _as_text(found: FoundEngine) -> str:
    engine = found.engine
    beside = f", backends by {found.rpc_server}" if found.rpc_server else ", no backend program beside it"
    rows = [
        ("source", engine.source.value),
        ("path", engine.path),
        ("build", engine.build),
        ("rpc", f"protocol {engine.rpc_protocol}{beside}" if engine.rpc else "no: runs models on this node alone"),
        ("devices", "" if found.devices else "CPU only"),
    ]
    for device in found.devices:
        free, total = device.free_bytes / _GIB, device.total_bytes / _GIB
        rows.append(("", f"{device.device_id}  {device.description}  {free:.1f} of {total:.1f} GiB free"))
    return "\n".join(f"{name:<9}{content}".rstrip() for name, content in rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
