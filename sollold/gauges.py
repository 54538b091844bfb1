"""What the nodes' reports say, as metrics: made anew for each page, so there is nothing to keep or to forget. Pure."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from msgspec import Struct
from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from sollol.report import Device, InstanceKind, InstanceState, NodeStatus, Pool

_POOL_STATES = {"ready": InstanceState.READY, "loading": InstanceState.STARTING}


class Facts(Struct, frozen=True, kw_only=True):
    """What is known at one moment.

    Attributes:
        nodes: Every node, also those out of reach.
        pools: Every pool that a node reports, by the newest that is known of it.
        models: The names of all models that live nodes have.
        certificates_expire_in_s: By what the head's own are used for; negative when one has expired.
    """

    nodes: tuple[NodeStatus, ...]
    pools: tuple[Pool, ...]
    models: tuple[str, ...]
    certificates_expire_in_s: Mapping[str, float]


def gauges(facts: Facts) -> Iterator[Metric]:
    yield _gauge(
        "sollol_certificate_expires_in_seconds",
        "Until the head's own certificate ends: that of its gRPC port, that of HTTPS.",
        ("use",),
        [((use,), left_s) for use, left_s in facts.certificates_expire_in_s.items()],
    )
    yield from _nodes(facts.nodes)
    yield from _devices(facts.nodes)
    yield _gauge(
        "sollol_instances",
        "Engine processes that a node reports.",
        ("node", "kind", "state"),
        _instances(facts.nodes),
    )
    connected = {status.report.node_id for status in facts.nodes if status.connected}
    reachable = [pool for pool in facts.pools if pool.node_id in connected]
    yield _gauge(
        "sollol_pools",
        "Pools of a model on nodes within reach.",
        ("model", "state"),
        _pool_counts(reachable, facts.models),
    )
    yield from _pools(_numbered(reachable))


def _nodes(nodes: Iterable[NodeStatus]) -> Iterator[Metric]:
    by_name = {(status.report.node_id,): status for status in nodes}
    yield _gauge(
        "sollol_node_up",
        "Whether this head is connected to the node's agent.",
        ("node",),
        [(node, status.connected) for node, status in by_name.items()],
    )
    yield _gauge(
        "sollol_node_report_age_seconds",
        "Since the node's newest report.",
        ("node",),
        [(node, status.report_age_s) for node, status in by_name.items()],
    )
    yield _gauge(
        "sollol_node_cordoned",
        "Whether the node takes no new pools.",
        ("node",),
        [(node, status.report.cordoned) for node, status in by_name.items()],
    )
    yield _gauge(
        "sollol_node_draining",
        "Whether the node's pools are being stopped.",
        ("node",),
        [(node, status.report.draining) for node, status in by_name.items()],
    )
    yield _gauge(
        "sollol_node_certificate_expires_in_seconds",
        "Until the certificate of the node's agent ends.",
        ("node",),
        [
            (node, status.report.certificate_expires_in_s - status.report_age_s)
            for node, status in by_name.items()
            if status.report.certificate_expires_in_s is not None
        ],
    )


def _devices(nodes: Iterable[NodeStatus]) -> Iterator[Metric]:
    devices: dict[tuple[str, ...], Device] = {
        (status.report.node_id, device.device_id, device.kind.value): device
        for status in nodes
        for device in status.report.devices
    }
    sizes: tuple[tuple[str, str, Callable[[Device], int]], ...] = (
        ("total", "Memory of the device.", lambda device: device.total_bytes),
        ("free", "What a new reservation may take.", lambda device: device.free_bytes),
        ("reserved", "Promised to pools.", lambda device: device.reserved_bytes),
    )
    for name, meaning, size in sizes:
        yield _gauge(
            f"sollol_device_{name}_bytes",
            meaning,
            ("node", "device", "kind"),
            [(labels, size(device)) for labels, device in devices.items()],
        )


def _instances(nodes: Sequence[NodeStatus]) -> list[tuple[tuple[str, ...], int]]:
    """Zeros included: a state that nothing is in any more says so, and does not vanish."""
    counted = Counter(
        (status.report.node_id, instance.kind, instance.state)
        for status in nodes
        for instance in status.report.instances
    )
    return [
        ((status.report.node_id, kind.value, state.value), counted[status.report.node_id, kind, state])
        for status in nodes
        for kind in InstanceKind
        for state in InstanceState
    ]


def _pool_counts(pools: Iterable[Pool], models: Iterable[str]) -> list[tuple[tuple[str, ...], int]]:
    counted = Counter((pool.instance.model, pool.instance.state) for pool in pools)
    names = sorted({*models, *(model for model, _ in counted)})
    return [((model, name), counted[model, state]) for model in names for name, state in _POOL_STATES.items()]


def _numbered(pools: Iterable[Pool]) -> dict[tuple[str, ...], Pool]:
    """Those that are ready, by their labels. Two heads may have given one number twice, for a moment."""
    return {
        (pool.node_id, pool.instance.model, str(pool.instance.pool_number)): pool
        for pool in pools
        if pool.instance.state is InstanceState.READY
    }


def _pools(pools: Mapping[tuple[str, ...], Pool]) -> Iterator[Metric]:
    labels = ("node", "model", "pool")
    yield _gauge(
        "sollol_pool_slots",
        "Streams that a ready pool takes at a time.",
        labels,
        [(of, pool.instance.parallel) for of, pool in pools.items()],
    )
    yield _gauge(
        "sollol_pool_active_streams",
        "Streams that it has now, those of other heads included.",
        labels,
        [(of, pool.instance.active_streams) for of, pool in pools.items()],
    )
    yield _gauge(
        "sollol_pool_predicted_seconds_per_token",
        "What was predicted when it was placed.",
        labels,
        [(of, pool.instance.predicted_ms_per_token / 1000) for of, pool in pools.items() if _is_predicted(pool)],
    )
    yield _gauge(
        "sollol_pool_observed_seconds_per_token",
        "What its agent has seen since, once there was enough to see.",
        labels,
        [
            (of, pool.instance.observed_ms_per_token / 1000)
            for of, pool in pools.items()
            if pool.instance.observed_ms_per_token
        ],
    )
    yield _gauge(
        "sollol_pool_memory_error_ratio",
        "Predicted bytes over those in the engine's log, less 1: above 0 too much was promised.",
        (*labels, "device_node", "device"),
        [((*of, *at), error) for of, pool in pools.items() for at, error in _memory_errors(pool)],
    )


def _memory_errors(pool: Pool) -> Iterator[tuple[tuple[str, str], float]]:
    """By node and device of each share that the engine's log tells of."""
    for share in pool.instance.shares:
        if share.logged_bytes:
            predicted_bytes = share.total_bytes - share.margin_bytes
            yield (share.node_id or pool.node_id, share.device_id), predicted_bytes / share.logged_bytes - 1


def _is_predicted(pool: Pool) -> bool:
    """The classic policy predicts no speed."""
    return pool.instance.predicted_ms_per_token > 0


def _gauge(
    name: str, meaning: str, labels: tuple[str, ...], samples: Iterable[tuple[tuple[str, ...], float]]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, meaning, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family
