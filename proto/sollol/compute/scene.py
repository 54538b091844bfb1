"""What the operations of one device share: the micro-batch, the model's widths, and where inputs come from."""

from collections.abc import Callable

from msgspec import Struct

from sollol.architectures import ALL_TOKENS_TO_THE_END
from sollol.compute.allocator import Rehearsal, Result
from sollol.report import ModelShape

F32 = 4
F16 = 2


class Batch(Struct, frozen=True):
    """The micro-batch that buffers are sized for, and the cells of the KV cache that it may look at."""

    tokens: int
    sequences: int
    cells: int
    sliding_cells: int
    quantized_kv: bool
    f32_kv: bool


class Tail(Struct):
    """What the last weights of a layer leave to be done: adding up experts, and the residual.

    The engine runs this where the next operation with weights runs, which may be another device.
    """

    output: Result
    residual: Result
    weights: Result | None = None
    output_is_view: bool = False


class Scene:
    """`find` gives an input of the graph, or what another device hands over, by name.

    Layers before `first` and from `stop` on are on other devices.
    """

    def __init__(self, shape: ModelShape, batch: Batch, first: int, stop: int, find: Callable[[str], Result]) -> None:
        self.shape = shape
        self.batch = batch
        self.first = first
        self.stop = stop
        self.room = Rehearsal()
        self.tokens = batch.tokens
        self.states: tuple[Result, ...] = ()  # of a recurrent layer, loaded before its turn
        self.first_value: Result | None = None  # of RWKV 7: every layer mixes it in
        self.find = find

    def per_token(self, elements: int) -> int:
        """Bytes of as many f32 for every token that is still computed."""
        return F32 * self.tokens * elements

    @property
    def width(self) -> int:
        """Bytes of one embedding per token that is still computed."""
        return self.per_token(self.shape.embedding_length)

    def is_recurrent(self, at: int) -> bool:
        """Whether layer `at` has a state in place of a KV cache. Of layers with both, attention is what is known."""
        return (
            at < self.shape.layers
            and bool(self.shape.recurrent_bytes and self.shape.recurrent_bytes[at])
            and not self.shape.kv_heads[at]
        )

    def answered_only(self, at: int, *rows: Result | None) -> list[Result]:
        """`rows`; in the last layer only those of answered tokens, which are all that is computed from there on.

        None stands for the residual that another device hands over.
        """
        if at != self.shape.layers - 1 or self.shape.architecture in ALL_TOKENS_TO_THE_END:
            return [row or self.find("residual") for row in rows]
        answered = self.find("answered")
        self.tokens = self.batch.sequences
        return [self.room.node(self.width, row or self.find("residual"), answered) for row in rows]
