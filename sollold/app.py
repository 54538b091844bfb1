"""The head, put together. Start reading here: every collaborator is built in `serve`, and nowhere else.

A request's way: front → dispatch → pools (warm? use it; else loading: placement → reserve → start → wait) → relay →
front. Around it, nodes follows the registry and the agents, reaping ends what lost pools leave, the surveyor has links
measured, and history writes decisions down.
"""

import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import partial

import structlog
from aiohttp import web
from sollol.broker import broker_of
from sollol.certified import certified
from sollol.errors import Reason, refuse
from sollol.identity import Role
from sollol.lifecycle import Closing, Stop
from sollol.live import Live
from sollol.registry import Registry
from sollol.report import Decision, NodeStatus, PlacementWish
from sollol.tls import TlsFiles
from sollol.topics import Topics

from sollold.admission import Admission
from sollold.catalogue import Catalogue
from sollold.config import HeadConfig
from sollold.decision_event import publication_of
from sollold.dispatch import Dispatch
from sollold.draining import Drainer
from sollold.front.grpc import InferenceService
from sollold.front.http import build_app
from sollold.front.http import serve as serve_http
from sollold.front.https import HttpsFiles, https_files
from sollold.front.metrics import MetricsPage, facts_of
from sollold.front.mqtt import MqttFront
from sollold.front.mqtt_messages import PACKET_BYTES, packet_bytes
from sollold.history import History
from sollold.key_file import KeyFile, keys_path
from sollold.key_policy import check_keys, key_mode
from sollold.loading import Loader
from sollold.metrics import Metrics
from sollold.nodes import Nodes
from sollold.numbers import PoolNumbers
from sollold.operators import ClusterService
from sollold.options import Options
from sollold.placement import PlacementDefaults, decide
from sollold.places import state_directory
from sollold.pools import Pools
from sollold.reaping import Reaper
from sollold.remembered import FILE_NAME as AGENTS_FILE
from sollold.remembered import Remembered
from sollold.server import HeadServer
from sollold.starting import RELEASE_WITHIN_S, Starter
from sollold.surveyor import Surveyor

log = structlog.get_logger(__name__)

STEP_WITHIN_S = 5.0
FRONTS = "fronts"  # they close together: one grace is what everybody's streams get


async def serve(live: Live[HeadConfig], environ: Mapping[str, str], stop: Stop) -> None:
    """Run the head until `stop`; returns when everything it started has ended.

    Raises:
        SollolError: PORT_TAKEN; INVALID_REQUEST when requests need keys and the file of keys is not there; or the
            certificate cannot be used; or there is no password in the file that is said to hold the broker's.
    """
    config, keys = live.now, keys_path(live.now.keys_file, live.now.state_dir, environ)
    check_keys(config, keys)
    async with Closing() as closing:
        tls = certified(config, Role.HEAD, environ, closing, stop)
        registry = _registry(config, closing)
        nodes = _nodes(config, environ, registry, tls, closing=closing, stop=stop)
        history = History(written=registry is not None)
        catalogue = Catalogue(nodes, stale_after_s=config.stale_after_s)
        options = Options(config.models, known=catalogue.known)
        metrics = _metrics(catalogue, history)

        def decided(wish: PlacementWish, among: Sequence[NodeStatus]) -> Decision:
            return decide(options.complete(wish), among, _placement_defaults(live.now), head_host=config.host)

        numbers = PoolNumbers(nodes)
        pools = Pools(
            nodes,
            load=lambda wish, number, told: metrics.load(wish.model, loader.load(wish, number, told)),
            numbers=numbers,
            max_queue=config.max_queue,
            limit=options.pools,
        )
        reaper = Reaper(nodes, on_lost=pools.forget)
        starter = _starter(config, nodes, reaper, pools, numbers)
        loader = Loader(
            nodes, starter, decide=decided, record=history.decided, lost=reaper, load_timeout_s=config.load_timeout_s
        )
        for listener in (reaper.on_node_changed, pools.on_node_changed, numbers.on_node_changed):
            nodes.subscribe(listener)
        dispatch = _dispatch(config, nodes, pools, catalogue, reaper=reaper, metrics=metrics)
        reconfigure = partial(_reconfigure, nodes=nodes, options=options, pools=pools, loader=loader, dispatch=dispatch)
        live.subscribe(reconfigure)
        if registry is not None:
            closing.run("history", history.run(registry), stop, within_s=STEP_WITHIN_S)
        closing.run("nodes", nodes.run(), stop, within_s=STEP_WITHIN_S)
        closing.run("reaper", reaper.run(), stop, within_s=STEP_WITHIN_S)
        _drain(nodes, pools, closing, stop)
        closing.run("surveyor", Surveyor(nodes).run(), stop, within_s=STEP_WITHIN_S)
        closing.add("releases", starter.close, within_s=STEP_WITHIN_S)
        closing.add("pools", partial(_leave, pools, starter), within_s=RELEASE_WITHIN_S + STEP_WITHIN_S)
        operators = ClusterService(nodes, pools, catalogue, decide=lambda wish: decided(wish, nodes.statuses()))
        admission = Admission(KeyFile(keys), mode=key_mode(config), known=catalogue.sought, refused=metrics.key_refused)
        inference = InferenceService(dispatch, catalogue, admission, metrics)
        server = HeadServer(inference, operators, is_ready=catalogue.ready, peer_refused=metrics.peer_refused, tls=tls)
        nodes.subscribe(lambda _: server.on_nodes_changed())
        await _serve_grpc(config, closing, stop, server)
        https = https_files(config.http_tls_cert, config.http_tls_key)
        page = MetricsPage(metrics, partial(facts_of, nodes, pools, catalogue, tls, https))
        await _serve_http(config, closing, _app(config, dispatch, catalogue, admission, page), https)
        _serve_mqtt(config, closing, stop, history=history, dispatch=dispatch, admission=admission, metrics=metrics)
        stop.announce_ready(nodes.summary)
        log.info("head_ready", http=f"{config.listen}:{config.http_port}", grpc=f"{config.listen}:{config.grpc_port}")
        await stop.wait()


def _nodes(
    config: HeadConfig,
    environ: Mapping[str, str],
    registry: Registry | None,
    tls: TlsFiles | None,
    *,
    closing: Closing,
    stop: Stop,
) -> Nodes:
    remembered = Remembered(state_directory(config.state_dir, environ) / AGENTS_FILE)
    nodes = Nodes(
        registry,
        static_addresses=config.agents,
        remembered=remembered.addresses(),
        forget_after_s=config.forget_after_s,
        tls=tls,
    )
    nodes.subscribe(partial(remembered.heard, nodes))
    closing.run("memory", remembered.run(), stop, within_s=STEP_WITHIN_S)
    return nodes


def _reconfigure(
    config: HeadConfig, *, nodes: Nodes, options: Options, pools: Pools, loader: Loader, dispatch: Dispatch
) -> None:
    """What is asked for from now on; what runs or waits already goes on as it began."""
    nodes.watch_also(config.agents)
    options.follow(config.models)
    pools.limit_queue(config.max_queue)
    loader.limit(config.load_timeout_s)
    dispatch.limit(first_byte_timeout_s=config.first_byte_timeout_s, stall_timeout_s=config.stall_timeout_s)


def _starter(config: HeadConfig, nodes: Nodes, reaper: Reaper, pools: Pools, numbers: PoolNumbers) -> Starter:
    ttl = timedelta(seconds=config.reservation_ttl_s)
    return Starter(nodes, lost=reaper, pools=pools, numbers=numbers, reservation_ttl=ttl)


def _metrics(catalogue: Catalogue, history: History) -> Metrics:
    metrics = Metrics(catalogue.known)
    history.subscribe(metrics.placed)
    return metrics


def _dispatch(
    config: HeadConfig, nodes: Nodes, pools: Pools, catalogue: Catalogue, *, reaper: Reaper, metrics: Metrics
) -> Dispatch:
    return Dispatch(
        nodes,
        pools,
        catalogue,
        explain=reaper.explained,
        waited=metrics.waited,
        first_byte_timeout_s=config.first_byte_timeout_s,
        stall_timeout_s=config.stall_timeout_s,
    )


async def _leave(pools: Pools, starter: Starter) -> None:
    starter.leave()
    await pools.close()


def _drain(nodes: Nodes, pools: Pools, closing: Closing, stop: Stop) -> None:
    drainer = Drainer(nodes, in_use=pools.in_use, forget=pools.forget)
    nodes.subscribe(drainer.on_node_changed)
    closing.run("drainer", drainer.run(), stop, within_s=STEP_WITHIN_S)


def _registry(config: HeadConfig, closing: Closing) -> Registry | None:
    if not config.redis_url:
        return None
    registry = Registry(config.redis_url, client_name="sollold")
    closing.add("registry", registry.close, within_s=STEP_WITHIN_S)
    return registry


def _placement_defaults(config: HeadConfig) -> PlacementDefaults:
    return PlacementDefaults(
        policy=config.policy,
        strategy=config.strategy,
        context_per_slot=config.context_per_slot,
        parallel=config.parallel,
        kv_type=config.kv_type,
        stale_after_s=config.stale_after_s,
    )


async def _serve_grpc(config: HeadConfig, closing: Closing, stop: Stop, server: HeadServer) -> None:
    address = _address(config.listen, config.grpc_port)
    try:
        await server.listen(address)
    except RuntimeError as error:
        raise _port_taken("grpc_port", address) from error
    grace_s = config.shutdown_grace_s
    closing.run("readiness", server.follow(), stop, within_s=STEP_WITHIN_S)
    closing.add("gRPC", lambda: server.stop(grace_s), within_s=grace_s + STEP_WITHIN_S, group=FRONTS)
    closing.add("health", server.drain, within_s=STEP_WITHIN_S, group=FRONTS)


def _app(
    config: HeadConfig, dispatch: Dispatch, catalogue: Catalogue, admission: Admission, page: MetricsPage
) -> web.Application:
    return build_app(
        dispatch,
        catalogue,
        admission,
        page,
        max_body_bytes=config.max_body_bytes,
        shutdown_grace_s=config.shutdown_grace_s,
    )


async def _serve_http(config: HeadConfig, closing: Closing, app: web.Application, https: HttpsFiles | None) -> None:
    grace_s = config.shutdown_grace_s
    try:
        runner = await serve_http(app, config.listen, config.http_port, https.context if https is not None else None)
    except OSError as error:
        raise _port_taken("http_port", _address(config.listen, config.http_port)) from error
    closing.add("HTTP", runner.cleanup, within_s=grace_s + STEP_WITHIN_S, group=FRONTS)


def _serve_mqtt(
    config: HeadConfig,
    closing: Closing,
    stop: Stop,
    *,
    history: History,
    dispatch: Dispatch,
    admission: Admission,
    metrics: Metrics,
) -> None:
    """Tell the broker that this head is online and what it decides, and answer requests if enabled."""
    if not config.mqtt_url:
        return
    from sollol.mqtt import Connection  # noqa: PLC0415 - it loads the client library

    head_id, topics = config.head_id(), Topics(config.mqtt_cluster)
    connection = Connection(
        broker_of(config.mqtt_url, password_file=config.mqtt_password_file, ca_file=config.mqtt_ca_file),
        client_id=f"sollold/{config.mqtt_cluster}/{head_id}",
        status_topic=topics.head_status(head_id),
        packet_bytes=packet_bytes(config.max_body_bytes) if config.mqtt_inference else PACKET_BYTES,
    )
    history.subscribe(lambda made: connection.publish(publication_of(made, head_id, time.time(), topic=topics.event())))
    closing.run("MQTT", connection.run(), stop, within_s=STEP_WITHIN_S)
    if config.mqtt_inference:
        front = MqttFront(
            connection,
            dispatch,
            admission,
            metrics,
            topics=topics,
            most_running=config.mqtt_requests,
            max_bytes=config.max_body_bytes,
            discovery_prefix=config.mqtt_discovery_prefix,
            grace_s=config.shutdown_grace_s,
        )
        closing.add("MQTT requests", front.close, within_s=config.shutdown_grace_s + STEP_WITHIN_S, group=FRONTS)


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _port_taken(setting: str, address: str) -> Exception:
    return refuse(Reason.PORT_TAKEN, f"cannot listen on {address}: is another head running? Set {setting} to another")
