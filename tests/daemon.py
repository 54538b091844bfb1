"""The daemons as processes, over an engine that is a script: for tests of how they start and end."""

import asyncio
import json
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from sollol.channels import open_channel
from sollol.v1 import agent_pb2, agent_pb2_grpc, common_pb2

from tests.fakes.fake_engine import fake_engine
from tests.kept_bandwidth import keep_bandwidth
from tests.waiting import wait_until

ENDS_WITHIN_S = 15


class Daemon:
    """`python -m MODULE FLAGS`. Its log is JSON lines."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self.process, self._log = process, log

    def events(self) -> list[str]:
        return [json.loads(line)["event"] for line in self.log.splitlines() if line.startswith("{")]

    @property
    def log(self) -> str:
        return self._log.read_text()

    async def reload(self) -> list[dict]:
        """Ask for a reload; return the lines that say how it went."""
        said = len(self.events())
        self.process.send_signal(signal.SIGHUP)
        await wait_until(
            lambda: {"settings_reloaded", "reload_refused"} & set(self.events()[said:]), what="the end of a reload"
        )
        return [json.loads(line) for line in self.log.splitlines() if line.startswith("{")][said:]

    async def says(self, event: str) -> None:
        await wait_until(
            lambda: event in self.events() or self.process.returncode is not None, within_s=20, what=f"{event}"
        )
        assert event in self.events(), self.log

    async def ended(self) -> int:
        return await asyncio.wait_for(self.process.wait(), ENDS_WITHIN_S)

    async def end(self) -> int:
        self.process.terminate()
        return await self.ended()


@asynccontextmanager
async def daemon(module: str, home: Path, *flags: str) -> AsyncIterator[Daemon]:
    log = home / f"{module}-{len(list(home.glob('*.log')))}.log"
    environ = {**os.environ, "HOME": str(home), "XDG_RUNTIME_DIR": str(home), "XDG_CACHE_HOME": str(home / "cache")}
    with log.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", module, "--log-format", "json", *flags),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=environ,
        )
    try:
        yield Daemon(process, log)
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), ENDS_WITHIN_S)
            except TimeoutError:
                process.kill()
                await process.wait()


def write_engine(path: Path, *knobs: str) -> Path:
    """A program that passes for a llama-server without GPUs; see `fake_engine` for the knobs."""
    command = " ".join(fake_engine(*knobs))
    path.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        '--version) echo "version: 1 (fake)" >&2 ;;\n'
        '--list-devices) echo "Available devices:" ;;\n'
        "--rpc) exit 1 ;;\n"
        f'*) exec {command} "$@" ;;\n'
        "esac\n"
    )
    path.chmod(0o755)
    return path


def agent_flags(home: Path, *, node: str = "a", port: int, engine: Path, model: Path, redis_url: str = "") -> list[str]:
    models = home / "models"
    models.mkdir(exist_ok=True)
    if not (models / model.name).exists():
        shutil.copy(model, models)
    places = {"state": home / node / "s", "log": home / node / "l", "run": home / node / "r"}
    keep_bandwidth(places["state"])
    return [
        *("--node-id", node, "--port", str(port), "--engine", str(engine), "--redis-url", redis_url),
        *("--model-dirs", str(models), "--ollama-dir", "", "--huggingface-dir", "", "--stop-grace-s", "1"),
        *(word for name, path in places.items() for word in (f"--{name}-dir", str(path))),
    ]


async def start_engine(port: int) -> common_pb2.Instance:
    """Reserve and start as a head does; return when it serves."""
    async with open_channel(f"127.0.0.1:{port}") as channel:
        stub = agent_pb2_grpc.AgentServiceStub(channel)
        await stub.Reserve(agent_pb2.ReserveRequest(pool_id="p", bytes={"CPU": 1 << 20}, ttl_s=5))
        request = agent_pb2.StartCoordinatorRequest(pool_id="p")
        request.plan.model, request.plan.parallel, request.plan.context_per_slot = "tiny-reciter", 1, 64
        request.plan.kv_type, request.plan.batch, request.plan.ubatch = "f16", 64, 64
        request.plan.shares.add(
            device_id="CPU", layers=9, first_layer=0, last_layer=7, weight_bytes=1 << 20, total_bytes=1 << 20
        )
        started = await stub.StartCoordinator(request)
        assert not started.HasField("refusal"), started.refusal
        async for response in stub.WatchInstance(agent_pb2.WatchInstanceRequest(instance_id="p")):
            last = response.instance
        return last
