"""The best plan over several nodes by trying every one: every coordinator, order of backends and number of layers.

Shares no code with the search: bytes are the memory model's, for each range on its own, and the objective is written
down a second time.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import permutations
from math import inf
from typing import NamedTuple

from sollol.correction import UNCORRECTED, Correction, scaled
from sollol.memory import CPU_MARGIN_BYTES, bytes_read_per_token, device_shares, largest_tensor_bytes
from sollol.report import Device, DeviceKind, ModelShape, NodeStatus

from sollold.placement.links import Links


class Problem(NamedTuple):
    shape: ModelShape
    nodes: Sequence[NodeStatus]
    load: tuple[int, int]  # context per slot, parallel
    links: Links
    correction: Correction = UNCORRECTED


@lru_cache(maxsize=200_000)
def held(
    shape: ModelShape, first: int, stop: int, *, on_cpu: bool, load: tuple[int, int], correction: Correction
) -> tuple[int, int]:
    """Bytes that the layers from `first` to `stop` need on a lent device or a coordinator's GPU, and those read."""
    every = shape.layers + 1
    kind = DeviceKind.CPU if on_cpu else DeviceKind.GPU
    front, back = ("b", DeviceKind.GPU, first), ("a", DeviceKind.GPU, every - stop)
    share = shares(shape, [("c", DeviceKind.CPU, 0), front, ("d", kind, stop - first), back], load, correction)[2]
    return share.total_bytes, bytes_read_per_token(shape, share)


def shares(shape, split, load, correction):
    context, parallel = load
    return device_shares(
        shape, split, context_per_slot=context, parallel=parallel, kv_type="f16", ubatch=512, correction=correction
    )


def best_ms(problem: Problem, coordinators: Sequence[int]) -> float:
    """The least milliseconds per token of any plan that uses a second node; infinite when none fits."""
    return min((_best_for(problem, own) for own in coordinators), default=inf)


def _best_for(problem: Problem, own: int) -> float:
    nodes = problem.nodes
    groups = [[(own, 0)], *([(at, rank) for rank in _ranks(node)] for at, node in enumerate(nodes) if at != own)]
    local = [(own, rank) for rank in _ranks(nodes[own]) if rank]
    best = inf
    for order in permutations(groups):
        slots = [slot for group in order for slot in group] + local
        for counts in compositions(problem.shape.layers + 1, len(slots)):
            dealt = [(slot, count) for slot, count in zip(slots, counts, strict=True) if count]
            if any(at != own for (at, _), _ in dealt):
                best = min(best, _cost(problem, own, dealt))
    return best


def _cost(problem: Problem, own: int, dealt: list[tuple[tuple[int, int], int]]) -> float:
    shape, nodes, load, links, correction = problem
    host = {own: _coordinator_bytes(shape, load, correction, alone=len(dealt) == 1)}
    total, stop, hops, last = 0.0, 0, {}, dealt[-1][0]
    beside: dict[int, int] = {}
    for (at, rank), count in dealt:
        first, stop = stop, stop + count
        device = nodes[at].report.devices[rank]
        on_cpu = device.kind is DeviceKind.CPU
        size, read = held(shape, first, stop, on_cpu=on_cpu, load=load, correction=correction)
        if size > device.free_bytes:
            return inf
        if at != own and not on_cpu:
            beside[at] = _receiving(shape, correction)
        if on_cpu or device.unified:
            host[at] = host.get(at, 0) + size
        busy = 1 + sum(instance.active_streams > 0 for instance in nodes[at].report.instances)
        total += busy * read / speed(device, nodes[at].report.devices[0]) * 1000
        if at != own or on_cpu:
            hops.setdefault(at, []).append((at, rank))
    if any(
        host.get(at, 0) + beside.get(at, 0) > nodes[at].report.devices[0].free_bytes
        for at in host.keys() | beside.keys()
    ):
        return inf
    for at, slots in hops.items():
        link = links.between(nodes[own].report.node_id, nodes[at].report.node_id)
        crossing = 8 * shape.embedding_length + (4 * shape.vocabulary if last in slots else 0)
        total += 1000 * (len(slots) * (links.hop_s + link.rtt_s) + crossing / link.bytes_per_s)
    return total


def _receiving(shape, correction):
    """What a backend with a GPU takes of its node's RAM: its process and the largest tensor, on its way to the GPU."""
    largest = max(largest_tensor_bytes(shape, at) for at in range(shape.layers))
    return CPU_MARGIN_BYTES + scaled(max(largest, shape.output_bytes), correction.weights)


@lru_cache(maxsize=1000)
def _coordinator_bytes(shape: ModelShape, load: tuple[int, int], correction: Correction, *, alone: bool) -> int:
    counts = [shape.layers + 1] if alone else [1, shape.layers]
    split = [("c", DeviceKind.CPU, 0), *((f"{count}", DeviceKind.GPU, count) for count in counts)]
    return shares(shape, split, load, correction)[0].total_bytes


def speed(device: Device, cpu: Device) -> float:
    assumed = 200e9 if device.kind is DeviceKind.GPU and not device.unified else cpu.bandwidth_bytes_per_s or 20e9
    return device.bandwidth_bytes_per_s or assumed


def _ranks(node: NodeStatus) -> list[int]:
    return [at for at, device in enumerate(node.report.devices) if device.usable]


def compositions(total: int, places: int) -> Iterator[tuple[int, ...]]:
    if places == 1:
        yield (total,)
        return
    for count in range(total + 1):
        for rest in compositions(total - count, places - 1):
            yield (count, *rest)
