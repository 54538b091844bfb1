"""Builds llama.cpp into the cache: fetch, verify, unpack, configure, compile, install.

Everything happens in `<key>.building` beside the result, which appears by one rename when it is complete. An
interrupted build leaves that directory, and the next one goes on from there.
"""

import asyncio
import fcntl
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from msgspec import Struct
from sollol.errors import Reason, refuse

from agent.engine.ask import ask
from agent.engine.built import LLAMA_CPP, BuildSpec, build_home, built_engine
from agent.engine.environment import engine_environment
from agent.engine.source import fetch, remove, unpack
from agent.engine.steps import Steps

_COMPILERS = (("C", "CC", ("cc", "gcc", "clang")), ("C++", "CXX", ("c++", "g++", "clang++")))


class BuildProgress(Struct, frozen=True):
    """`stage`: fetching, unpacking, configuring, compiling, installing. `total` is 0 where nothing can be counted."""

    stage: str
    done: int = 0
    total: int = 0


class _Places(Struct, frozen=True):
    home: Path
    work: Path

    @property
    def tools(self) -> Path:
        return self.work / "tools"

    @property
    def log(self) -> Path:
        return self.work / "build.log"


async def build_engine(
    cache_dir: Path,
    *,
    jobs: int,
    on_progress: Callable[[BuildProgress], None],
    environment: Mapping[str, str],
    spec: BuildSpec = LLAMA_CPP,
) -> Path:
    """Return the built llama-server; at once when it is there already. Takes about ten minutes on two cores.

    `jobs` files are compiled at the same time; a gigabyte of memory each is enough. pip and the compiler get
    `environment`, which should be the user's own, and its PATH is searched.

    Raises:
        SollolError: ENGINE_MISSING when there is no compiler, the source cannot be had, or the build fails, then with
            the log's last lines; RETRYABLE when another build of the same is running.
    """
    home = build_home(cache_dir, spec)
    _check_compilers(environment)
    with _locked(home):
        if built := built_engine(cache_dir, spec):
            return built
        places = _Places(home, home.with_name(f"{home.name}.building"))
        places.work.mkdir(parents=True, exist_ok=True)
        places.log.unlink(missing_ok=True)
        steps = Steps(places.log, environment, lambda done, total: on_progress(BuildProgress("compiling", done, total)))
        on_progress(BuildProgress("fetching"))
        archive = await fetch(spec, into=places.work / "download", python=sys.executable, steps=steps)
        on_progress(BuildProgress("unpacking"))
        await asyncio.to_thread(unpack, archive, spec, into=places.work / "source")
        on_progress(BuildProgress("configuring"))
        await _compile(spec, places, steps, environment, jobs)
        on_progress(BuildProgress("installing"))
        return await _install(spec, places, environment)


def _check_compilers(environment: Mapping[str, str]) -> None:
    for language, variable, names in _COMPILERS:
        chosen = environment.get(variable, "").split()[:1] or names
        if not any(shutil.which(name, path=environment.get("PATH")) for name in chosen):
            raise refuse(
                Reason.ENGINE_MISSING,
                f"no {language} compiler found ({', '.join(chosen)}): install one, with `apt install g++ make` or "
                "`dnf install gcc-c++ make`, and build again; or install sollol[prebuilt], which needs none",
            )


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    """Only one process builds one thing. The lock dies with its holder, so it can never be left behind."""
    home.parent.mkdir(parents=True, exist_ok=True)
    path = home.with_name(f"{home.name}.lock")
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            message = f"another build of the same engine is running (it holds {path}): wait for it to end"
            raise refuse(Reason.ENGINE_MISSING, message, retryable=True) from error
        yield


async def _compile(spec: BuildSpec, places: _Places, steps: Steps, environment: Mapping[str, str], jobs: int) -> None:
    objects = places.work / "objects"
    cmake, ninja, more = await _tools(places, steps, environment)
    make = f"-DCMAKE_MAKE_PROGRAM={ninja}"
    configure = (cmake, "-G", "Ninja", "-S", str(places.work / "source"), "-B", str(objects), make, *spec.flags)
    await steps.run(configure, environment=more)
    await steps.run((ninja, "-C", str(objects), "-j", str(max(1, jobs)), *spec.targets), environment=more)


async def _tools(places: _Places, steps: Steps, environment: Mapping[str, str]) -> tuple[str, str, Mapping[str, str]]:
    """Return cmake, ninja and what their environment needs: those on PATH, else pip's in a folder of our own."""
    cmake, ninja = (shutil.which(name, path=environment.get("PATH")) for name in ("cmake", "ninja"))
    missing = [name for name, found in (("cmake", cmake), ("ninja", ninja)) if not found]
    own = [places.tools / "bin" / name for name in missing]
    if not all(path.exists() for path in own):
        remove(places.tools)
        pip = (sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off")
        await steps.run((*pip, "--target", str(places.tools), "cmake", "ninja"))
    # pip's cmake is a script that imports its package.
    more = {"PYTHONPATH": str(places.tools)} if missing else {}
    return cmake or str(places.tools / "bin" / "cmake"), ninja or str(places.tools / "bin" / "ninja"), more


async def _install(spec: BuildSpec, places: _Places, environment: Mapping[str, str]) -> Path:
    """Put the finished programs in place by one rename, and remove what they were made from."""
    stage = places.work / "stage"
    remove(stage)
    (stage / "bin").mkdir(parents=True)
    for target in spec.targets:
        _copy(places.work / "objects" / "bin" / target, stage / "bin" / target)
    answer = await ask((str(stage / "bin" / spec.targets[0]), "--version"), engine_environment(environment))
    if answer.status != 0:
        raise refuse(
            Reason.ENGINE_MISSING,
            f"the engine was built but does not run: {answer.trouble}; the log is {places.log}",
        )
    remove(places.home)  # a result that somebody has deleted half of
    stage.rename(places.home)
    remove(places.work)
    return places.home / "bin" / spec.targets[0]


def _copy(built: Path, target: Path) -> None:
    """Copy a program and have it on disk before its directory gets its name: a power cut must not leave half of it."""
    shutil.copy2(built, target)
    with target.open("rb") as file:
        os.fsync(file)
