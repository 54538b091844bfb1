"""One layer with attention, as llama.cpp computes it (llama-graph.cpp), for the size of its intermediate results.

Operations are added in the order in which the engine executes them. Weights take no room here; what is done in place
on a result with one user (biases, norms of heads, activations) is left out.
"""

from sollol.architectures import FUSED
from sollol.compute.allocator import Result
from sollol.compute.scene import F16, Scene, Tail

# The engine turns queries, keys and values by a Hadamard matrix when the cache is quantized and heads are a multiple
# of this.
ROTATION = 64
# Answers of experts are added up one by one, in place: more of them need no more room. The figure may come from afar.
MOST_ADDED = 8


def transformer_layer(scene: Scene, at: int, norm: Result, x: Result | None) -> Tail:
    """`x`: the residual, None when another device hands it over."""
    room = scene.room
    residual = room.over(*scene.answered_only(at, room.node(scene.width, _attention(scene, at, norm)), x))
    norm = room.over(room.node(scene.width, residual))
    if scene.shape.expert_bytes and scene.shape.expert_bytes[at]:
        return _experts(scene, norm, residual)
    wide = scene.per_token(scene.shape.feed_forward_length)
    if scene.shape.architecture in FUSED:
        halves = [room.node(2 * wide, norm)]
    else:
        halves = [room.node(wide, norm), room.node(wide, norm)]
    return Tail(room.node(scene.width, room.node(wide, *halves)), residual)


def finish(scene: Scene, tail: Tail) -> Result:
    """The next layer's input."""
    room = scene.room
    if tail.output_is_view:
        return room.node(scene.width, tail.output, tail.residual, overwrites=(tail.residual,))
    if tail.weights is None:
        return room.over(tail.output, tail.residual)
    answers = room.over(tail.output, tail.weights)
    used = scene.shape.experts_used
    total = room.node(scene.width, *(answers,) * min(2, used))
    for _ in range(min(used, MOST_ADDED) - 2):
        total = room.over(total, answers)
    return room.over(total, tail.residual)


def _attention(scene: Scene, at: int, norm: Result) -> Result:
    shape, room = scene.shape, scene.room
    sliding = bool(shape.sliding_window and shape.sliding_layers[at])
    kind = "_sliding" if sliding else ""
    queries, keys, values = _projected(scene, at, norm, kind)
    room.node(0, keys, scene.find("key_cells" + kind))  # into the cache
    room.node(0, values, scene.find("value_cells" + kind))
    copies = _f16_copies(scene, at, sliding=sliding)
    length = shape.value_length or shape.key_length  # MLA answers in compressed form
    answer = room.node(scene.per_token(shape.heads * length), queries, *copies, scene.find("mask" + kind))
    return _turned(scene, answer, "value", kind)


def _projected(scene: Scene, at: int, norm: Result, kind: str) -> tuple[Result, Result, Result]:
    """Queries, keys and values."""
    shape, room = scene.shape, scene.room
    wide = scene.per_token(shape.heads * shape.key_length)
    keys_wide, values_wide = (
        scene.per_token(shape.kv_heads[at] * length) for length in (shape.key_length, shape.value_length)
    )
    if shape.architecture in FUSED:
        all_three = room.node(wide + keys_wide + values_wide, norm)
        queries = _turned(scene, room.node(wide, all_three, scene.find("positions")), "key", kind)
        values = _turned(scene, all_three, "value", kind, of_size=values_wide)
        keys = _turned(scene, room.node(keys_wide, all_three, scene.find("positions")), "key", kind)
        return queries, keys, values
    queries = _turned(scene, _placed(scene, norm, wide), "key", kind)
    if shape.sliding_window:  # the engine's code for models with windows does the keys first
        keys = _turned(scene, _placed(scene, norm, keys_wide), "key", kind)
        return queries, keys, _turned(scene, room.node(values_wide, norm), "value", kind)
    values = _turned(scene, room.node(values_wide, norm), "value", kind)
    return queries, _turned(scene, _placed(scene, norm, keys_wide), "key", kind), values


def _placed(scene: Scene, norm: Result, size: int) -> Result:
    """Queries or keys: their rotary positions (or norms) go to another place, since heads are views."""
    return scene.room.node(size, scene.room.node(size, norm), scene.find("positions"))


def _turned(scene: Scene, rows: Result, of: str, kind: str, of_size: int = 0) -> Result:
    length = scene.shape.key_length if of == "key" else scene.shape.value_length
    if not scene.batch.quantized_kv or not length or length % ROTATION:
        return rows
    return scene.room.node(of_size or rows.size, scene.find(f"{of}_rotation{kind}"), rows)


def _f16_copies(scene: Scene, at: int, *, sliding: bool) -> list[Result]:
    """Flash attention reads f16: of an f32 cache the engine makes a copy, layer by layer."""
    if not scene.batch.f32_kv:
        return []
    cells = scene.batch.sliding_cells if sliding else scene.batch.cells
    rows = F16 * cells * scene.batch.sequences * scene.shape.kv_heads[at]
    return [scene.room.node(rows * length) for length in (scene.shape.key_length, scene.shape.value_length)]


def _experts(scene: Scene, norm: Result, residual: Result) -> Tail:
    room, used = scene.room, scene.shape.experts_used
    everyone = scene.per_token(scene.shape.experts)
    scores = room.over(room.node(everyone, norm))
    chosen = room.node(everyone, scores)
    weights = room.node(scene.per_token(used), scores, chosen)
    weights = room.over(weights, room.node(scene.per_token(1), weights))
    wide = scene.per_token(used * scene.shape.expert_feed_forward_length)
    gate, up = room.node(wide, norm, chosen), room.node(wide, norm, chosen)
    return Tail(room.node(used * scene.width, room.node(wide, gate, up), chosen), residual, weights)
