"""One layer with a state in place of a KV cache (mamba-base.cpp, rwkv7-base.cpp), for the size of its results.

The engine loads the states of the next layer before it has finished this one. When the next layer is on another device,
that makes a hole in the middle of this one: operations without weights that follow the loading run over there, what
they need is copied there, and their result is copied back. `Crossing` says what goes over and back.

Mamba, Mamba 2 and RWKV 7 are measured. Other recurrences are counted as Mamba 2, of which they are relatives, or, where
nothing is known of their inner width, as if it were that of the embeddings.
"""

from sollol.compute.allocator import Result
from sollol.compute.scene import F32, Scene, Tail

RWKV7 = frozenset({"rwkv7", "arwkv7"})
MAMBA = frozenset({"mamba", "jamba"})


def recurrent_layer(scene: Scene, at: int, norm: Result, x: Result | None) -> Tail:
    """`x`: the residual, None when another device hands it over."""
    if scene.shape.architecture in RWKV7:
        return _rwkv7(scene, at, norm, x)
    if scene.shape.architecture in MAMBA:
        return _mamba(scene, at, norm, x)
    return _mamba2(scene, at, norm, x)


def begin(scene: Scene, x: Result) -> Result:
    """What comes before layer 0 with `x`, the embedded tokens: its states, and RWKV's norm of the embeddings."""
    scene.states = _load(scene, 0)
    return scene.room.node(scene.width, x) if scene.shape.architecture in RWKV7 else x


def help_previous(scene: Scene, at: int) -> None:
    """What this device does for the layer before its first one, `at`, in the middle of that one."""
    scene.states = _load(scene, at)
    if scene.shape.architecture in RWKV7:
        past, rows, again = (scene.find(f"{name}_before") for name in ("past", "rows", "same_rows"))
        shifted = scene.room.node(scene.width, past, rows)
        back = scene.room.node(scene.width, shifted, again, overwrites=(again,))
    else:
        back = scene.room.node(scene.per_token(_inner(scene)), scene.find("gate_before"))
    scene.room.node(0, back)
    scene.room.begin_split()


def handed_over(scene: Scene, name: str) -> int:
    """Bytes of what goes to the next device, or comes back, in the middle of a recurrent layer; 0 for one embedding."""
    inner, channels = _inner(scene), _channels(scene)
    projected = 2 * inner if scene.shape.architecture in MAMBA else inner + channels + scene.shape.step_rank
    tokens, embedding = scene.batch.tokens, scene.shape.embedding_length
    return {  # views are copied with all that lies between their rows, from their first element to their last
        "gate_before": F32 * ((tokens - 1) * projected + inner),
        "gate": F32 * tokens * inner,
        "past_before": F32 * embedding * (2 * scene.batch.sequences - 1),
        "rows_before": F32 * embedding * (tokens - 1),
    }.get(name, 0)


def _inner(scene: Scene) -> int:
    return scene.shape.inner_length or scene.shape.embedding_length


def _channels(scene: Scene) -> int:
    return _inner(scene) + 2 * scene.shape.group_count * scene.shape.state_length


def _state_bytes(scene: Scene, at: int) -> tuple[int, int]:
    """What layer `at` remembers of all sequences: of the last tokens' inputs, and its state."""
    everything = scene.shape.recurrent_bytes[at] * scene.batch.sequences
    if scene.shape.architecture in RWKV7:
        history = 2 * F32 * scene.shape.embedding_length * scene.batch.sequences
        return history, everything - history
    state = min(everything, F32 * scene.shape.state_length * _inner(scene) * scene.batch.sequences)
    return everything - state, state


def _load(scene: Scene, at: int) -> tuple[Result, ...]:
    """Mamba reads its state in the cache itself; RWKV makes a copy of that, too."""
    history, state = _state_bytes(scene, at)
    sizes = (history, state) if scene.shape.architecture in RWKV7 else (history,)
    return tuple(scene.room.node(size, scene.find("copied_states")) for size in sizes)


def _loaded(scene: Scene, at: int) -> tuple[Result, ...]:
    states, scene.states = scene.states or _load(scene, at), ()
    return states


def _load_next(scene: Scene, at: int) -> bool:
    """Load the states of the layer after `at`; False when that is done, and the rest of this moment, elsewhere."""
    if not scene.is_recurrent(at + 1):
        return True
    if at + 1 < scene.stop:
        scene.states = _load(scene, at + 1)
        return True
    return False


def _gate(scene: Scene, at: int, projected: Result) -> Result:
    if _load_next(scene, at):
        return scene.room.node(scene.per_token(_inner(scene)), projected)
    scene.room.node(0, projected)
    scene.room.begin_split()
    return scene.find("gate")


def _mamba(scene: Scene, at: int, norm: Result, x: Result | None) -> Tail:
    room, inner = scene.room, scene.per_token(_inner(scene))
    few = scene.per_token(scene.shape.step_rank + 2 * scene.shape.state_length)
    history, state = _state_bytes(scene, at)
    (past,) = _loaded(scene, at)
    projected = room.node(2 * inner, norm)
    convolved = room.node(inner, room.node(history + inner, past, projected))
    steps = room.node(few, convolved)
    step = room.node(inner, room.node(scene.per_token(scene.shape.step_rank), steps))
    scanned = room.node(inner + state, convolved, step, steps, scene.find("copied_states"))
    gate = _gate(scene, at, projected)
    mixed = room.node(inner, gate, room.over(room.over(convolved), scanned))
    output, x = scene.answered_only(at, room.node(scene.width, mixed), x)
    return Tail(output, x, output_is_view=at < scene.shape.layers - 1)


def _mamba2(scene: Scene, at: int, norm: Result, x: Result | None) -> Tail:
    room, inner, channels = scene.room, scene.per_token(_inner(scene)), scene.per_token(_channels(scene))
    history, state = _state_bytes(scene, at)
    (past,) = _loaded(scene, at)
    projected = room.node(inner + channels + scene.per_token(scene.shape.step_rank), norm)
    convolved = room.node(channels, room.node(history + channels, past, projected))
    step = room.node(scene.per_token(scene.shape.step_rank), projected)
    scanned = room.node(inner + state, projected, convolved, step, scene.find("copied_states"))
    gate = _gate(scene, at, projected)
    mixed = room.node(inner, gate, room.over(room.node(inner, convolved), scanned))
    mixed = room.node(inner, mixed)  # its norm
    output, x = scene.answered_only(at, room.node(scene.width, mixed), x)
    return Tail(output, x)


def _rwkv7(scene: Scene, at: int, norm: Result, x: Result | None) -> Tail:
    room, wide = scene.room, scene.width
    past, state = _loaded(scene, at)
    shifted = room.over(room.node(wide, past, norm), norm)
    mixed = room.over(room.over(room.node(6 * wide, shifted)), norm)
    rank = scene.per_token(scene.shape.step_rank)  # also that of the rate; half and twice that are usual for others
    receptance, decay, key = room.node(wide, mixed), room.node(wide, room.node(rank, mixed)), room.node(wide, mixed)
    rate = room.node(wide, room.node(rank, mixed))
    scaled = room.node(wide, key)
    key_now = room.node(wide, rate, scaled)
    key_now = room.over(room.over(key_now, scaled), key)
    value = _value(scene, at, mixed)
    unit = room.node(wide, room.over(key))
    removed = room.node(wide, unit)
    added = room.over(unit, rate)
    out = room.node(wide + state.size, receptance, decay, key_now, value, removed, added, state)
    out = room.node(wide, room.node(wide, out))
    bonus = room.node(scene.per_token(1), room.node(wide, key_now, receptance))  # one for every head
    out = room.over(out, room.node(wide, value, bonus))
    out = room.over(out, room.node(wide, room.node(2 * rank, mixed)))
    residual = room.node(wide, room.node(wide, out), x or scene.find("residual"))
    return _channel_mix(scene, at, residual, norm, past)


def _value(scene: Scene, at: int, mixed: Result) -> Result:
    value = scene.room.node(scene.width, mixed)
    if at == 0:
        scene.first_value = value
        value.users += 1  # every layer up to the last one mixes it in
        return value
    scene.first_value = scene.first_value or scene.find("first_value")
    change = scene.room.node(scene.width, scene.first_value, value)
    rank = scene.per_token(scene.shape.step_rank) // 2
    share = scene.room.node(scene.width, scene.room.node(rank, mixed))
    return scene.room.over(value, scene.room.over(change, share))


def _channel_mix(scene: Scene, at: int, residual: Result, norm: Result, past: Result) -> Tail:
    room = scene.room
    rows = room.node(scene.width, residual)
    room.node(0, room.node(past.size, norm, rows))
    if _load_next(scene, at):
        before = room.node(scene.width, past, rows)
        residual, rows, before = scene.answered_only(at, residual, rows, before)
        own = (before, rows) if at == scene.shape.layers - 1 else ()  # views otherwise
        change = room.node(scene.width, before, rows, overwrites=own)
    else:
        room.node(0, past, rows)
        room.begin_split()
        change = scene.find("change")
    wide = room.node(scene.per_token(scene.shape.feed_forward_length), room.over(change, rows))
    return Tail(room.node(scene.width, room.over(wide)), residual)
