"""One connection to an agent, with the relay and the calls on it; a newer one may follow while these go on."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator

from sollol.certificates import Certificate
from sollol.channels import open_channel
from sollol.errors import Refusal
from sollol.tls import Material
from sollol.v1 import agent_pb2_grpc as rpc

from sollold.relay import AgentRelay

DRAIN_POLL_S = 0.5


class Line:
    """Made with our certificate as it was then, to whom showed `peer` under `name`; plaintext without certificates.

    Attributes:
        cut_off: Why it must not be used any more, when it must not.
        on_closed: Called when it is closed.
    """

    def __init__(
        self, address: str, material: Material | None = None, name: str = "", peer: Certificate | None = None
    ) -> None:
        self.material, self.peer = material, peer
        self.cut_off: Refusal | None = None
        self.on_closed: Callable[[], None] = lambda: None
        self._channel = open_channel(address, material, name=name)
        self._stub = rpc.AgentServiceStub(self._channel)
        self.revocation = rpc.RevocationServiceStub(self._channel)
        self._calls = 0
        self.relay = AgentRelay(self._stub, address)

    @contextlib.contextmanager
    def used(self) -> Iterator["rpc.AgentServiceAsyncStub"]:
        """Yield the stub; the connection lives as long as somebody uses it, whatever `drain` would like."""
        self._calls += 1
        try:
            yield self._stub
        finally:
            self._calls -= 1

    async def drain(self) -> None:
        """Close once the last call and the last stream are over. Whoever got the relay a moment ago is waited for."""
        try:
            await asyncio.sleep(DRAIN_POLL_S)
            while self._calls or self.relay.streams:  # noqa: ASYNC110 - streams end in many places, and it is rare
                await asyncio.sleep(DRAIN_POLL_S)
        finally:
            await self.close()

    async def cut(self, why: Refusal) -> None:
        """Close, with this as what calls and streams end in."""
        self.cut_off = why
        await self.close()

    async def close(self) -> None:
        """End every call and stream on it."""
        self.on_closed()
        try:
            await self.relay.close(self.cut_off)
        finally:
            await self._channel.close()
