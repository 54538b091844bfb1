"""The supervisor over real llama.cpp and a real, tiny model."""

import asyncio
import json
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp
import msgspec
import pytest
from sollol.errors import Reason, Refusal
from sollol.report import InstanceState

from agent.supervisor.owner import Limits
from agent.supervisor.supervisor import Supervisor
from tests.supervised import changes_of, plan_of, runs, settled, started, supervising
from tests.waiting import wait_until

pytestmark = pytest.mark.engine
REAL = Limits(start_timeout_s=30, stop_grace_s=20)


@pytest.fixture
async def supervisor(tmp_path: Path, engine_binary: Path, reciting_model: Path) -> AsyncIterator[Supervisor]:
    def resolve(model: str) -> Path:
        return reciting_model if model == "tiny" else tmp_path / model

    async with supervising(tmp_path, (str(engine_binary),), resolve=resolve, limits=REAL) as supervisor:
        yield supervisor


async def get(supervisor: Supervisor, path: str) -> object:
    connector = aiohttp.UnixConnector(path=str(supervisor.socket_of("p")))
    async with aiohttp.ClientSession(connector=connector) as session, session.get("http://engine" + path) as response:
        return await response.json()


async def test_it_loads_tells_its_percent_serves_and_stops_gently(supervisor: Supervisor) -> None:
    await supervisor.start("p", plan_of("tiny"))
    changes = await changes_of(supervisor, "p")
    ready = changes[-1]
    assert ready.state is InstanceState.READY
    assert ready.percent == 100
    assert '"state":"loading"' in (supervisor.socket_of("p").with_suffix(".progress")).read_text()
    await supervisor.stop("p")
    assert not runs(ready.pid)
    log = supervisor.log_path("p").read_text()
    assert "cleaning up before exit" in log
    assert "\x1b[" not in log


async def test_each_slot_has_the_context_that_was_planned(supervisor: Supervisor) -> None:
    await started(supervisor, "p", plan_of("tiny", context_per_slot=512, parallel=3))
    slots = await get(supervisor, "/slots")
    assert isinstance(slots, list)
    assert [slot["n_ctx"] for slot in slots] == [512, 512, 512]
    models = await get(supervisor, "/v1/models")
    assert isinstance(models, dict)
    assert models["data"][0]["id"] == "tiny"


async def test_it_keeps_no_copies_of_conversations_that_nobody_reserved_memory_for(supervisor: Supervisor) -> None:
    await started(supervisor, "p", plan_of("tiny"))
    log = supervisor.log_path("p").read_text()
    assert "context checkpoints disabled" in log
    assert "prompt cache is disabled" in log


async def test_a_killed_engine_has_died(supervisor: Supervisor) -> None:
    pid = (await started(supervisor, "p", plan_of("tiny"))).pid
    os.kill(pid, signal.SIGKILL)
    refusal = await wait_until(lambda: supervisor.failure_of("p"), within_s=1, what="the death is seen")
    assert refusal.reason is Reason.ENGINE_DIED
    assert refusal.numbers == {"exit_code": -9}


def garbage(path: Path, model: bytes) -> None:
    path.write_bytes(bytes(255 - byte for byte in model[:4096]))


def half(path: Path, model: bytes) -> None:
    path.write_bytes(model[: len(model) // 2])


def header_only(path: Path, model: bytes) -> None:
    path.write_bytes(model[:100])


def empty(path: Path, model: bytes) -> None:
    path.write_bytes(b"")


def of_unknown_architecture(path: Path, model: bytes) -> None:
    path.write_bytes(model.replace(b"llama", b"lllll"))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (garbage, Reason.MODEL_CORRUPT),
        (half, Reason.MODEL_CORRUPT),
        (header_only, Reason.MODEL_CORRUPT),
        (empty, Reason.MODEL_CORRUPT),
        (of_unknown_architecture, Reason.MODEL_UNSUPPORTED),
        (lambda path, model: None, Reason.MODEL_ABSENT),
    ],
)
async def test_a_file_that_cannot_be_loaded_fails_with_the_reason_and_the_log(
    supervisor: Supervisor,
    tmp_path: Path,
    reciting_model: Path,
    spoil: Callable[[Path, bytes], None],
    reason: Reason,
) -> None:
    spoil(tmp_path / "spoilt.gguf", reciting_model.read_bytes())
    refusal = await failure(supervisor, "spoilt.gguf")
    assert refusal.reason is reason, refusal.log_lines
    assert any("exiting due to model loading error" in line for line in refusal.log_lines)


async def test_a_context_that_does_not_fit_is_out_of_memory(
    tmp_path: Path, engine_binary: Path, reciting_model: Path
) -> None:
    """A gibibyte of address space stands in for a small machine."""
    engine = ("sh", "-c", 'ulimit -v 1048576; exec "$0" "$@"', str(engine_binary))
    async with supervising(tmp_path, engine, resolve=lambda _: reciting_model, limits=REAL) as supervisor:
        refusal = await failure(supervisor, "tiny", context_per_slot=1_000_000)
    assert refusal.reason is Reason.OUT_OF_MEMORY, refusal.log_lines
    assert refusal.numbers == {"exit_code": 1}


async def failure(supervisor: Supervisor, model: str, context_per_slot: int = 512) -> Refusal:
    await supervisor.start("p", plan_of(model, context_per_slot=context_per_slot))
    instance = await settled(supervisor, "p")
    assert instance.refusal is not None
    return instance.refusal


async def test_a_stop_does_not_wait_for_a_client_that_does_not_read(
    tmp_path: Path, engine_binary: Path, reciting_model: Path
) -> None:
    """The engine waits for it when it is asked once: what it has written for it does not fit into the socket."""
    patient = msgspec.structs.replace(REAL, stop_grace_s=600)
    engine = (str(engine_binary),)
    async with supervising(tmp_path, engine, resolve=lambda _: reciting_model, limits=patient) as supervisor:
        pid = (await started(supervisor, "p", plan_of("tiny", context_per_slot=16_384))).pid
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(supervisor.socket_of("p")))
            body = json.dumps({"prompt": "hello", "stream": True, "n_predict": 16_000, "ignore_eos": True})
            client.sendall(f"POST /completion HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())

            async def has_said_more_than_fits() -> bool:
                busy = [slot for slot in await get(supervisor, "/slots") if slot["is_processing"]]
                return any(slot["next_token"][0]["n_decoded"] > 1000 for slot in busy)

            await wait_until(has_said_more_than_fits, within_s=60, what="it has said more than fits into the socket")
            await asyncio.wait_for(supervisor.stop("p"), 20)
        assert not runs(pid)
