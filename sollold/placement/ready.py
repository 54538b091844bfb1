"""How long a plan takes to become ready, in predicted seconds:

    what every start takes + file / disk rate + sum over backends (weights there / link rate).

The coordinator reads its file tensor by tensor and sends on what belongs to a backend, so the times add up. Only nodes
with the file are coordinators: nothing is ever copied first.
"""

from sollol.report import CoordinatorPlan, Model, ScorePart

from sollold.placement.links import Links

START_S = 0.7  # processes, buffers and a first run of an engine with hardly a weight, on two cores
DISK_BYTES_PER_S = 500e6  # assumed: a SATA SSD, nothing of the file in memory yet
# How much less moving makes up for up to 5 % on every token; a smaller difference is no better than the prediction.
MUCH_SOONER = 0.8
MUCH_SOONER_S = 5.0


def ready_parts(coordinator: str, model: Model, plan: CoordinatorPlan, links: Links) -> tuple[ScorePart, ...]:
    """`start_s`, `read_s` of the coordinator's node, `move_s` of each node that lends, in the order of the layers."""
    moved: dict[str, int] = {}
    for share in plan.shares:
        if share.node_id:
            moved[share.node_id] = moved.get(share.node_id, 0) + share.weight_bytes
    moves = [
        ScorePart("move_s." + node_id, size / links.between(coordinator, node_id).bytes_per_s)
        for node_id, size in moved.items()
    ]
    read = ScorePart("read_s." + coordinator, model.size_bytes / DISK_BYTES_PER_S)
    return (ScorePart("start_s", START_S), read, *moves)


def moving_s(parts: tuple[ScorePart, ...]) -> float:
    return sum(part.value for part in parts if part.name.startswith("move_s."))


def much_sooner(one_s: float, other_s: float) -> bool:
    """Whether moving for `one_s` instead of `other_s` is worth a slightly slower plan."""
    return one_s <= min(other_s * MUCH_SOONER, other_s - MUCH_SOONER_S)
