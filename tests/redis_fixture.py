"""A real Redis for tests, on a unix socket; and the proof that nothing is written there for ever."""

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One server for the whole run; it dies with the test process however that ends."""
    server = shutil.which("redis-server") or shutil.which("valkey-server")
    if server is None:
        pytest.fail("no redis-server on PATH: run `make test`, or install the package redis-server")
    socket = tmp_path_factory.mktemp("redis") / "redis.sock"
    process = subprocess.Popen(redis_command(server, socket), stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        url = f"unix://{socket}"
        wait_for_redis(url)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def redis_command(server: str, socket: Path) -> list[str]:
    """The command line of a Redis on a unix socket that keeps nothing and dies with its parent."""
    options = ["--port", "0", "--unixsocket", str(socket), "--save", "", "--appendonly", "no"]
    setpriv = shutil.which("setpriv")
    return [*([setpriv, "--pdeathsig", "KILL"] if setpriv else []), server, *options]


def wait_for_redis(url: str, within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    with Redis.from_url(url) as client:
        while True:
            try:
                client.ping()
            except RedisConnectionError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
            else:
                return


@pytest.fixture
def clean_redis(redis_url: str) -> str:
    """The URL of a Redis that is empty when the test begins."""
    with Redis.from_url(redis_url) as client:
        client.flushall()
    return redis_url


@pytest.fixture
def every_key_has_a_lease(clean_redis: str) -> Iterator[None]:
    """Fail a test that leaves a key without a time to live; only the capped stream of events may stay."""
    yield
    with Redis.from_url(clean_redis) as client:
        left = sorted(key.decode() for key in client.scan_iter() if client.pttl(key) < 0)
    assert set(left) <= {"sollol:events"}, f"keys without a time to live: {left}"
