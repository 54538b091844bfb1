"""The async client of a head, for users and operators. A gRPC edge: its signatures have contract values only.

async with Client("127.0.0.1:7461") as client:
    async for event in client.chat("llama3.1:8b", [Message("user", "Hello!")]):
        if isinstance(event, Piece):
            print(event.text, end="")
"""

import contextlib
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, Self

import grpc

from sollol import wire
from sollol.channels import open_channel, refusal_of
from sollol.dial import speaks_tls, who_listens
from sollol.errors import Reason, SollolError, refuse
from sollol.identity import Role, role_name
from sollol.inference import AvailableModel, Message, Piece, Progress, Sampling
from sollol.report import Decision, NodeStatus, PlacementWish, Pool
from sollol.tls import Material, TlsFiles
from sollol.v1 import cluster_pb2, cluster_pb2_grpc, inference_pb2, inference_pb2_grpc

__all__ = ["Client", "Message", "Piece", "PlacementWish", "Progress", "Sampling", "SollolError"]

# For an answer that the head has at hand. Calls that wait for engines have no total time limit: they show progress.
_ANSWER_WITHIN_S = 10.0
_STOPPED_WITHIN_S = 60.0
_CUT_OFF = "Socket closed"


class Client:
    """A connection to one head; dials on first use, redials by itself.

    Every method raises SollolError: the head's own refusal, or AGENT_UNREACHABLE when nobody answers at `address`.

    Args:
        address: The head's `host:port`.
        tls_dir: Where the user's `ca.pem`, `node.pem` and `node.key` are; without it the connection is plaintext.
        key: An API key, for heads that ask for one and speak no TLS.
    """

    def __init__(self, address: str = "127.0.0.1:7461", *, tls_dir: Path | None = None, key: str = "") -> None:
        self._address = address
        self._metadata = (("authorization", f"Bearer {key}"),) if key else ()
        self._tls = TlsFiles(tls_dir) if tls_dir is not None else None
        self._material: Material | None = None
        self._channels: list[grpc.aio.Channel] = []  # the last is in use; calls may still run on those before
        self._entered = False

    async def __aenter__(self) -> Self:
        self._entered = True
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self._entered = False
        while self._channels:
            await self._channels.pop().close()

    async def chat(
        self, model: str, messages: Sequence[Message], sampling: Sampling | None = None
    ) -> AsyncGenerator[Progress | Piece, None]:
        """Answer a conversation: progress while the model loads, then pieces; the last has finish_reason and usage.

        Leaving the loop early and closing the iterator cancels the generation.
        """
        request = inference_pb2.ChatRequest(model=model, sampling=_sampling(sampling))
        for message in messages:
            wire.fill(request.messages.add(), message)
        async with self._answering(self._inference().Chat(request, metadata=self._metadata)) as responses:
            async for response in responses:
                yield _event(response)

    async def complete(
        self, model: str, prompt: str, sampling: Sampling | None = None
    ) -> AsyncGenerator[Progress | Piece, None]:
        """Continue a raw prompt; streams like `chat`."""
        request = inference_pb2.CompleteRequest(model=model, prompt=prompt, sampling=_sampling(sampling))
        async with self._answering(self._inference().Complete(request, metadata=self._metadata)) as responses:
            async for response in responses:
                yield _event(response)

    async def list_models(self) -> tuple[AvailableModel, ...]:
        """Models that some live node has."""
        async with self._refusals():
            response = await self._inference().ListModels(
                inference_pb2.ListModelsRequest(), timeout=_ANSWER_WITHIN_S, metadata=self._metadata
            )
        return tuple(wire.value(AvailableModel, model) for model in response.models)

    async def nodes(self) -> tuple[NodeStatus, ...]:
        """Every node that the head knows."""
        async with self._refusals():
            response = await self._cluster().ListNodes(cluster_pb2.ListNodesRequest(), timeout=_ANSWER_WITHIN_S)
        return tuple(wire.value(NodeStatus, node) for node in response.nodes)

    async def pools(self) -> tuple[Pool, ...]:
        """Every pool on every node."""
        async with self._refusals():
            response = await self._cluster().ListPools(cluster_pb2.ListPoolsRequest(), timeout=_ANSWER_WITHIN_S)
        return tuple(wire.value(Pool, pool) for pool in response.pools)

    async def place(self, wish: PlacementWish) -> Decision:
        """Decide without doing. A wish that cannot be met is a Decision with a refusal, not an error."""
        request = cluster_pb2.PlaceRequest(wish=wire.fill(cluster_pb2.PlacementWish(), wish))
        async with self._refusals():
            response = await self._cluster().Place(request, timeout=_ANSWER_WITHIN_S)
        return wire.value(Decision, response.decision)

    async def load(self, wish: PlacementWish, on_progress: Callable[[Progress], None] | None = None) -> Pool:
        """Load a model, or find it loaded, and return a pool; `on_progress` is called on every change."""
        return (await self.load_pools(wish, 1, on_progress))[0]

    async def load_pools(
        self, wish: PlacementWish, count: int, on_progress: Callable[[Progress], None] | None = None
    ) -> tuple[Pool, ...]:
        """Load as many pools as are missing to `count`; return every ready one, in the order of their numbers."""
        request = cluster_pb2.LoadRequest(wish=wire.fill(cluster_pb2.PlacementWish(), wish), pools=count)
        pools: list[Pool] = []
        async with self._answering(self._cluster().Load(request)) as responses:
            async for response in responses:
                if response.HasField("progress") and on_progress is not None:
                    on_progress(wire.value(Progress, response.progress))
                if response.HasField("pool"):
                    pools.append(wire.value(Pool, response.pool))
        assert pools, "the last messages of Load have the pools"
        return tuple(pools)

    async def unload(self, model: str) -> tuple[str, ...]:
        """Stop every pool of a model and return their ids once they are gone."""
        async with self._refusals():
            request = cluster_pb2.UnloadRequest(model=model)
            response = await self._cluster().Unload(request, timeout=_STOPPED_WITHIN_S)
        return tuple(response.instance_ids)

    async def cordon(self, node_id: str) -> None:
        """Keep new pools away from a node, until `uncordon`."""
        async with self._refusals():
            await self._cluster().Cordon(cluster_pb2.CordonRequest(node_id=node_id), timeout=_ANSWER_WITHIN_S)

    async def uncordon(self, node_id: str) -> None:
        """Let a node take pools again, and end its draining."""
        async with self._refusals():
            await self._cluster().Uncordon(cluster_pb2.UncordonRequest(node_id=node_id), timeout=_ANSWER_WITHIN_S)

    async def drain(self, node_id: str) -> AsyncGenerator[tuple[Pool, ...], None]:
        """Cordon a node and have it emptied; yield what is left on every change, at last nothing.

        Leaving the loop early leaves the node draining. Raises STOPPED when somebody calls it off.
        """
        async with self._answering(self._cluster().Drain(cluster_pb2.DrainRequest(node_id=node_id))) as responses:
            async for response in responses:
                yield tuple(wire.value(Pool, pool) for pool in response.left)

    async def tail_log(self, pool: str, *, lines: int = 50, follow: bool = False) -> AsyncGenerator[str, None]:
        """Yield the last lines of a pool's engine log, then, with `follow`, new ones; `pool` is an id or a model."""
        request = cluster_pb2.TailPoolLogRequest(pool=pool, lines=lines, follow=follow)
        async with self._answering(self._cluster().TailPoolLog(request)) as responses:
            async for response in responses:
                for line in response.lines:
                    yield line

    def _inference(self) -> "inference_pb2_grpc.InferenceServiceAsyncStub":
        return inference_pb2_grpc.InferenceServiceStub(self._open())

    def _cluster(self) -> "cluster_pb2_grpc.ClusterServiceAsyncStub":
        return cluster_pb2_grpc.ClusterServiceStub(self._open())

    def _open(self) -> grpc.aio.Channel:
        """The channel; another one once our certificate has been renewed, for what is asked from then on."""
        if not self._entered:
            raise RuntimeError("use the client inside `async with Client(...) as client`")
        material = self._tls.current() if self._tls is not None else None
        if not self._channels or material is not self._material:
            self._material = material
            self._channels.append(open_channel(self._address, material, name=role_name(Role.HEAD)))
        return self._channels[-1]

    @contextlib.asynccontextmanager
    async def _refusals(self) -> AsyncIterator[None]:
        try:
            yield
        except grpc.aio.AioRpcError as error:
            refusal = refusal_of(error, f"the head at {self._address}")
            if refusal.reason is Reason.AGENT_UNREACHABLE:
                await self._explain(error)
            raise SollolError(refusal) from None

    async def _explain(self, error: grpc.aio.AioRpcError) -> None:
        """GRPC says only that a handshake failed. Raises why, when it was that."""
        if self._tls is not None:
            await who_listens(self._address, self._tls, Role.HEAD)
        elif _CUT_OFF in (error.details() or "") and await speaks_tls(self._address):  # else it has just ended
            raise refuse(
                Reason.NO_CERTIFICATE,
                f"the head at {self._address} closes plaintext connections: name the directory of your certificate",
            )

    @contextlib.asynccontextmanager
    async def _answering(self, call: Any) -> AsyncIterator[AsyncIterable[Any]]:
        """Yield the call's responses; leaving early cancels it."""
        async with self._refusals():
            try:
                yield call
            finally:
                call.cancel()


def _sampling(sampling: Sampling | None) -> inference_pb2.Sampling:
    return wire.fill(inference_pb2.Sampling(), sampling or Sampling())


def _event(response: Any) -> Progress | Piece:
    if response.WhichOneof("event") == "progress":
        return wire.value(Progress, response.progress)
    return wire.value(Piece, response.piece)
