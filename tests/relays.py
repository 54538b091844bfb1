"""A scripted engine on a unix socket, and an agent's relay behind a real gRPC server, for the relay tests."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio
from sollol.channels import new_server, open_channel
from sollol.errors import Reason, Refusal, refuse
from sollol.v1 import agent_pb2_grpc

from agent.relay import Relay
from agent.streams import Streams

Script = Callable[["Conversation"], Awaitable[None]]


@dataclass
class Conversation:
    """One connection as the engine sees it: the request it got, and the writer to answer with."""

    head: str
    body: bytes
    writer: asyncio.StreamWriter
    reader: asyncio.StreamReader

    async def respond(self, body: bytes, *, status: str = "200 OK", kind: str = "application/json") -> None:
        head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        await self.send(head.encode() + body)

    async def start_stream(self) -> None:
        await self.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")

    async def chunk(self, data: bytes) -> None:
        await self.send(b"%x\r\n%s\r\n" % (len(data), data))

    async def finish(self) -> None:
        await self.send(b"0\r\n\r\n")

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def gone(self) -> None:
        """Return when the other side closed its connection."""
        try:
            await self.reader.read()
        except ConnectionResetError:
            return


@dataclass
class ScriptedEngine:
    path: Path
    script: Script
    heads: list[str] = field(default_factory=list)

    @asynccontextmanager
    async def running(self) -> AsyncIterator["ScriptedEngine"]:
        tasks: set[asyncio.Task[None]] = set()

        async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            tasks.add(task)
            try:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                self.heads.append(head)
                lengths = [line for line in head.split("\r\n") if line.lower().startswith("content-length:")]
                body = await reader.readexactly(int(lengths[0].split(":")[1])) if lengths else b""
                await self.script(Conversation(head, body, writer, reader))
            except (ConnectionError, asyncio.CancelledError):
                pass  # the test went on
            finally:
                tasks.discard(task)
                writer.close()

        server = await asyncio.start_unix_server(on_connection, self.path)
        try:
            yield self
        finally:
            server.close()
            for task in list(tasks):
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


@dataclass
class RelayNode:
    """A relay on a real gRPC server. `sockets` and `failures` play the supervisor."""

    address: str
    sockets: dict[str, Path] = field(default_factory=dict)
    failures: dict[str, Refusal] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.relay = Relay(self.socket_of, self.failures.get, Streams())

    def socket_of(self, instance_id: str) -> Path:
        if instance_id not in self.sockets:
            raise refuse(Reason.INSTANCE_NOT_FOUND, f"no instance {instance_id}", retryable=True)
        return self.sockets[instance_id]

    async def serve(self) -> grpc.aio.Server:
        server = new_server()
        node = self

        class Servicer(agent_pb2_grpc.AgentServiceServicer):
            async def Relay(self, request_iterator, context):  # noqa: N802 - gRPC's name
                await node.relay.serve(context)

        agent_pb2_grpc.add_AgentServiceServicer_to_server(Servicer(), server)
        assert server.add_insecure_port(self.address)
        await server.start()
        return server

    @asynccontextmanager
    async def running(self) -> AsyncIterator["RelayNode"]:
        server = await self.serve()
        try:
            yield self
        finally:
            await server.stop(0)


@asynccontextmanager
async def agent_stub(address: str) -> AsyncIterator[agent_pb2_grpc.AgentServiceStub]:
    async with open_channel(address) as channel:
        yield agent_pb2_grpc.AgentServiceStub(channel)
