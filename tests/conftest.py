"""What every test may ask for: free ports, the tiny models, the real engine; and what every test must do: clean up."""

import contextlib
import ctypes
import gc
import os
import random
import signal
import socket
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, settings
from sollol.directories import cache_directory

from agent.engine.built import built_engine
from tests.broker import broker, new_broker
from tests.fakes.systemd import Systemd, listening_systemd
from tests.redis_fixture import clean_redis, every_key_has_a_lease, redis_url
from tests.tiny_model import write_random_model, write_reciting_model

__all__ = [
    "broker",
    "clean_redis",
    "every_key_has_a_lease",
    "new_broker",
    "redis_url",
]  # fixtures that pytest finds here

# A busy machine makes one example slow, or slow to make up, and no code wrong.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

# Daemons are started hundreds of times: their sources are compiled once, whatever the surroundings say.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

_PR_SET_CHILD_SUBREAPER = 36
_PORTS = range(20_000, 32_000)  # below the ephemeral range, so that no outgoing connection takes one


def pytest_sessionstart() -> None:
    """Become the parent of orphans: an engine that outlives its agent is then seen, not lost to init."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    # A shell that starts us in the background has SIGINT ignored, nohup SIGHUP, and whatever we start would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: None)


def pytest_collection_finish() -> None:
    gc.freeze()  # the collected tests stay until the end: no collection of garbage need look at them again


def _started(before: Collection[int]) -> list[psutil.Process]:
    """Our running children besides `before`. An orphan becomes our child: whatever else is left is below one of these."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.pid not in before and child.status() != psutil.STATUS_ZOMBIE:
                found.append(child)
    return found


@pytest.fixture(autouse=True)
def no_process_left() -> Iterator[None]:
    """Fail a test that leaves a process behind. What a wider fixture's processes are and start does not count."""
    before = {child.pid for child in psutil.Process().children()}
    yield
    deadline = time.monotonic() + 10
    while (left := _started(before)) and time.monotonic() < deadline:
        time.sleep(0.02)
    if left:
        pytest.fail(f"the test left processes running: {_ended(left)}")


def _ended(left: list[psutil.Process]) -> dict[int, str]:
    """Pid and command line of each of them, and of all below, killed now."""
    lines = {}
    gone = contextlib.suppress(psutil.NoSuchProcess)
    for top in left:
        below: list[psutil.Process] = []
        with gone:
            below = top.children(recursive=True)
        for process in (top, *below):
            with gone:
                lines[process.pid] = " ".join(process.cmdline()) or process.name()
                process.kill()
    return lines


@pytest.fixture(scope="session")
def ports() -> Callable[[], int]:
    """Call it for a port that nobody listens on; never the same twice in one run."""
    start = random.SystemRandom().choice(_PORTS)
    candidates = iter([*range(start, _PORTS.stop), *range(_PORTS.start, start)])

    def free_port() -> int:
        return next(port for port in candidates if _is_free(port))

    return free_port


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@pytest.fixture(scope="session")
def engine_binary() -> Path:
    """A real llama-server with RPC. Its absence is a failure: a skipped engine test would prove nothing."""
    given = os.environ.get("SOLLOL_TEST_ENGINE")
    found = Path(given) if given else built_engine(cache_directory(os.environ))
    if found is None or not os.access(found, os.X_OK):
        pytest.fail("no llama-server: run `make test`, or `sollol engine build`, or set SOLLOL_TEST_ENGINE to one")
    return found


@pytest.fixture(scope="session")
def reciting_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that recites one text whatever it is asked: every lost or repeated token shows."""
    path = tmp_path_factory.mktemp("models") / "tiny-reciter.gguf"
    write_reciting_model(path)
    return path


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights: what it says depends on all of its context."""
    path = tmp_path_factory.mktemp("models") / "tiny-random.gguf"
    write_random_model(path, seed=0)
    return path


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    with listening_systemd(str(tmp_path / "notify")) as listening:
        yield listening
