"""Finds the engine this node runs: the configured one, else PATH, else the one built here, else the xllamacpp wheel."""

import importlib.util
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import structlog
from msgspec import Struct
from sollol.engine import Engine, EngineSource
from sollol.errors import Reason, SollolError, refuse

from agent.engine.ask import Answer, ask
from agent.engine.built import BINARY, built_engine
from agent.engine.devices import EngineDevice, parse_build, parse_devices
from agent.engine.environment import engine_environment
from agent.engine.rpc_probe import rpc_protocol

RPC_SERVERS = ("ggml-rpc-server", "rpc-server")  # today's name, and the one older packages ship
_WHEEL = "xllamacpp"
# -P: a file in the working directory must never be imported instead of what is installed.
_WHEEL_ARGV = (sys.executable, "-P", "-m", "agent.engine.xllama")
_WHAT_TO_DO = "set engine to the path of a llama-server, or to nothing to have one searched for"

log = structlog.get_logger()


class FoundEngine(Struct, frozen=True, kw_only=True):
    """An engine that answered.

    Attributes:
        argv: How to run it; a coordinator's flags go behind.
        devices: What layers can be offloaded to, in the engine's order, with the memory that was free when asked.
        rpc_server: The backend program beside it, when there is one.
    """

    engine: Engine
    argv: tuple[str, ...]
    devices: tuple[EngineDevice, ...] = ()
    rpc_server: Path | None = None


class _Candidate(Struct, frozen=True):
    source: EngineSource
    path: Path
    argv: tuple[str, ...]


async def find_engine(
    configured: Path | None, *, search_path: str, cache_dir: Path, environ: Mapping[str, str] | None = None
) -> FoundEngine | None:
    """Return the first engine that answers, or None when there is none. A question takes 10 s at most.

    Args:
        configured: The operator's choice; nothing else is looked at when it is given.
        search_path: As in PATH.
        cache_dir: Where engines built here live.
        environ: Our own environment, of which engines get the harmless part; `search_path` is its PATH.

    Raises:
        SollolError: ENGINE_MISSING when the configured engine is absent or does not work.
    """
    environment = engine_environment({**(environ or {}), "PATH": search_path})
    if configured is not None:
        candidate = _configured(configured)
        found = await _examine(candidate, environment)
        if isinstance(found, FoundEngine):
            return found
        raise _useless(candidate.path, f"does not work as llama-server: {found.trouble}")
    for candidate in _candidates(search_path, cache_dir):
        found = await _examine(candidate, environment)
        if isinstance(found, FoundEngine):
            return found
        log.warning("engine_unusable", path=str(candidate.path), source=candidate.source.value, why=found.trouble)
    return None


async def listed_devices(found: FoundEngine | None, environ: Mapping[str, str]) -> tuple[EngineDevice, ...] | None:
    """Its devices as they are now; None when there is no engine, or no answer, or others than when it was found."""
    if found is None:
        return None
    listing = await ask((*found.argv, "--list-devices"), engine_environment(environ))
    devices = parse_devices(listing.output) if listing.status == 0 else ()
    same = [device.device_id for device in devices] == [device.device_id for device in found.devices]
    return devices if same else None


def _configured(given: Path) -> _Candidate:
    path = given.expanduser().absolute()
    if not path.exists():
        raise _useless(path, "is not there")
    if not path.is_file() or not os.access(path, os.X_OK):
        raise _useless(path, "is not an executable file")
    return _Candidate(EngineSource.CONFIGURED, path, (str(path),))


def _useless(path: Path, why: str) -> SollolError:
    return refuse(Reason.ENGINE_MISSING, f"the configured engine {path} {why}; {_WHAT_TO_DO}")


def _candidates(search_path: str, cache_dir: Path) -> list[_Candidate]:
    found = []
    if on_path := shutil.which(BINARY, path=search_path):
        path = Path(on_path).absolute()
        found.append(_Candidate(EngineSource.PATH, path, (str(path),)))
    if built := built_engine(cache_dir):
        found.append(_Candidate(EngineSource.BUILT, built, (str(built),)))
    # Only looked up: importing it here would load all of llama.cpp into the agent.
    if (spec := importlib.util.find_spec(_WHEEL)) and spec.origin:
        found.append(_Candidate(EngineSource.XLLAMACPP, Path(spec.origin).parent, _WHEEL_ARGV))
    return found


async def _examine(candidate: _Candidate, environment: Mapping[str, str]) -> FoundEngine | Answer:
    """Return what the candidate is, or the answer that shows that it does not work."""
    version = await ask((*candidate.argv, "--version"), environment)
    if version.status != 0:
        return version
    listing = await ask((*candidate.argv, "--list-devices"), environment)
    if listing.status != 0:
        return listing
    protocol = await rpc_protocol(lambda more: ask((*candidate.argv, *more), environment))
    return FoundEngine(
        engine=Engine(
            source=candidate.source,
            path=str(candidate.path),
            build=parse_build(version.errors) or parse_build(version.output),
            rpc=protocol is not None,
            rpc_protocol=protocol or "",
        ),
        argv=candidate.argv,
        devices=parse_devices(listing.output),
        rpc_server=_rpc_server_beside(candidate.path),
    )


def _rpc_server_beside(engine: Path) -> Path | None:
    """Look beside the engine, then beside what it is a link to."""
    folders = dict.fromkeys((engine.parent, engine.resolve().parent))
    paths = (folder / name for folder in folders for name in RPC_SERVERS)
    return next((path for path in paths if path.is_file() and os.access(path, os.X_OK)), None)
