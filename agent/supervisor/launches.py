"""Makes what one start takes (command line, environment, files) out of what all starts of this node have in common."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from sollol.errors import Reason, refuse
from sollol.report import CoordinatorPlan

from agent.engine.environment import engine_environment
from agent.supervisor.command import coordinator_argv, coordinator_environment
from agent.supervisor.endpoints import Endpoint, Endpoints
from agent.supervisor.files import Directories, files_of
from agent.supervisor.instance import Launch
from agent.supervisor.lending import BackendLaunch, BackendSite, BackendWish, forwarder_id
from agent.supervisor.memory_log import OnLogged


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
        streams: Callable[[str], int],
        on_logged: OnLogged,
    ) -> None:
        self._engine, self._gpu_devices, self._threads = engine, gpu_devices, threads
        self._resolve = resolve
        self._environment = dict(environment)
        self._directories, self._site, self._endpoints = directories, site, endpoints
        self._streams, self._on_logged = streams, on_logged

    def coordinator(self, pool_id: str, plan: CoordinatorPlan) -> Launch:
        """Claims an endpoint; whoever sees the coordinator gone gives it back.

        Raises:
            SollolError: ENGINE_MISSING, PORT_TAKEN, INVALID_REQUEST, or whatever `resolve` says of the model.
        """
        if not self._engine:
            raise refuse(Reason.ENGINE_MISSING, "this node has no llama-server; run `sollol engine build`")
        model_path = self._resolve(plan.model)
        endpoint = self._endpoints.claim(pool_id, files_of(pool_id, self._directories).socket)
        try:
            return self._coordinator(pool_id, plan, model_path, endpoint)
        except BaseException:
            self._endpoints.give_back(pool_id)
            raise

    def _coordinator(self, pool_id: str, plan: CoordinatorPlan, model_path: Path, endpoint: Endpoint) -> Launch:
        files, key = files_of(pool_id, self._directories), self._endpoints.key
        argv = coordinator_argv(
            self._engine,
            plan,
            model_path=model_path,
            socket_path=files.socket,
            gpu_devices=self._gpu_devices,
            threads=self._threads,
            node_id=self._site.node_id,
            listen=endpoint.listen,
            port=endpoint.port,
        )
        return Launch(
            instance_id=pool_id,
            plan=plan,
            argv=argv,
            environment=coordinator_environment(self._environment, key=key),
            files=files,
            endpoint=endpoint.url,
            key=key,
            node_id=self._site.node_id,
            streams=partial(self._streams, pool_id),
            on_logged=self._on_logged,
        )

    def backend(self, instance_id: str, wish: BackendWish) -> BackendLaunch:
        """Raises SollolError: ENGINE_MISSING."""
        if self._site.program is None:
            message = f"node {self._site.node_id} has no ggml-rpc-server beside its engine; run `sollol engine build`"
            raise refuse(Reason.ENGINE_MISSING, message, retryable=True)
        return BackendLaunch(
            wish=wish,
            site=self._site,
            program=self._site.program,
            threads=wish.threads or self._threads,
            environment=engine_environment(self._environment),
            files=files_of(instance_id, self._directories),
            forwarder_files=files_of(forwarder_id(wish.pool_id), self._directories),
        )
