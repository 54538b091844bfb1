"""The agent, put together. Start reading here: every collaborator is built in `serve`, and nowhere else.

The reporter owns what the node says of itself, the ledger its promises, the supervisor its engines, the relay the
token streams; the gRPC service only asks them.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Any

import grpc.aio
import structlog
from msgspec.structs import replace
from sollol.broker import broker_of
from sollol.certified import certified
from sollol.config import is_loopback
from sollol.directories import Directories, cache_directory, directories
from sollol.identity import Role
from sollol.lifecycle import Closing, Stop
from sollol.live import Live
from sollol.registry import Registry
from sollol.tls import TlsFiles
from sollol.topics import Topics

from agent import link_probe
from agent.bandwidth import usable_cores
from agent.busy import Busy
from agent.config import AgentConfig
from agent.cordon import Cordon
from agent.device_list import DeviceList
from agent.engine.find import FoundEngine, find_engine, listed_devices
from agent.gpus import default_drivers
from agent.learned import Learned
from agent.ledger import Ledger, LedgerEvent
from agent.lending_site import lending_site
from agent.links import Links
from agent.listening import listening
from agent.memory_account import MemoryAccount
from agent.models import Inventory, ModelRoots, model_roots
from agent.presence.home_assistant import Discovery
from agent.presence.presence import Presence, expiry_s
from agent.probe import Probe
from agent.relay import Relay
from agent.reporter import Reporter
from agent.server import AgentService
from agent.sole import sole_owner
from agent.speeds import FILE_NAME as SPEEDS_FILE
from agent.speeds import Speeds
from agent.streams import Streams
from agent.supervisor import files
from agent.supervisor.cgroups import EngineCgroups, delegation
from agent.supervisor.endpoints import TcpSite
from agent.supervisor.owner import Limits
from agent.supervisor.supervisor import Supervisor
from agent.token import claim, own_token

log = structlog.get_logger(__name__)

STEP_WITHIN_S = 5.0
STREAMS_GRACE_S = 1.0
LEAVE_GRACE_S = 0.2  # streams have their last word already, and the next agent waits for the port


async def serve(live: Live[AgentConfig], environ: Mapping[str, str], stop: Stop) -> None:
    """Run the agent until `stop`; returns when every engine it started is gone.

    Raises:
        SollolError: PORT_TAKEN, NODE_ID_IN_USE, ENGINE_MISSING for a configured engine that is not there, another agent
            uses the state directory, the certificate is not this node's, or the broker's password is not where it
            should be.
    """
    config = live.now
    places = directories(environ, state=config.state_dir, log=config.log_dir, run=config.run_dir)
    with sole_owner(places.state):
        async with Closing() as closing:
            tls = certified(config, Role.AGENT, environ, closing, stop)
            server = listening(config.listen, config.port, tls)  # before anything is published or ended there
            registry, token = _registry(config, closing), own_token(places.state)
            await claim(registry, config.node_id, token, config.lease_s)
            found = await _found_engine(config, environ)
            ledger = Ledger(clock=time.monotonic, journal=lambda event: _journal(event, reporter))
            inventory, probe = Inventory(_model_roots(config, environ)), _probe(config, environ, places, found)
            streams, learned, key = Streams(), Learned(places.state), config.coordinator_key()
            cordon, cgroups = Cordon(places.state), EngineCgroups(delegation(), lambda: reporter.unified_gpus())  # noqa: PLW0108 - defined below
            supervisor = _supervisor(
                config, environ, places,
                found=found, inventory=inventory, ledger=ledger, streams=streams, key=key, learned=learned, tls=tls,
                cgroups=cgroups,
            )  # fmt: skip
            relay = Relay(supervisor.socket_of, supervisor.failure_of, streams, key)
            speeds = _speeds(places, found, supervisor, inventory, key, on_change=lambda: reporter.changed())  # noqa: PLW0108 - defined below
            streams.subscribe(speeds.streams_changed)
            sink = link_probe.Sink()
            links = Links(probe=partial(link_probe.probe, tls=tls), who=partial(link_probe.who_answers, tls=tls))
            reporter = Reporter(
                config=config, probe=probe, inventory=inventory, ledger=ledger, links=links, learned=learned,
                supervisor=Busy(supervisor, streams, speeds), speeds=speeds, cordon=cordon,
                engine=found.engine if found else None, rpc_transport=supervisor.transport, tls=tls,
                registry=registry, token=token, engines_unlimited=cgroups.unlimited,
            )  # fmt: skip
            supervisor.subscribe(lambda _: reporter.changed())
            links.subscribe(reporter.changed)
            devices = DeviceList(partial(listed_devices, found, environ), probe, reporter.changed)
            supervisor.subscribe(devices.instance_changed)
            live.subscribe(lambda settings: _reconfigure(settings, environ, inventory, probe, reporter))
            closing.run("speeds", speeds.run(), stop, within_s=STEP_WITHIN_S)
            supervisor.adopt()
            closing.run("report", reporter.run(), stop, within_s=STEP_WITHIN_S)
            closing.run("links", links.run(), stop, within_s=STEP_WITHIN_S)
            _close_engines(supervisor, config, closing)
            if not await _before_stop(reporter.ready(), stop):
                return
            closing.run("devices", devices.run(), stop, within_s=STEP_WITHIN_S)  # from here on the probe knows drivers
            service = AgentService(
                reporter=reporter, ledger=ledger, supervisor=supervisor, relay=relay, links=links, sink=sink,
                cordon=cordon, active_streams=streams.active,
            )  # fmt: skip
            await _open(server, service, closing, relay if config.leave_engines else None)
            _tell_broker(config, reporter, closing, stop)
            _announce(config, reporter, stop)
            await stop.wait()


def _announce(config: AgentConfig, reporter: Reporter, stop: Stop) -> None:
    stop.announce_ready(reporter.summary)
    log.info("agent_ready", node=config.node_id, grpc=f"{config.listen}:{config.port}")


def _reconfigure(
    config: AgentConfig, environ: Mapping[str, str], inventory: Inventory, probe: Probe, reporter: Reporter
) -> None:
    inventory.look_in(_model_roots(config, environ))
    probe.set_caps(config.caps)
    reporter.use(config)


def _close_engines(supervisor: Supervisor, config: AgentConfig, closing: Closing) -> None:
    close = partial(supervisor.close, leave=config.leave_engines)
    closing.add("engines", close, within_s=config.stop_grace_s + 2 * STEP_WITHIN_S)


def _journal(event: LedgerEvent, reporter: Reporter) -> None:
    log.debug("ledger_changed", entry=event)
    reporter.changed()


async def _open(server: grpc.aio.Server, service: AgentService, closing: Closing, leaving: Relay | None) -> None:
    """From here on heads are answered. The streams of `leaving` are cut in the end: their engines outlive us."""
    service.add_to(server)
    await server.start()
    grace_s = STREAMS_GRACE_S if leaving is None else LEAVE_GRACE_S
    closing.add("gRPC", lambda: server.stop(grace_s), within_s=STEP_WITHIN_S)
    closing.add("drain", lambda: service.drain(restarting=leaving is not None), within_s=STEP_WITHIN_S)
    if leaving is not None:
        closing.add("streams", leaving.leave, within_s=STEP_WITHIN_S)


async def _before_stop(awaited: Coroutine[Any, Any, object], stop: Stop) -> bool:
    """Wait for something that need not come: a signal, or the end of a part of this agent, ends the wait."""
    tasks = [asyncio.create_task(awaited, name="first report"), asyncio.create_task(stop.wait(), name="stop")]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].done() and not stop.requested
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _registry(config: AgentConfig, closing: Closing) -> Registry | None:
    if not config.redis_url:
        return None
    registry = Registry(config.redis_url, client_name=f"sollol-agent/{config.node_id}")
    closing.add("registry", registry.close, within_s=STEP_WITHIN_S)
    return registry


def _tell_broker(config: AgentConfig, reporter: Reporter, closing: Closing, stop: Stop) -> None:
    """That this node is online, and what its reports say, to an MQTT broker where one is configured."""
    if not config.mqtt_url:
        return
    from sollol.mqtt import Connection  # noqa: PLC0415 - it loads the client library

    node_id, topics = config.node_id, Topics(config.mqtt_cluster)
    connection = Connection(
        broker_of(config.mqtt_url, password_file=config.mqtt_password_file, ca_file=config.mqtt_ca_file),
        client_id=f"sollol-agent/{config.mqtt_cluster}/{node_id}",
        status_topic=topics.node_status(node_id),
    )
    interval_s = max(config.mqtt_interval_s, config.heartbeat_s)
    discovery = Discovery(
        topics, cluster=config.mqtt_cluster, node_id=node_id, prefix=config.mqtt_discovery_prefix,
        expire_after_s=expiry_s(interval_s),
    )  # fmt: skip
    presence = Presence(
        connection, topics=topics, watch=reporter.watch, interval_s=interval_s, discovery=discovery,
        discoverable=config.mqtt_discovery, leave=config.leave_engines,
    )  # fmt: skip
    closing.run("MQTT", connection.run(), stop, within_s=STEP_WITHIN_S)
    closing.run("presence", presence.run(), stop, within_s=STEP_WITHIN_S)  # ends first: MQTT tells its last words


async def _found_engine(config: AgentConfig, environ: Mapping[str, str]) -> FoundEngine | None:
    found = await find_engine(
        config.engine_path(), search_path=environ.get("PATH", ""), cache_dir=cache_directory(environ), environ=environ
    )
    if found is None:
        log.warning(
            "engine_missing", hint="`sollol engine build` builds one; `pip install sollol[prebuilt]` brings one"
        )
        return None
    log.info("engine_found", source=found.engine.source, path=found.engine.path, build=found.engine.build)
    return replace(found, engine=replace(found.engine, threads=_threads(config)))


def _threads(config: AgentConfig) -> int:
    return config.threads or usable_cores()


def _model_roots(config: AgentConfig, environ: Mapping[str, str]) -> ModelRoots:
    return model_roots(
        config.expanded_model_dirs(), ollama=config.ollama_dir, huggingface=config.huggingface_dir, environ=environ
    )


def _supervisor(
    config: AgentConfig,
    environ: Mapping[str, str],
    places: Directories,
    *,
    found: FoundEngine | None,
    inventory: Inventory,
    ledger: Ledger,
    streams: Streams,
    key: str,
    learned: Learned,
    tls: TlsFiles | None,
    cgroups: EngineCgroups,
) -> Supervisor:
    tcp = TcpSite(listen=config.listen, host=_reached_at(config), ports=config.coordinator_ports(), key=key)
    return Supervisor(
        engine=found.argv if found else (),
        gpu_devices=tuple(device.device_id for device in found.devices) if found else (),
        resolve=inventory.path_of,
        environment=environ,
        directories=files.Directories(log=places.log, run=places.run, state=places.state),
        limits=Limits(
            start_timeout_s=config.start_timeout_s,
            stop_grace_s=config.stop_grace_s,
            orphan_ttl_s=config.orphan_ttl_s,
        ),
        streams=streams.active,
        threads=found.engine.threads if found else 0,
        site=lending_site(config, found, tls),
        tcp=tcp if config.coordinator_listen == "tcp" else None,
        promises=ledger,
        on_logged=MemoryAccount(inventory.model, learned).loaded,
        cgroups=cgroups,
    )


def _reached_at(config: AgentConfig) -> str:
    """The address at which what listens on `listen` is reached: `host` names all of this node's."""
    return config.listen if is_loopback(config.listen) else config.host


def _probe(config: AgentConfig, environ: Mapping[str, str], places: Directories, found: FoundEngine | None) -> Probe:
    probe = Probe(
        drivers=default_drivers(), caps=config.caps, state_dir=places.state, threads=_threads(config), environ=environ
    )
    probe.heard_engine(found.devices if found else ())
    return probe


def _speeds(
    places: Directories,
    found: FoundEngine | None,
    supervisor: Supervisor,
    inventory: Inventory,
    key: str,
    *,
    on_change: Callable[[], None],
) -> Speeds:
    speeds = Speeds(
        places.state / SPEEDS_FILE,
        engine=found.engine.build if found else "",
        threads=found.engine.threads if found else 0,
        plan_of=supervisor.plan_of,
        socket_of=supervisor.socket_of,
        identity_of=lambda name: inventory.model(name).identity,
        on_change=on_change,
        key=key,
    )
    supervisor.subscribe(speeds.instance_changed)
    return speeds
