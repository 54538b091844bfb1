"""One agent as the head calls it: typed values in and out, `_pb2` messages stay here."""

import asyncio
import contextlib
import functools
from collections.abc import AsyncGenerator, AsyncIterable, Coroutine, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Literal, Protocol

import grpc
import structlog
from msgspec import ValidationError
from msgspec.structs import replace
from sollol import wire
from sollol.channels import refusal_of, unreachable
from sollol.dial import who_listens
from sollol.errors import Reason, Refusal, SollolError, refuse
from sollol.exchange import exchange
from sollol.identity import Identity, Role
from sollol.link import Link
from sollol.report import BackendEndpoint, CoordinatorPlan, Instance, Model, Report
from sollol.tls import TlsFiles
from sollol.v1 import agent_pb2 as pb
from sollol.v1 import agent_pb2_grpc as rpc
from sollol.v1 import common_pb2

from sollold.agent_line import Line
from sollold.relay import AgentRelay

log = structlog.get_logger(__name__)

UNARY_TIMEOUT_S = 5.0
BACKEND_TIMEOUT_S = 60.0  # longer than its agent waits, 20 s for each of its two processes: the agent knows why
STOP_TIMEOUT_S = 60.0
MEASURE_TIMEOUT_S = 20.0  # another head's measurement may come first, and a peer that is silent takes its time


class AgentLink:
    """All that this head asks of one agent: calls, and the relay that all its token streams share.

    With `tls` the agent must show a certificate of its role, and only reports of the node that is named there count.
    When our files change a new connection takes over; what runs on the former one goes on there, unless the agent's
    certificate counts no more: then it ends at once.

    Every method raises SollolError: the agent's own refusal, or AGENT_UNREACHABLE when the call does not get through.
    """

    def __init__(self, address: str, tls: TlsFiles | None = None) -> None:
        self.address = address
        self._tls = tls
        self._line = Line(address) if tls is None else None
        self._draining: set[asyncio.Task[None]] = set()

    @property
    def relay(self) -> AgentRelay:
        return self._connected().relay

    async def close(self) -> None:
        """End every call and stream on this link; using it afterwards raises AGENT_UNREACHABLE."""
        for task in self._draining:
            task.cancel()
        await asyncio.gather(*self._draining, return_exceptions=True)
        if self._line is not None:
            await self._line.close()

    async def watch_report(self) -> AsyncGenerator[Report]:
        """Yield the agent's full report, then each newer one; ends or raises when the agent goes away.

        `models` stays the same object until the agent's list changes.
        """
        while True:
            who = await self._identified()
            with self._calling() as stub:
                call = stub.WatchReport(pb.WatchReportRequest(), wait_for_ready=False)
                try:
                    async with contextlib.aclosing(_reports(call)) as reports, self._exchanging():
                        async for report in reports:
                            _check_named(report, who, self.address)
                            yield report
                            if self._is_outdated():
                                break
                        else:
                            return
                finally:
                    call.cancel()

    async def _identified(self) -> Identity | None:
        """See who is there, and have a connection to exactly them that was made with our newest certificate."""
        if self._tls is None:
            return None
        material = self._tls.current()
        who, peer = await who_listens(self.address, self._tls, Role.AGENT)
        former = self._line
        if former is None or former.material is not material or former.peer != peer:
            self._line = line = Line(self.address, material, who.dns_name, peer)
            line.on_closed = self._tls.running.add(peer, functools.partial(self._cut_off, line))
            if former is not None:
                self._let_go(former.drain())
        return who

    def _cut_off(self, line: Line, refusal: Refusal) -> None:
        """The agent at the other end counts no more: whatever runs there ends now, and may be asked of others."""
        if self._line is line:
            self._line = None
        self._let_go(line.cut(unreachable(f"agent {self.address} is cut off: {refusal.message}")))

    def _let_go(self, ending: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(ending, name=f"let go of {self.address}")
        self._draining.add(task)
        task.add_done_callback(self._draining.discard)

    @contextlib.asynccontextmanager
    async def _exchanging(self) -> AsyncGenerator[None]:
        """Meanwhile have the agent and us know of the same revoked certificates."""
        if self._tls is None:
            yield
            return
        task = asyncio.create_task(self._exchange(self._tls, self._connected()), name=f"exchange {self.address}")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _exchange(self, tls: TlsFiles, line: Line) -> None:
        call = line.revocation.ExchangeRevoked()
        try:
            await exchange(tls, call.read, call.write, pb.ExchangeRevokedRequest, peer=f"agent {self.address}")
        except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError) as error:
            # The watch on the same line says why.
            log.debug("revoked_exchange_ended", address=self.address, error=str(error))
        except Exception:  # a bug: told of here, since nobody else asks for how it ended
            log.exception("revoked_exchange_failed", address=self.address)
        finally:
            call.cancel()

    def _is_outdated(self) -> bool:
        return self._tls is not None and self._line is not None and self._line.material is not self._tls.current()

    def _connected(self) -> Line:
        if self._line is None:
            raise SollolError(unreachable(f"agent {self.address} has not been reached yet"))
        return self._line

    async def refuse(self, refusal: Refusal) -> None:
        """Tell the agent, for its log, why it is not taken in."""
        request = pb.WatchReportRequest()
        wire.fill(request.refusal, refusal)
        try:
            with self._calling() as stub:
                await stub.WatchReport(request, timeout=UNARY_TIMEOUT_S).read()
        except SollolError as error:
            if error.refusal.reason is not refusal.reason:  # the agent's answer is what it was told
                raise

    async def reserve(self, pool_id: str, bytes_by_device: Mapping[str, int], ttl: timedelta) -> None:
        request = pb.ReserveRequest(pool_id=pool_id, bytes=dict(bytes_by_device), ttl_s=ttl.total_seconds())
        with self._calling() as stub:
            _raise_refusal(await stub.Reserve(request, timeout=UNARY_TIMEOUT_S))

    async def release(self, pool_id: str) -> None:
        with self._calling() as stub:
            await stub.Release(pb.ReleaseRequest(pool_id=pool_id), timeout=UNARY_TIMEOUT_S)

    async def start_backend(
        self,
        pool_id: str,
        device_ids: Sequence[str],
        *,
        allowed_hosts: Sequence[str],
        attach_within_s: float,
        upload_bytes: int,
        coordinator_node: str,
        pool_secret: bytes,
    ) -> BackendEndpoint:
        request = pb.StartBackendRequest(
            pool_id=pool_id,
            device_ids=device_ids,
            allowed_hosts=allowed_hosts,
            attach_within_s=attach_within_s,
            upload_bytes=upload_bytes,
            coordinator_node=coordinator_node,
            pool_secret=pool_secret,
        )
        with self._calling() as stub:
            response = await stub.StartBackend(request, timeout=BACKEND_TIMEOUT_S)
            _raise_refusal(response)
            return wire.value(BackendEndpoint, response.endpoint)

    async def start_coordinator(self, pool_id: str, plan: CoordinatorPlan) -> Instance:
        request = pb.StartCoordinatorRequest(pool_id=pool_id)
        wire.fill(request.plan, plan)
        with self._calling() as stub:
            response = await stub.StartCoordinator(request, timeout=UNARY_TIMEOUT_S)
            _raise_refusal(response)
            return wire.value(Instance, response.instance)

    async def watch_instance(self, instance_id: str) -> AsyncGenerator[Instance]:
        with self._calling() as stub:
            async for response in stub.WatchInstance(pb.WatchInstanceRequest(instance_id=instance_id)):
                yield wire.value(Instance, response.instance)

    async def stop_when_idle(self, instance_id: str) -> bool:
        """Like `stop`, unless it has streams at this moment: then False, and it runs on."""
        with self._calling() as stub:
            request = pb.StopRequest(instance_id=instance_id, when_idle=True)
            return not (await stub.Stop(request, timeout=STOP_TIMEOUT_S)).busy

    async def set_cordoned(self, *, cordoned: bool, draining: bool) -> None:
        with self._calling() as stub:
            request = pb.SetCordonedRequest(cordoned=cordoned, draining=draining)
            await stub.SetCordoned(request, timeout=UNARY_TIMEOUT_S)

    async def stop(self, instance_id: str, *, at_once: bool = False) -> None:
        """Return when the engine's process is gone and its reservation is released; `at_once` for one that hangs."""
        with self._calling() as stub:
            request = pb.StopRequest(instance_id=instance_id, at_once=at_once)
            await stub.Stop(request, timeout=STOP_TIMEOUT_S)

    async def tail_log(self, instance_id: str, *, lines: int, follow: bool) -> AsyncGenerator[tuple[str, ...]]:
        request = pb.TailLogRequest(instance_id=instance_id, lines=lines, follow=follow)
        with self._calling() as stub:
            async for response in stub.TailLog(request):
                _raise_refusal(response)
                yield tuple(response.lines)

    async def measure_link(self, node_id: str, host: str, port: int) -> Link:
        """Have the agent measure its link to another node's agent; out of reach is a result, too."""
        with self._calling() as stub:
            request = pb.MeasureLinkRequest(node_id=node_id, host=host, port=port)
            response = await stub.MeasureLink(request, timeout=MEASURE_TIMEOUT_S)
            _raise_refusal(response)
            return wire.value(Link, response.link)

    @contextlib.contextmanager
    def _calling(self) -> Iterator["rpc.AgentServiceAsyncStub"]:
        """Turn whatever a call can end in into SollolError."""
        peer, line = f"agent {self.address}", self._connected()
        try:
            with line.used() as stub:
                yield stub
        except grpc.aio.AioRpcError as error:
            raise SollolError(line.cut_off or refusal_of(error, peer)) from error
        except grpc.aio.UsageError as error:
            raise SollolError(line.cut_off or unreachable(f"the link to {peer} is closed")) from error
        except asyncio.CancelledError as error:
            # gRPC raises this too when the other side cancels the call or the channel is closed. Let through, it would
            # end a task that nobody cancelled, and whoever waits for that task would wait for ever.
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise SollolError(line.cut_off or unreachable(f"the call to {peer} was cut off")) from error
        except ValidationError as error:
            message = f"{peer} sent what this head does not understand ({error}): do both run the same version?"
            raise SollolError(Refusal(reason=Reason.INTERNAL, message=message)) from error


async def _reports(call: AsyncIterable[pb.WatchReportResponse]) -> AsyncGenerator[Report]:
    models: tuple[Model, ...] = ()
    async for response in call:
        report = wire.value(Report, response.report)
        if response.models_unchanged:
            report = replace(report, models=models)
        models = report.models
        yield report


def _check_named(report: Report, who: Identity | None, address: str) -> None:
    if who is not None and report.node_id != who.node_id:
        raise refuse(
            Reason.WRONG_NODE, f"{address} reports as node {report.node_id}, and its certificate is that of {who}"
        )


class _Answer(Protocol):
    def HasField(self, name: Literal["refusal"], /) -> bool: ...  # noqa: N802 - protobuf's name

    @property
    def refusal(self) -> common_pb2.Refusal: ...


def _raise_refusal(answer: _Answer) -> None:
    if answer.HasField("refusal"):
        raise SollolError(wire.value(Refusal, answer.refusal))
