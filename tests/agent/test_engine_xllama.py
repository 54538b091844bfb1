"""The wheel as an engine: it must do what the supervisor expects of llama-server."""

import asyncio
import json
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from sollol.report import CoordinatorPlan, DeviceShare

from agent.engine.environment import engine_environment
from agent.engine.xllama import flags
from agent.supervisor.command import coordinator_argv, coordinator_environment
from tests.waiting import wait_until

PROGRAM = (sys.executable, "-P", "-m", "agent.engine.xllama")
LONG = 8000  # tokens: many seconds
PLAN = CoordinatorPlan(
    model="tiny:reciter",
    parallel=2,
    context_per_slot=8192,
    shares=(DeviceShare(device_id="CPU", layers=9),),
    threads=1,
)


class Wheel:
    def __init__(self, process: asyncio.subprocess.Process, folder: Path, stdin: int) -> None:
        self.process = process
        self.folder = folder
        self.stdin = stdin
        self.socket = folder / "a.sock"

    async def get(self, path: str) -> tuple[int, bytes]:
        return await self.request(f"GET {path} HTTP/1.0\r\nHost: engine\r\n\r\n".encode())

    async def request(self, request: bytes) -> tuple[int, bytes]:
        try:
            reader, writer = await asyncio.open_unix_connection(str(self.socket))
        except OSError:
            return 0, b""
        writer.write(request)
        answer = await asyncio.wait_for(reader.read(), 20)
        writer.close()
        return int(answer.split(b" ", 2)[1]), answer

    async def ready(self) -> None:
        async def is_ready():
            assert self.process.returncode is None, self.log
            return (await self.get("/health"))[0] == 200 and self.catches_term()

        await wait_until(is_ready, within_s=20, what="the wheel serves")

    def catches_term(self) -> bool:
        """It answers a moment before it does; until then TERM ends it at once."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        (caught,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
        return bool(int(caught, 16) >> signal.SIGTERM - 1 & 1)

    async def busy(self) -> int:
        slots = json.loads((await self.get("/slots"))[1].split(b"\r\n\r\n", 1)[1])
        return sum(slot["is_processing"] for slot in slots)

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    @property
    def progress(self) -> list[str]:
        return [line for line in (self.folder / "progress").read_text().splitlines() if line]

    async def ended(self) -> int:
        return await asyncio.wait_for(self.process.wait(), 10)


@asynccontextmanager
async def wheel(model: Path, **more) -> AsyncIterator[Wheel]:
    with tempfile.TemporaryDirectory(prefix="x") as name:  # short: it is for a unix socket
        folder = Path(name)
        argv = coordinator_argv(
            PROGRAM, PLAN, model_path=model, socket_path=folder / "a.sock", gpu_devices=(), threads=1
        )
        reading, writing = os.pipe()
        with (folder / "log").open("wb") as log, (folder / "progress").open("wb") as progress:
            process = await asyncio.create_subprocess_exec(
                *argv, stdin=reading, stdout=progress, stderr=log, env=coordinator_environment(more)
            )
        os.close(reading)
        running = Wheel(process, folder, writing)
        try:
            yield running
        finally:
            if running.stdin >= 0:
                os.close(running.stdin)
            if process.returncode is None:
                process.kill()
                await process.wait()


def chat(**more) -> bytes:
    body = json.dumps({"messages": [{"role": "user", "content": "hello"}], "stream": True, **more}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: engine\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode() + body


async def test_it_serves_on_a_unix_socket_what_llama_server_serves(reciting_model):
    async with wheel(reciting_model) as running:
        await running.ready()
        assert (await running.get("/metrics"))[0] == 200
        assert b'"tiny:reciter"' in (await running.get("/v1/models"))[1]
        slots = json.loads((await running.get("/slots"))[1].split(b"\r\n\r\n", 1)[1])
        assert [slot["n_ctx"] for slot in slots] == [PLAN.context_per_slot] * 2

        status, answer = await running.request(chat(max_tokens=12))

        assert status == 200
        assert b'"finish_reason":"length"' in answer
        assert b"data: [DONE]" in answer
        text = "".join(
            json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
            for line in answer.replace(b"\r\n", b"\n").decode().split("\n")
            if line.startswith("data: {")
        )
        assert text.strip().startswith("SOLLOL is a small orchestra")


async def test_a_client_that_leaves_frees_its_slot(reciting_model):
    async with wheel(reciting_model) as running:
        await running.ready()
        reader, writer = await asyncio.open_unix_connection(str(running.socket))
        writer.write(chat(max_tokens=LONG, ignore_eos=True))
        await asyncio.wait_for(reader.readuntil(b'"content":"'), 10)
        writer.close()

        async def is_free():
            return await running.busy() == 0

        await wait_until(is_free, within_s=1, what="the slot is free")


async def test_progress_and_readiness_are_printed_as_by_a_routers_child(reciting_model):
    async with wheel(reciting_model) as running:
        await running.ready()
        await wait_until(lambda: any('"ready"' in line for line in running.progress), what="it says so")
        assert all(line.startswith("cmd_child_to_router:state:{") for line in running.progress)


async def test_term_ends_it_cleanly(reciting_model):
    async with wheel(reciting_model) as running:
        await running.ready()
        running.process.send_signal(signal.SIGTERM)
        assert await running.ended() == 0


async def test_the_exit_command_ends_it_cleanly(reciting_model):
    async with wheel(reciting_model) as running:
        await running.ready()
        os.write(running.stdin, b"cmd_router_to_child:exit\n")
        assert await running.ended() == 0


async def test_it_does_not_outlive_whoever_holds_its_input(reciting_model):
    async with wheel(reciting_model) as running:
        await running.ready()
        os.close(running.stdin)
        running.stdin = -1
        assert await running.ended() == 1


async def test_a_second_signal_ends_it_although_a_stream_is_open(reciting_model):
    async with wheel(reciting_model) as running:
        await running.ready()
        reader, writer = await asyncio.open_unix_connection(str(running.socket))
        writer.write(chat(max_tokens=LONG, ignore_eos=True))
        await asyncio.wait_for(reader.readuntil(b'"content":"'), 10)
        running.process.send_signal(signal.SIGTERM)
        await wait_until(lambda: "cleaning up" in running.log, what="it has heard the first signal")
        running.process.send_signal(signal.SIGTERM)
        assert await running.ended() in (0, -signal.SIGTERM)
        writer.close()


async def test_a_model_that_cannot_be_loaded_is_exit_status_1_and_said_last(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"not a model")
    async with wheel(tmp_path / "bad.gguf") as running:
        assert await running.ended() == 1
        assert running.log.rstrip().splitlines()[-1].endswith("exiting due to model loading error")
        assert "invalid magic" in running.log


async def test_a_taken_socket_is_exit_status_1(reciting_model):
    async with wheel(reciting_model) as running:
        await running.ready()
        again = await asyncio.create_subprocess_exec(
            *PROGRAM,
            *("-m", str(reciting_model), "--host", str(running.socket)),
            stdin=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            env=engine_environment({}),
        )
        _, errors = await asyncio.wait_for(again.communicate(), 10)
        assert again.returncode == 1
        assert b"couldn't bind" in errors
        assert (await running.get("/health"))[0] == 200


async def run(*arguments: str) -> tuple[int | None, str, str]:
    process = await asyncio.create_subprocess_exec(
        *PROGRAM,
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=engine_environment({}),
    )
    output, errors = await asyncio.wait_for(process.communicate(), 20)
    return process.returncode, output.decode(), errors.decode()


async def test_it_answers_the_questions_that_engines_are_asked():
    status, output, errors = await run("--version")
    assert (status, output) == (0, "")
    assert errors.startswith("version: xllamacpp ")
    assert await run("--list-devices") == (0, "Available devices:\n  (none)\n", "")


@pytest.mark.parametrize(
    "arguments",
    [("--nosuchflag",), ("-c", "many"), ("-m", "x", "-ctk", "q99"), ("-m", "x", "--device", "CUDA7"), ()],
)
async def test_what_it_does_not_know_is_refused_in_one_line(arguments):
    status, _, errors = await run(*arguments)
    assert status == 1
    assert errors.startswith("error: ")
    assert len(errors.splitlines()) == 1


class Params:
    """What `fill` may set of the wheel's CommonParams."""

    def __init__(self) -> None:
        self.model = type("Model", (), {"path": ""})()
        self.cpuparams = type("Cpu", (), {"n_threads": -1})()
        self.cpuparams_batch = type("Cpu", (), {"n_threads": -1})()
        self.n_gpu_layers = -1
        self.tensor_split: list[float] = []


def filled(*arguments: str, devices: tuple[str, ...] = ()) -> Params:
    params = Params()
    flags.fill(params, flags.parse(list(arguments)), None, devices)
    return params


def test_a_device_that_was_not_chosen_gets_no_share():
    params = filled("-ngl", "9", "--device", "CUDA1", devices=("CUDA0", "CUDA1"))
    assert params.n_gpu_layers == 9
    assert params.tensor_split[:3] == [0.0, 1.0, 0.0]
    assert len(params.tensor_split) == 128


def test_shares_go_to_the_chosen_devices_in_order():
    params = filled("--device", "CUDA0,CUDA2", "-ts", "6,3", devices=("CUDA0", "CUDA1", "CUDA2"))
    assert params.tensor_split[:3] == [6.0, 0.0, 3.0]


def test_all_devices_without_shares_are_left_to_the_engine():
    assert filled("-ngl", "all", devices=("CUDA0",)).tensor_split == []


def test_no_device_means_no_offloading():
    assert filled("-ngl", "9", "--device", "none").n_gpu_layers == 0


@pytest.mark.parametrize(
    "arguments", [("--device", "CUDA1,CUDA0"), ("--device", "CUDA9"), ("--device", "CUDA0", "-ts", "1,2")]
)
def test_what_the_wheel_cannot_do_is_refused_and_not_done_otherwise(arguments):
    with pytest.raises(ValueError, match="device"):
        filled(*arguments, devices=("CUDA0", "CUDA1"))
