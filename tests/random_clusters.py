"""Clusters and models drawn at random that often fit only together, the same ones for the same seed."""

from collections.abc import Mapping
from random import Random

from msgspec.structs import replace
from sollol.correction import UNCORRECTED, Correction, MemoryCorrection
from sollol.engine import Engine, EngineSource
from sollol.link import Link as Measured
from sollol.report import (
    Device,
    Instance,
    InstanceState,
    ModelShape,
    NodeStatus,
    PlacementWish,
)

from sollold.placement import PlacementDefaults
from sollold.placement.links import Link, Links
from tests.placement_cases import GIB, MODEL, cpu, gpu, model, node, shape

RPC = Engine(source=EngineSource.PATH, path="llama-server", build="b1", rpc=True, rpc_protocol="7.0.0")
OTHERS = (
    None,
    replace(RPC, rpc=False, rpc_protocol=""),
    replace(RPC, build="b2"),
    replace(RPC, rpc_protocol="6.0.0"),
)
CONTEXT = 1024
DEFAULTS = PlacementDefaults(parallel=1, context_per_slot=CONTEXT)


def with_rpc(status: NodeStatus, engine: Engine | None = RPC, **changes) -> NodeStatus:
    return replace(status, report=replace(status.report, engine=engine, **changes))


def cluster(random: Random, *, most_nodes: int, most_layers: int, others: float = 0.0) -> list[NodeStatus]:
    """`others`: how often an engine cannot take part."""
    of = random_shape(random, most_layers)
    count = random.randint(2, most_nodes)
    return [
        with_rpc(_node(random, at, of, count), random.choice(OTHERS) if at and random.random() < others else RPC)
        for at in range(count)
    ]


def random_shape(random: Random, most_layers: int) -> ModelShape:
    layers = random.randint(1, most_layers)
    size = random.choice((GIB // 8, GIB, 2 * GIB))
    even, windows, experts = random.random() < 0.5, random.random() < 0.2, random.random() < 0.2
    layer_bytes = tuple(size if even else random.randint(size // 3, size) for _ in range(layers))
    return replace(
        shape(layers),
        layer_bytes=layer_bytes,
        sliding_window=512 if windows else 0,
        sliding_layers=tuple(random.random() < 0.7 for _ in range(layers)) if windows else (),
        experts=8 if experts else 0,
        experts_used=2 if experts else 0,
        expert_bytes=tuple(one // 2 * (random.random() < 0.8) for one in layer_bytes) if experts else (),
        embedding_bytes=random.choice((GIB // 16, GIB // 2)),
        output_bytes=random.choice((GIB // 16, GIB // 2, GIB)),
        vocabulary=random.choice((768, 32000, 150000)),
        embedding_length=random.choice((256, 4096)),
    )


def _node(random: Random, at: int, of: ModelShape, count: int) -> NodeStatus:
    size = sum(of.layer_bytes)
    ram = int(random.uniform(0.2, 1.8) * size / count) + GIB * random.randint(0, 2)
    devices: list[Device] = [cpu(ram, random.choice((0.0, 10e9, 20e9, 40e9, 80e9)))]
    if random.random() < 0.4:
        free = int(random.uniform(0.1, 0.8) * size) + GIB // 2
        unified, usable = random.random() < 0.2, random.random() < 0.9
        devices.append(gpu("CUDA0", free, random.choice((0.0, 100e9, 400e9)), unified=unified, usable=usable))
    busy = Instance(instance_id="x", model="other", state=InstanceState.READY, active_streams=1)
    return node(
        f"n{at}",
        *devices,
        models=(model(of=of),) if at == 0 or random.random() < 0.5 else (),
        instances=(busy,) if random.random() < 0.15 else (),
    )


def linked(random: Random, nodes: list[NodeStatus]) -> Links:
    """Let nodes report links to some of the others; returns what placement then knows."""
    known = {
        (f"n{one}", f"n{other}"): Link(rtt_s=random.choice((1e-4, 5e-3)), bytes_per_s=random.choice((1e7, 1e9)))
        for one in range(len(nodes))
        for other in range(one)
        if random.random() < 0.3
    }
    nodes[:] = [reporting(each, known) for each in nodes]
    return Links(known=known)


def reporting(status: NodeStatus, known: Mapping[tuple[str, str], Link]) -> NodeStatus:
    """The node, with those of the links that begin at it."""
    links = tuple(
        Measured(node_id=other, rtt_s=link.rtt_s, bytes_per_s=link.bytes_per_s)
        for (one, other), link in known.items()
        if one == status.report.node_id
    )
    return replace(status, report=replace(status.report, links=links))


def learned(random: Random, nodes: list[NodeStatus]) -> Correction:
    """Let a node remember, one time in four, a load of the model in a layout that no plan has; returns what it showed."""
    if random.random() < 0.75:
        return UNCORRECTED
    correction = Correction(
        weights=random.choice((1.0, 1.2)),
        kv=random.choice((1.0, 3.0)),
        compute=random.choice((1.0, 1.5)),
        added_bytes=random.choice((0, GIB // 4)),
    )
    known = MemoryCorrection(
        identity="same", context_per_slot=1, parallel=1, kv_type="f16", ubatch=1, layout="", correction=correction
    )
    nodes[0] = replace(nodes[0], report=replace(nodes[0].report, memory=(known,)))
    return correction


def wish(**changes) -> PlacementWish:
    return PlacementWish(model=MODEL, **changes)
