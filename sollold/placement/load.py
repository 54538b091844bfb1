"""What a coordinator shall hold at the same time."""

from msgspec import Struct
from msgspec.structs import replace
from sollol.report import ModelShape


class Load(Struct, frozen=True, kw_only=True):
    """Tokens of context are per slot; beyond what a model was trained for they are of no use to it."""

    context_per_slot: int
    parallel: int
    kv_type: str
    batch: int
    ubatch: int

    def within(self, shape: ModelShape) -> "Load":
        """This load with no more context than the model was trained for, where that is known."""
        if not shape.context_length or self.context_per_slot <= shape.context_length:
            return self
        return replace(self, context_per_slot=shape.context_length)
