"""The agent's end of handing on who is revoked. A gRPC edge."""

from typing import Any

from sollol.exchange import exchange
from sollol.guard import caller
from sollol.tls import TlsFiles
from sollol.v1 import agent_pb2, agent_pb2_grpc

from agent.guarded import guarded


class RevocationService(agent_pb2_grpc.RevocationServiceServicer):
    def __init__(self, tls: TlsFiles) -> None:
        self._tls = tls

    @guarded
    async def ExchangeRevoked(self, request_iterator: Any, context: Any) -> None:
        peer = str(caller(context).identity)
        await exchange(self._tls, context.read, context.write, agent_pb2.ExchangeRevokedResponse, peer=peer)
