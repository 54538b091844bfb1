"""A running cluster as users and operators reach it: HTTP, gRPC, the command line, and the engine past all of them."""

import asyncio
import io
import json
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
from sollol.client import Client
from sollol.errors import SollolError
from sollol.report import InstanceState, Pool

from agent.supervisor.files import Directories, files_of
from tests.tiny_model import PIECES
from tests.waiting import wait_until

READY_WITHIN_S = 60
CLI_WITHIN_S = 60
ANSWER_WITHIN_S = 60
RECITED = 20
RECITAL_20 = "".join(PIECES[:RECITED])
"""What the reciting model says within 20 tokens."""
ENGINE_THREADS = 1
# Generations end fast at shutdown, and engines compute on one thread: the machine is shared.
_ENVIRON = {"SOLLOL_AGENT_THREADS": str(ENGINE_THREADS), "SOLLOL_HEAD_SHUTDOWN_GRACE_S": "1", "PYTHONUNBUFFERED": "1"}


def chat_body(model: str, **more: Any) -> dict[str, Any]:
    user = [{"role": "user", "content": "Who are you?"}]
    return {"model": model, "messages": user, "temperature": 0, "max_tokens": RECITED, **more}


class Cluster:
    """One head and its agents. Subclasses start them.

    Everything lies below `home`, a short path: sockets have at most 107 bytes.
    """

    def __init__(self, home: Path, ports: Callable[[], int], environ: dict[str, str] | None = None) -> None:
        self.home = home
        self.http_port, self.grpc_port = ports(), ports()
        self.url = f"http://127.0.0.1:{self.http_port}"
        self.head = f"127.0.0.1:{self.grpc_port}"
        self.state = home / "state"
        self.tls_dir: Path | None = None
        """The certificate of whoever asks: an operator's."""
        (home / "run").mkdir(mode=0o700)
        own = {"HOME": str(home), "XDG_RUNTIME_DIR": str(home / "run")}
        self.environ = os.environ | _ENVIRON | own | (environ or {})

    def run_dir(self, node: str) -> Path:
        return self.home / "run" / node

    def log_dir(self, node: str) -> Path:
        return self.state / "log" / f"{node}-engines"

    @property
    def redis_socket(self) -> Path:
        return self.home / "run" / "redis.sock"

    def client(self) -> Client:
        return Client(self.head, tls_dir=self.tls_dir)

    async def post(self, path: str, body: dict[str, Any] | bytes) -> tuple[int, dict[str, Any]]:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with _session() as session, session.post(self.url + path, data=io.BytesIO(raw)) as response:
            return response.status, await response.json()

    async def get(self, path: str) -> int:
        async with _session() as session, session.get(self.url + path) as response:
            return response.status

    async def say(self, model: str, **more: Any) -> str:
        """The text of one chat answer that is not streamed."""
        status, answer = await self.post("/v1/chat/completions", chat_body(model, **more))
        assert status == 200, answer
        return str(answer["choices"][0]["message"]["content"])

    @asynccontextmanager
    async def stream(self, model: str, **more: Any) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
        """The events of one streamed chat; the iterator ends where the connection does."""
        async with _session() as session:
            body = chat_body(model, stream=True, **more)
            async with session.post(f"{self.url}/v1/chat/completions", json=body) as response:
                assert response.status == 200, await response.text()
                yield events_of(response)

    async def cli(self, *words: str, stdin: bytes = b"", within_s: float = CLI_WITHIN_S) -> tuple[int, str, str]:
        """Exit status, standard output and standard error of one `sollol` command."""
        process = await asyncio.create_subprocess_exec(
            *(
                sys.executable,
                "-P",
                "-m",
                "sollold.cli",
                "--head",
                self.head,
                "--tls-dir",
                str(self.tls_dir or ""),
                *words,
            ),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self.environ,
        )
        try:
            out, err = await asyncio.wait_for(process.communicate(stdin), within_s)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode is not None
        return process.returncode, out.decode(), err.decode()

    async def pools(self, model: str) -> list[Pool]:
        async with self.client() as client:
            return [pool for pool in await client.pools() if pool.instance.model == model]

    async def ready_pool(self, model: str) -> Pool:
        async def ready() -> Pool | None:
            found = [pool for pool in await self.pools(model) if pool.instance.state is InstanceState.READY]
            return found[0] if found else None

        found = await wait_until(ready, within_s=20, what=f"a ready pool of {model} is reported")
        assert found is not None
        return found

    def engine_socket(self, pool: Pool) -> Path:
        node = pool.node_id
        places = Directories(log=self.log_dir(node), run=self.run_dir(node), state=self.state / node)
        return files_of(pool.instance.instance_id, places).socket

    @asynccontextmanager
    async def engine(self, pool: Pool) -> AsyncIterator[aiohttp.ClientSession]:
        """HTTP to the engine itself, past head and agent; use it with URLs of host `engine`."""
        connector = aiohttp.UnixConnector(str(self.engine_socket(pool)))
        async with aiohttp.ClientSession(connector=connector, timeout=_timeout()) as session:
            yield session

    async def busy_slots(self, pool: Pool) -> int:
        async with self.engine(pool) as session, session.get("http://engine/slots") as response:
            return sum(slot["is_processing"] for slot in await response.json())

    async def reserved(self) -> dict[str, str]:
        """Pool id to node of every reservation in every ledger."""
        async with self.client() as client:
            nodes = await client.nodes()
        return {held.pool_id: node.report.node_id for node in nodes for held in node.report.reservations}

    async def only_ready_pools_are_reserved(self) -> None:
        """Wait for it: agents' reports reach the head a moment after the fact."""

        async def settled() -> bool:
            async with self.client() as client:
                reports = [node.report for node in await client.nodes()]
            return all(
                {held.pool_id for held in report.reservations}
                == {item.instance_id for item in report.instances if item.state is InstanceState.READY}
                and not any(item.state is InstanceState.STARTING for item in report.instances)
                for report in reports
            )

        await wait_until(settled, within_s=20, what="bytes are reserved for ready pools only")

    async def nothing_is_reserved(self) -> None:
        async def none() -> bool:
            return not await self.reserved()

        await wait_until(none, within_s=20, what="no byte is reserved any more")

    async def nodes_seen(self, count: int) -> None:
        async def seen() -> bool:
            async with self.client() as client:
                return sum(node.connected for node in await client.nodes()) == count

        await wait_until(_or_false(seen), within_s=READY_WITHIN_S, what=f"the head is connected to {count} nodes")


async def events_of(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """The JSON events of a response; the terminal one is `{"done": True}`. Comments are left out."""
    async for line in response.content:
        if line.startswith(b"data: "):
            data = line[6:].strip()
            yield {"done": True} if data == b"[DONE]" else json.loads(data)


def text_of(event: dict[str, Any]) -> str:
    """The text that one event of a chat carries."""
    choices = event.get("choices") or [{}]
    return (choices[0].get("delta") or {}).get("content") or ""


def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=_timeout())


def _timeout() -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=ANSWER_WITHIN_S)


def _or_false(condition: Callable[[], Any]) -> Callable[[], Any]:
    """The condition, false while the head cannot be reached yet."""

    async def checked() -> bool:
        try:
            return bool(await condition())
        except SollolError:
            return False

    return checked
