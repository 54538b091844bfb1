"""The relay by itself in two processes, without the daemons around it: `agent SOCKET ENGINE`, `head SOCKET AGENT`.

`SOLLOL_BENCH_PROFILE=FILE` writes a cProfile of the process.
"""

import asyncio
import contextlib
import cProfile
import os
import signal
import sys
from pathlib import Path

from aiohttp import web
from sollol.channels import new_server, open_channel
from sollol.v1 import agent_pb2_grpc

from agent.relay import Relay
from sollold.relay import AgentRelay


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


async def head(path: str, agent_address: str) -> None:
    channel = open_channel(agent_address)
    relay = AgentRelay(agent_pb2_grpc.AgentServiceStub(channel), agent_address)

    async def complete(request: web.Request) -> web.StreamResponse:
        body = await request.read()
        async with await relay.open("bench", "POST", request.path, {}, body) as stream:
            status, headers = await stream.response()
            response = web.StreamResponse(status=status, headers={"Content-Type": headers["content-type"]})
            await response.prepare(request)
            with contextlib.suppress(ConnectionResetError):  # the reader left
                async for chunk in stream:
                    await response.write(chunk)
            return response

    app = web.Application()
    app.router.add_post("/v1/chat/completions", complete)
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
