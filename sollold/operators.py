"""`ClusterService`: what operators ask of the head. A gRPC edge: values inside, messages outside."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeAlias

import grpc
import structlog
from msgspec import ValidationError
from msgspec.structs import replace
from sollol import wire
from sollol.channels import refusal_abort
from sollol.errors import Reason, Refusal, SollolError, refuse
from sollol.inference import Progress
from sollol.names import check_model_name
from sollol.report import Decision, InstanceState, PlacementWish, Pool
from sollol.v1 import cluster_pb2 as pb
from sollol.v1 import cluster_pb2_grpc as rpc

from sollold import drain
from sollold.catalogue import Catalogue
from sollold.nodes import Nodes
from sollold.pools import Pools
from sollold.scaling import MAX_POOLS

log = structlog.get_logger(__name__)

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

MAX_LOG_LINES = 10_000
DRAIN_LOOK_S = 0.2


class ClusterService(rpc.ClusterServiceServicer):
    """Operators' calls over the head's collaborators.

    Args:
        decide: Placement over the nodes as they are now; changes nothing.
    """

    def __init__(
        self, nodes: Nodes, pools: Pools, catalogue: Catalogue, *, decide: Callable[[PlacementWish], Decision]
    ) -> None:
        self._nodes = nodes
        self._pools = pools
        self._catalogue = catalogue
        self._decide = decide

    async def ListNodes(self, request: pb.ListNodesRequest, context: Context) -> pb.ListNodesResponse:
        response = pb.ListNodesResponse()
        for status in self._nodes.statuses():
            wire.fill(response.nodes.add(), status)
        return response

    async def ListPools(self, request: pb.ListPoolsRequest, context: Context) -> pb.ListPoolsResponse:
        response = pb.ListPoolsResponse()
        for pool in self._pools.all():
            wire.fill(response.pools.add(), pool)
        return response

    async def Place(self, request: pb.PlaceRequest, context: Context) -> pb.PlaceResponse:
        async with _aborting(context):
            wish = _wish(request.wish)
            check_model_name(wish.model)
            with contextlib.suppress(SollolError):  # an unknown model is the decision's refusal, table and all
                wish = replace(wish, model=self._catalogue.canonical(wish.model))
            response = pb.PlaceResponse()
            wire.fill(response.decision, self._decide(wish))
        return response

    async def Load(self, request: pb.LoadRequest, context: Context) -> AsyncIterator[pb.LoadResponse]:
        async with _aborting(context):
            wish = _wish(request.wish)
            wish = replace(wish, model=self._catalogue.canonical(wish.model))
            count = _pool_count(request)
            async for step in _with_progress(lambda told: self._pools.ensure_ready(wish, told, count=count)):
                response = pb.LoadResponse()
                if isinstance(step, Pool):
                    wire.fill(response.pool, step)
                else:
                    wire.fill(response.progress, step)
                yield response

    async def Unload(self, request: pb.UnloadRequest, context: Context) -> pb.UnloadResponse:
        async with _aborting(context):
            model = self._model_named(request.model)
            await self._pools.stop_loading(model)
            pools = self._pools.instances_of(model)
            ends = await asyncio.gather(*(self._stop(pool) for pool in pools), return_exceptions=True)
            for error in ends:
                if error is not None:
                    raise error
        return pb.UnloadResponse(instance_ids=[pool.instance.instance_id for pool in pools])

    async def _stop(self, pool: Pool) -> None:
        instance_id = pool.instance.instance_id
        self._pools.forget(instance_id)
        lenders = {share.node_id for share in pool.instance.shares if share.node_id} - {pool.node_id}
        try:
            await self._nodes.link(pool.node_id).stop(instance_id)
            await asyncio.gather(*(self._nodes.link(node_id).stop(instance_id) for node_id in sorted(lenders)))
        except BaseException:
            self._pools.doubt(instance_id)  # it may well run on, also when the operator has left
            raise

    async def Cordon(self, request: pb.CordonRequest, context: Context) -> pb.CordonResponse:
        async with _aborting(context):
            await self._set_cordoned(request.node_id, cordoned=True)
        return pb.CordonResponse()

    async def Uncordon(self, request: pb.UncordonRequest, context: Context) -> pb.UncordonResponse:
        async with _aborting(context):
            await self._set_cordoned(request.node_id, cordoned=False)
        return pb.UncordonResponse()

    async def Drain(self, request: pb.DrainRequest, context: Context) -> AsyncIterator[pb.DrainResponse]:
        async with _aborting(context):
            node_id = request.node_id
            before, draining = self._nodes.status(node_id), False
            await self._set_cordoned(node_id, cordoned=True, draining=True)
            told: tuple[Pool, ...] | None = None
            while told != ():
                self._nodes.link(node_id)  # of a node that is lost for good nobody knows what it runs
                now = self._nodes.status(node_id)
                if now is not None and (before is None or now.report is not before.report):
                    if draining and not now.report.draining:
                        raise _called_off(node_id)
                    draining = now.report.draining
                left = tuple(
                    replace(pool, instance=self._pools.newest(pool.instance))
                    for pool in drain.left_on(node_id, self._nodes.statuses())
                )
                if left != told:
                    response = pb.DrainResponse()
                    for pool in left:
                        wire.fill(response.left.add(), pool)
                    yield response
                told = left
                await asyncio.sleep(DRAIN_LOOK_S)

    async def _set_cordoned(self, node_id: str, *, cordoned: bool, draining: bool = False) -> None:
        await self._nodes.link(node_id).set_cordoned(cordoned=cordoned, draining=draining)

    async def TailPoolLog(
        self, request: pb.TailPoolLogRequest, context: Context
    ) -> AsyncIterator[pb.TailPoolLogResponse]:
        async with _aborting(context):
            pool = self._named(request.pool)
            link = self._nodes.link(pool.node_id)
            lines = min(request.lines or 50, MAX_LOG_LINES)
            tail = link.tail_log(pool.instance.instance_id, lines=lines, follow=request.follow)
            async with contextlib.aclosing(tail) as batches:
                async for batch in batches:
                    yield pb.TailPoolLogResponse(lines=batch)

    def _named(self, name: str) -> Pool:
        """The pool with this id, else the newest pool of the model with this name; ready ones first."""
        pools = self._pools.all()
        for pool in pools:
            if pool.instance.instance_id == name:
                return pool
        model = self._model_named(name)
        of_model = [pool for pool in pools if pool.instance.model == model]
        if not of_model:
            raise refuse(Reason.INSTANCE_NOT_FOUND, f"no pool of {model} has run yet; `sollol load {model}` starts one")
        return max(
            of_model, key=lambda pool: (pool.instance.state is InstanceState.READY, pool.instance.started_unix_s)
        )

    def _model_named(self, name: str) -> str:
        """The canonical name, or that of a pool whose file is on no node any more."""
        if any(pool.instance.model == name for pool in self._pools.all()):
            return name
        return self._catalogue.canonical(name)


async def _with_progress(
    run: Callable[[Callable[[Progress], None]], Awaitable[Sequence[Pool]]],
) -> AsyncIterator[Progress | Pool]:
    """Yield what `run` tells while it runs (a load tells some hundred things at most), then each of its pools."""
    told: asyncio.Queue[Progress | None] = asyncio.Queue()
    task = asyncio.ensure_future(run(told.put_nowait))
    task.add_done_callback(lambda _: told.put_nowait(None))
    try:
        while (progress := await told.get()) is not None:
            yield progress
        for pool in await task:
            yield pool
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _called_off(node_id: str) -> SollolError:
    why = f"node {node_id} is not drained any more: somebody has uncordoned it, or cordoned it only"
    return refuse(Reason.STOPPED, f"{why}; ask again to drain it", retryable=True)


def _pool_count(request: pb.LoadRequest) -> int:
    if not request.HasField("pools"):
        return 1
    if not 1 <= request.pools <= MAX_POOLS:
        raise refuse(Reason.INVALID_REQUEST, f"pools is {request.pools}; use 1 to {MAX_POOLS}")
    return request.pools


def _wish(message: pb.PlacementWish) -> PlacementWish:
    try:
        return wire.value(PlacementWish, message)
    except ValidationError as error:
        raise refuse(Reason.INVALID_REQUEST, f"wish: {error}") from error


@contextlib.asynccontextmanager
async def _aborting(context: Context) -> AsyncIterator[None]:
    """Turn a SollolError into the call's status; anything else is a bug: logged once, INTERNAL to the caller."""
    try:
        yield
    except SollolError as error:
        await refusal_abort(context, error.refusal)
    except (asyncio.CancelledError, grpc.aio.AbortError):
        raise
    except Exception as error:
        log.exception("call_crashed")
        await refusal_abort(context, Refusal(reason=Reason.INTERNAL, message=f"inside the head: {error!r}"))
