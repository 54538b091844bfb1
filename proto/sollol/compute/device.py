"""How many bytes of compute buffer one device of a split model needs: the engine's reservation, rehearsed."""

from functools import lru_cache
from itertools import groupby
from operator import itemgetter

from msgspec import Struct
from msgspec.structs import replace

from sollol.architectures import ALL_TOKENS_TO_THE_END
from sollol.compute.allocator import Result
from sollol.compute.recurrent import begin, handed_over, help_previous, recurrent_layer
from sollol.compute.scene import F16, F32, Batch, Scene, Tail
from sollol.compute.transformer import ROTATION, finish, transformer_layer
from sollol.report import ModelShape

POSITION, CELL = 4, 8  # bytes of an i32 and an i64
# The peak of many equal layers is that of these few: the first ones, which find the memory empty, and the last ones.
FIRST_EQUAL, LAST_EQUAL = 4, 2
MOST_LAYERS = 24  # of patterns that repeat, half from the beginning and half from the end


class Part(Struct, frozen=True):
    """The layers `first` to `stop`, where the number `shape.layers` stands for the output layer, on one device.

    `after_cpu`: the layers before are on the CPU, not on a device. `all_offloaded`: no layer is on the CPU; the engine
    then cuts between layers, and otherwise before the first weights of a layer. `copies`: of what crosses devices.
    """

    first: int
    stop: int
    on_cpu: bool
    after_cpu: bool
    all_offloaded: bool
    copies: int


def compute_bytes(shape: ModelShape, batch: Batch, part: Part) -> int:
    """Without the output buffer that answers are read from."""
    held = _telling_layers(shape, part)
    before = [part.first - 1] * (part.first > 0)  # what happens at both ends depends on the layers there
    after = [part.stop] * (part.stop < shape.layers)
    short = _of_layers(shape, [*before, *held, *after])
    first = len(before)
    stop = first + len(held) + (part.stop > shape.layers)
    inputs = tuple(_input_sizes(shape, batch).items())  # of the whole model: the host has them all
    return _rehearsed_bytes(short, batch, replace(part, first=first, stop=stop), inputs)


@lru_cache(maxsize=4096)
def _rehearsed_bytes(shape: ModelShape, batch: Batch, part: Part, inputs: tuple[tuple[str, int], ...]) -> int:
    return _Device(shape, batch, part, dict(inputs)).peak_bytes()


def _telling_layers(shape: ModelShape, part: Part) -> list[int]:
    layers = range(part.first, min(part.stop, shape.layers))
    kinds = [(shape.kv_heads[at], *(bool(flags[at]) for flags in _flags(shape) if flags)) for at in layers]
    telling: list[int] = []
    for _, run in groupby(zip(kinds, layers, strict=True), key=itemgetter(0)):
        equal = [at for _, at in run]
        telling += equal[:FIRST_EQUAL] + equal[max(FIRST_EQUAL, len(equal) - LAST_EQUAL) :]
    return telling if len(telling) <= MOST_LAYERS else telling[: MOST_LAYERS // 2] + telling[-MOST_LAYERS // 2 :]


def _flags(shape: ModelShape) -> tuple[tuple[int, ...], ...]:
    return shape.sliding_layers, shape.recurrent_bytes, shape.expert_bytes


def _of_layers(shape: ModelShape, layers: list[int]) -> ModelShape:
    """A model of these layers only, equal for all models that need the same buffers."""
    sliding, recurrent, expert = (tuple(flags[at] for at in layers) if flags else () for flags in _flags(shape))
    return replace(
        shape,
        layers=len(layers),
        layer_bytes=(),
        largest_tensor_bytes=(),
        kv_heads=tuple(shape.kv_heads[at] for at in layers),
        sliding_layers=tuple(map(bool, sliding)),
        recurrent_bytes=recurrent,
        expert_bytes=tuple(map(int, map(bool, expert))),
        embedding_bytes=0,
        output_bytes=0,
        tied_bytes=0,
    )


class _Device:
    def __init__(self, shape: ModelShape, batch: Batch, part: Part, sizes: dict[str, int]) -> None:
        self._shape = shape
        self._part = part
        self._sizes = sizes
        self._inputs: dict[str, Result] = {}
        self._scene = Scene(shape, batch, part.first, part.stop, self._find)
        if part.first == shape.layers and shape.architecture not in ALL_TOKENS_TO_THE_END:
            self._scene.tokens = batch.sequences  # all that the last layer left
        self._entering_width = self._scene.width

    def peak_bytes(self) -> int:
        tail, norm, x = self._entrance()
        if x is not None and not self._part.first and self._part.stop and self._scene.is_recurrent(0):
            x = begin(self._scene, x)
        for at in range(self._part.first, min(self._part.stop, self._shape.layers)):
            if tail is not None:
                x = finish(self._scene, tail)
            norm = self._scene.room.over(norm or self._head(x))
            layer = recurrent_layer if self._scene.is_recurrent(at) else transformer_layer
            tail, norm, x = layer(self._scene, at, norm, x), None, None
        self._leave(tail, norm, x)
        return self._scene.room.peak_bytes()

    def _head(self, x: Result | None) -> Result:
        """The norm that a layer begins with, before its weights."""
        assert x is not None, "without a norm there is what it is the norm of"
        return self._scene.room.node(self._scene.width, x)

    def _find(self, name: str) -> Result:
        """An input of the graph, or what another device hands over: in place before this split's operations."""
        if name not in self._inputs:
            copies = self._part.copies
            first = self._part.on_cpu and name in self._sizes
            self._inputs[name] = self._scene.room.input(
                copies * self._size(name), kept=copies > 1, first=first or copies > 1
            )
        return self._inputs[name]

    def _size(self, name: str) -> int:
        if name in self._sizes:
            return self._sizes[name]
        if name == "tail_weights":
            return F32 * self._scene.batch.tokens * self._shape.experts_used
        if name == "tail_output" and self._shape.experts_used:
            return self._shape.experts_used * self._entering_width
        return handed_over(self._scene, name) or self._entering_width

    def _entrance(self) -> tuple[Tail | None, Result | None, Result | None]:
        """The end of the layer before, the norm that the first layer begins with, or its input."""
        part, scene = self._part, self._scene
        if part.on_cpu:
            tokens = scene.find("tokens")
            scene.find("embedded")  # for those who send embeddings: has its place, is not used
            return None, None, scene.room.node(scene.width, tokens)
        if part.first and scene.is_recurrent(part.first - 1) and scene.is_recurrent(part.first):
            help_previous(scene, part.first)
        if part.all_offloaded:
            return None, None, scene.find("residual")
        if not part.after_cpu:
            return None, scene.find("norm"), None
        output = scene.find("tail_output")
        weights = scene.find("tail_weights") if self._shape.experts_used else None
        return Tail(output, scene.find("tail_residual"), weights), None, None

    def _leave(self, tail: Tail | None, norm: Result | None, x: Result | None) -> None:
        part, scene = self._part, self._scene
        if part.on_cpu and part.stop <= self._shape.layers:
            for name in self._sizes:
                scene.room.node(0, scene.find(name))  # to the other devices
            ends = (tail.output, tail.residual) if tail else (x,)
            scene.room.node(0, *(end for end in ends if end is not None))
            return
        if tail is not None:
            x = finish(scene, tail)
        if part.stop > self._shape.layers:
            self._answer(norm or self._head(x))
        elif x is not None and not part.all_offloaded:
            scene.room.node(0, self._head(x), x)

    def _answer(self, norm: Result) -> None:
        rows = F32 * self._scene.batch.sequences
        if self._shape.architecture in ALL_TOKENS_TO_THE_END:
            norm = self._scene.room.node(rows * self._shape.embedding_length, norm, self._scene.find("answered"))
        self._scene.room.node(rows * self._shape.vocabulary, norm)


def _input_sizes(shape: ModelShape, batch: Batch) -> dict[str, int]:
    """Bytes of every input of the graph, for the whole micro-batch."""
    sizes = {"tokens": POSITION * batch.tokens}
    attending = [at for at, heads in enumerate(shape.kv_heads) if heads]
    kinds = {bool(shape.sliding_window and shape.sliding_layers[at]) for at in attending}
    if attending:
        sizes["positions"] = POSITION * batch.tokens
    for sliding in sorted(kinds):
        suffix, cells = ("_sliding", batch.sliding_cells) if sliding else ("", batch.cells)
        sizes["key_cells" + suffix] = sizes["value_cells" + suffix] = CELL * batch.tokens
        sizes["mask" + suffix] = F16 * batch.tokens * cells
        if batch.quantized_kv:
            sizes |= {name + suffix: size for name, size in _rotation_sizes(shape).items()}
    if any(shape.recurrent_bytes):
        sizes["copied_states"] = POSITION * batch.sequences
    sizes["answered"] = POSITION * batch.sequences
    return sizes


def _rotation_sizes(shape: ModelShape) -> dict[str, int]:
    """Squares: for keys as wide as the largest power of two that divides a head."""
    sizes = {}
    if shape.key_length and shape.key_length % ROTATION == 0:
        sizes["key_rotation"] = F32 * (shape.key_length & -shape.key_length) ** 2
    if shape.value_length and shape.value_length % ROTATION == 0:
        sizes["value_rotation"] = F32 * ROTATION**2
    return sizes
