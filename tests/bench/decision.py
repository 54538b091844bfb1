"""How long one placement decision takes, over clusters of several kinds and sizes."""

import statistics
import time
from collections.abc import Callable

from sollol.report import NodeStatus, PlacementWish

from sollold.placement import PlacementDefaults, decide
from sollold.placement.layout import layouts_for
from tests.placement_cases import GIB, cpu, gpu, model, node, shape

ROUNDS = 15
# As an 8B model: many layers make the searches longer.
LLAMA = model("llama:8b", of=shape(layers=32, layer_bytes=GIB // 4))


def _node(number: int, cpu_free: int, *gpus_free: int) -> NodeStatus:
    gpus = [gpu(f"CUDA{at}", free=free) for at, free in enumerate(gpus_free)]
    host = f"10.0.{number // 250}.{number % 250}"
    return node(f"node-{number:05d}", cpu(free=cpu_free), *gpus, host=host, models=(LLAMA,))


# "mixed": unequal nodes, a third without a GPU, a third with two, most GPUs too full for the whole model.
KINDS: dict[str, Callable[[int], NodeStatus]] = {
    "no GPU": lambda number: _node(number, (16 + number * 7 % 64) * GIB),
    "one GPU": lambda number: _node(number, 64 * GIB, (1 + number * 5 % 24) * GIB),
    "mixed": lambda number: _node(number, (2 + number * 7 % 64) * GIB, *[(1 + number * 5 % 24) * GIB] * (number % 3)),
    "nothing fits": lambda number: _node(
        number, (1 + number % 3) * GIB, *[(1 + number * 5 % 3) * GIB // 2] * (number % 3)
    ),
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
