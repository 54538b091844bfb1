"""How long one placement decision takes, over clusters of several sizes."""

import statistics
import time

from sollol.report import NodeStatus, PlacementWish

from sollold.placement import PlacementDefaults, decide
from tests.placement_cases import GIB, MODEL, cpu, gpu, node

ROUNDS = 15


def cluster(size: int) -> list[NodeStatus]:
    """Unequal nodes: some without a GPU, some with two, most of them too full for the model."""
    nodes = []
    for number in range(size):
        free = (2 + number * 7 % 64) * GIB
        gpus = [gpu(f"CUDA{index}", free=(1 + number * 5 % 24) * GIB) for index in range(number % 3)]
        nodes.append(node(f"node-{number:05d}", cpu(free=free), *gpus, host=f"10.0.{number // 250}.{number % 250}"))
    return nodes


def rows(sizes: list[int]) -> list[dict[str, float | str]]:
    found: list[dict[str, float | str]] = []
    for policy in ("fit", "classic"):
        for size in sizes:
            nodes = cluster(size)
            times_ms = []
            for _ in range(ROUNDS):
                began = time.perf_counter()
                decision = decide(PlacementWish(model=MODEL, policy=policy), nodes, PlacementDefaults())
                times_ms.append((time.perf_counter() - began) * 1000)
            assert decision.coordinator or decision.refusal
            found.append(
                {
                    "policy": policy,
                    "nodes": size,
                    "p50_ms": statistics.median(times_ms),
                    "worst_ms": max(times_ms),
                    "us_per_node": statistics.median(times_ms) * 1000 / size,
                }
            )
    return found
