"""The relay by itself in two processes, without the daemons around it: `agent SOCKET ENGINE`, `head SOCKET AGENT`.

`SOLLOL_BENCH_PROFILE=FILE` writes a cProfile of the process.
"""

import asyncio
import cProfile
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

from aiohttp import web
from sollol.channels import new_server, open_channel
from sollol.v1 import agent_pb2_grpc

from agent.relay import Relay
from sollold.dispatch import RelayedStream
from sollold.front.http import build_app
from sollold.relay import AgentRelay
from sollold.streams import AvailableModel, EngineRequest, EngineStream, ProgressSink


async def agent(address: str, engine: str) -> None:
    relay = Relay(lambda _: Path(engine), lambda _: None)

    class Servicer(agent_pb2_grpc.AgentServiceServicer):
        async def Relay(self, request_iterator, context):  # noqa: N802 - gRPC's name
            await relay.serve(context)

    server = new_server()
    agent_pb2_grpc.add_AgentServiceServicer_to_server(Servicer(), server)
    server.add_insecure_port(address)
    await server.start()
    await _terminated()
    await server.stop(0)


class OneEngine:
    """Dispatcher and catalogue of a head that knows a single, warm engine."""

    def __init__(self, relay: AgentRelay) -> None:
        self._relay = relay

    async def open(self, request: EngineRequest, on_progress: ProgressSink) -> EngineStream:
        relayed = await self._relay.open("bench", "POST", request.path, {}, request.body)
        lease = SimpleNamespace(model="bench", node_id="node", instance_id="bench", release=lambda: None)
        stream = RelayedStream(relayed, lease, SimpleNamespace(forget=lambda _: None), stall_timeout_s=60.0)
        await stream.begin(60.0)
        return stream

    def models(self) -> tuple[AvailableModel, ...]:
        return (AvailableModel(name="bench", warm=True),)

    def ready(self) -> bool:
        return True


async def head(path: str, agent_address: str) -> None:
    """The real front and relay, with nothing to decide between them."""
    channel = open_channel(agent_address)
    relay = AgentRelay(agent_pb2_grpc.AgentServiceStub(channel), agent_address)
    engine = OneEngine(relay)
    app = build_app(engine, engine, max_body_bytes=1 << 20, shutdown_grace_s=1.0)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
    await runner.setup()
    await web.UnixSite(runner, path).start()
    await _terminated()
    await relay.close()
    await runner.cleanup()
    await channel.close()


async def _terminated() -> None:
    event = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, event.set)
    await event.wait()


def main() -> None:
    piece = {"agent": agent, "head": head}[sys.argv[1]]
    profile_file = os.environ.get("SOLLOL_BENCH_PROFILE")
    if profile_file is None:
        asyncio.run(piece(*sys.argv[2:]))
        return
    with cProfile.Profile() as profile:
        asyncio.run(piece(*sys.argv[2:]))
    profile.dump_stats(f"{profile_file}.{sys.argv[1]}")


if __name__ == "__main__":
    main()
