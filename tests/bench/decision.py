"""How long one placement decision takes, over clusters of several kinds and sizes."""

import statistics
import time
from collections.abc import Callable

from sollol.link import Link
from sollol.report import NodeStatus, PlacementWish

from sollold.placement import PlacementDefaults, decide
from sollold.placement.layout import layouts_for
from tests.placement_cases import GIB, cpu, gpu, model, node, shape
from tests.random_clusters import with_rpc

ROUNDS = 15
# As an 8B model: many layers make the searches longer.
LLAMA = model("llama:8b", of=shape(layers=32, layer_bytes=GIB // 4))


def _node(number: int, cpu_free: int, *gpus_free: int) -> NodeStatus:
    gpus = [gpu(f"CUDA{at}", free=free) for at, free in enumerate(gpus_free)]
    host = f"10.0.{number // 250}.{number % 250}"
    return node(f"node-{number:05d}", cpu(free=cpu_free), *gpus, host=host, models=(LLAMA,))


def _lending(number: int) -> NodeStatus:
    """Room for a part of the model, and links to those 32 that heads have measured."""
    others = [at for at in range(32) if at != number] if number < 32 else []
    links = tuple(
        Link(node_id=f"node-{at:05d}", rtt_s=0.0002 * (1 + at % 3), bytes_per_s=1e8 / (1 + at % 5)) for at in others
    )
    return with_rpc(_node(number, (3 + number * 7 % 4) * GIB), links=links)


# "mixed": unequal nodes, a third without a GPU, a third with two, most GPUs too full for the whole model.
# "lending": no node has room alone, so that plans over several are looked for.
KINDS: dict[str, Callable[[int], NodeStatus]] = {
    "no GPU": lambda number: _node(number, (16 + number * 7 % 64) * GIB),
    "one GPU": lambda number: _node(number, 64 * GIB, (1 + number * 5 % 24) * GIB),
    "mixed": lambda number: _node(number, (2 + number * 7 % 64) * GIB, *[(1 + number * 5 % 24) * GIB] * (number % 3)),
    "nothing fits": lambda number: _node(
        number, (1 + number % 3) * GIB, *[(1 + number * 5 % 3) * GIB // 2] * (number % 3)
    ),
    "lending": _lending,
}


def rows(sizes: list[int]) -> list[dict[str, float | str]]:
    found = [_row("fit", kind, size) for kind in KINDS for size in sizes]
    return found + [_row("classic", "mixed", size) for size in sizes]


def _row(policy: str, kind: str, size: int) -> dict[str, float | str]:
    nodes = [KINDS[kind](number) for number in range(size)]
    layouts_for.cache_clear()
    times_ms, cpu_ms = [], []
    for _ in range(ROUNDS):
        began, began_cpu = time.perf_counter(), time.process_time()
        decision = decide(PlacementWish(model=LLAMA.name, policy=policy), nodes, PlacementDefaults())
        cpu_ms.append((time.process_time() - began_cpu) * 1000)
        times_ms.append((time.perf_counter() - began) * 1000)
        assert decision.coordinator or decision.refusal
    return {
        "policy": policy,
        "nodes are": kind,
        "nodes": size,
        "p50_ms": statistics.median(times_ms),
        "least_ms": min(times_ms),
        "first_ms": times_ms[0],
        "cpu_p50_ms": statistics.median(cpu_ms),
        "us_per_node": statistics.median(times_ms) * 1000 / size,
    }
