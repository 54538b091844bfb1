"""Makes what one start takes (command line, environment, files) out of what all starts of this node have in common."""

import hashlib
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from msgspec.structs import replace
from sollol.errors import Reason, refuse
from sollol.report import CoordinatorPlan, InstanceKind

from agent.engine.environment import engine_environment
from agent.supervisor.allowance import received_bytes, sent_bytes
from agent.supervisor.cgroups import EngineCgroups
from agent.supervisor.command import coordinator_argv, coordinator_environment
from agent.supervisor.endpoints import Endpoint, Endpoints
from agent.supervisor.files import Directories, files_of
from agent.supervisor.identity import marked
from agent.supervisor.instance import Launch
from agent.supervisor.lending import BackendLaunch, BackendSite, BackendWish, check_transport, forwarder_id
from agent.supervisor.memory_log import OnLogged
from agent.supervisor.process import EngineProcess
from agent.supervisor.records import Record
from agent.supervisor.tunnelling import Route, TunnelLaunch, Tunnels, tunnel_id


class Launches:
    """See `Supervisor` for the arguments."""

    def __init__(
        self,
        *,
        engine: tuple[str, ...],
        gpu_devices: tuple[str, ...],
        threads: int,
        resolve: Callable[[str], Path],
        environment: Mapping[str, str],
        directories: Directories,
        site: BackendSite,
        endpoints: Endpoints,
        tunnels: Tunnels,
        streams: Callable[[str], int],
        on_logged: OnLogged,
        cgroups: EngineCgroups,
    ) -> None:
        self._engine, self._gpu_devices, self._threads = engine, gpu_devices, threads
        self._resolve = resolve
        self._environment = dict(environment)
        self._directories, self._site, self._endpoints = directories, site, endpoints
        self._tunnels, self._streams, self._on_logged = tunnels, streams, on_logged
        self._cgroups = cgroups

    def coordinator(self, pool_id: str, plan: CoordinatorPlan, reserved: Mapping[str, int]) -> Launch:
        """Claims an endpoint and the ports of a tunnel; whoever sees the coordinator gone gives them back.

        Raises:
            SollolError: ENGINE_MISSING, PORT_TAKEN, INVALID_REQUEST, TRANSPORT_MISMATCH, or whatever `resolve` says of
                the model.
        """
        if not self._engine:
            raise refuse(Reason.ENGINE_MISSING, "this node has no llama-server; run `sollol engine build`")
        model_path = self._resolve(plan.model)
        endpoint, secret = self._endpoints.claim(pool_id, files_of(pool_id, self._directories).socket), plan.pool_secret
        try:
            plan, routes = self._tunnels.through(pool_id, plan)
            argv = self._coordinator_argv(pool_id, plan, model_path, endpoint)
        except BaseException:
            self._endpoints.give_back(pool_id)
            self._tunnels.give_back(pool_id)
            raise
        record = Record(
            instance_id=pool_id,
            pool_id=pool_id,
            kind=InstanceKind.COORDINATOR,
            reserved=dict(reserved),
            socket=str(files_of(pool_id, self._directories).socket),
            started_unix_s=time.time(),
            plan=plan,
            endpoint=endpoint,
            key_digest=_digest(self._endpoints.key),
        )
        return self._coordinator(record, plan, argv, {}, self._tunnel(pool_id, routes, secret))

    def coordinator_again(
        self, record: Record, plan: CoordinatorPlan, endpoint: Endpoint, running: Mapping[str, EngineProcess]
    ) -> Launch:
        """For one that runs already. Claims its endpoint and ports, as `coordinator` does.

        Raises:
            SollolError: INVALID_REQUEST; it is not where, or does not ask for the key that, this agent's would.
        """
        self._check_place(record)
        if record.key_digest != _digest(self._endpoints.key):
            raise refuse(Reason.INVALID_REQUEST, "it asks for another key than coordinator_key_file holds now")
        self._endpoints.hold(record.instance_id, endpoint)
        routes = self._tunnels.hold(record.instance_id, plan)
        return self._coordinator(record, plan, (), running, self._tunnel(record.pool_id, routes))

    def _tunnel(self, pool_id: str, routes: tuple[Route, ...], secret: bytes = b"") -> TunnelLaunch | None:
        if not routes:
            return None
        return TunnelLaunch(
            pool_id=pool_id,
            routes=routes,
            tls_dir=self._site.tls_dir,
            environment=marked(engine_environment(self._environment), self._directories.state),
            files=files_of(tunnel_id(pool_id), self._directories),
            secret=secret,
        )

    def _coordinator_argv(
        self, pool_id: str, plan: CoordinatorPlan, model_path: Path, endpoint: Endpoint
    ) -> tuple[str, ...]:
        return coordinator_argv(
            self._engine,
            plan,
            model_path=model_path,
            socket_path=files_of(pool_id, self._directories).socket,
            gpu_devices=self._gpu_devices,
            threads=self._threads,
            node_id=self._site.node_id,
            listen=endpoint.listen,
            port=endpoint.port,
        )

    def _coordinator(
        self,
        record: Record,
        plan: CoordinatorPlan,
        argv: tuple[str, ...],
        running: Mapping[str, EngineProcess],
        tunnel: TunnelLaunch | None,
    ) -> Launch:
        key = self._endpoints.key
        return Launch(
            plan=plan,
            record=record,
            running=running,
            tunnel=tunnel,
            argv=argv,
            environment=marked(coordinator_environment(self._environment, key=key), self._directories.state),
            files=files_of(record.instance_id, self._directories),
            key=key,
            node_id=self._site.node_id,
            streams=partial(self._streams, record.instance_id),
            on_logged=self._on_logged,
            cgroup=self._cgroups.of(record.instance_id, record.reserved, sent_bytes(plan)),
        )

    def backend(self, instance_id: str, wish: BackendWish, reserved: Mapping[str, int]) -> BackendLaunch:
        """Raises SollolError: ENGINE_MISSING, TRANSPORT_MISMATCH."""
        check_transport(wish, self._site)
        if self._site.program is None:
            message = f"node {self._site.node_id} has no ggml-rpc-server beside its engine; run `sollol engine build`"
            raise refuse(Reason.ENGINE_MISSING, message, retryable=True)
        record = Record(
            instance_id=instance_id,
            pool_id=wish.pool_id,
            kind=InstanceKind.BACKEND,
            reserved=dict(reserved),
            socket=str(files_of(instance_id, self._directories).socket),
            started_unix_s=time.time(),
            wish=replace(wish, pool_secret=b""),
            program=str(self._site.program),
            threads=wish.threads or self._threads,
        )
        return self._backend(record, wish, {})

    def backend_again(self, record: Record, wish: BackendWish, running: Mapping[str, EngineProcess]) -> BackendLaunch:
        """For one that runs already.

        Raises:
            SollolError: INVALID_REQUEST; this agent would not find its files.
        """
        self._check_place(record)
        return self._backend(record, wish, running)

    def _backend(self, record: Record, wish: BackendWish, running: Mapping[str, EngineProcess]) -> BackendLaunch:
        return BackendLaunch(
            wish=wish,
            site=self._site,
            record=record,
            running=running,
            program=Path(record.program),
            threads=record.threads,
            environment=marked(engine_environment(self._environment), self._directories.state),
            files=files_of(record.instance_id, self._directories),
            forwarder_files=files_of(forwarder_id(wish.pool_id), self._directories),
            cgroup=self._cgroups.of(record.instance_id, record.reserved, received_bytes(wish)),
        )

    def _check_place(self, record: Record) -> None:
        socket = files_of(record.instance_id, self._directories).socket
        if record.socket != str(socket):
            raise refuse(
                Reason.INVALID_REQUEST, f"its files are in {Path(record.socket).parent}, not in {socket.parent}"
            )


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
