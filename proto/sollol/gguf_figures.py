"""One model's metadata as figures that can be: what no sensible file says ends as MODEL_CORRUPT."""

from sollol.errors import Reason, SollolError, refuse
from sollol.gguf import Header, Skipped, Value
from sollol.names import quoted

LARGEST_FIGURE = 1 << 31


class Metadata:
    """One model's metadata as checked figures. `figure("block_count")` reads `<architecture>.block_count`."""

    def __init__(self, header: Header) -> None:
        self._header = header
        self.architecture = self.word("general.architecture")
        if not self.architecture:
            raise self.corrupt("its metadata names no architecture")

    def corrupt(self, what: str) -> SollolError:
        return refuse(Reason.MODEL_CORRUPT, f"{quoted(self._header.name)}: {what}; get another file of this model")

    def word(self, key: str) -> str:
        value = self._header.metadata.get(key, "")
        return value if isinstance(value, str) else ""

    def _value(self, name: str) -> Value | None:
        return self._header.metadata.get(f"{self.architecture}.{name}")

    def has(self, name: str) -> bool:
        return self._value(name) is not None

    def figure(self, name: str, default: int = 0) -> int:
        """A number, or the largest of an array with one per layer."""
        value = self._value(name)
        if value is None:
            return default
        return max((self._checked(name, item) for item in (value if isinstance(value, tuple) else (value,))), default=0)

    def per_layer(self, name: str, layers: int, default: int) -> tuple[int, ...]:
        value = self._value(name)
        if not isinstance(value, tuple):
            return (default if value is None else self._checked(name, value),) * layers
        if len(value) < layers:
            raise self.corrupt(f"{name} has {len(value)} entries for {layers} layers")
        return tuple(self._checked(name, item) for item in value[:layers])

    def flags(self, name: str, layers: int) -> tuple[bool, ...] | None:
        """One truth per layer, None when the file has no such array."""
        if not isinstance(self._value(name), tuple):
            return None
        return tuple(bool(item) for item in self.per_layer(name, layers, 0))

    def _checked(self, name: str, value: Value) -> int:
        if not isinstance(value, int) or not 0 <= value <= LARGEST_FIGURE:
            raise self.corrupt(f"{name} is {quoted(str(value))}, no sensible number")
        return int(value)

    def length(self, key: str) -> int:
        value = self._header.metadata.get(key)
        if isinstance(value, Skipped):
            return value.length
        return len(value) if isinstance(value, tuple) else 0
