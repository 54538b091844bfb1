"""What llama.cpp's graph allocator (ggml-alloc.c) makes of a sequence of operations: the size of one compute buffer.

A compute buffer holds every intermediate result of one micro-batch on one device. Results whose users are done make
room for later ones, and how well they fit into the holes decides its size; no sum of widths predicts that. So the
allocation is rehearsed here, with the engine's own rules: best fit, and results written over their first operand.
"""

ALIGNMENT = 32  # of llama.cpp's CPU buffers, also behind RPC; on GPUs 128, which costs less than 1 KiB per result
_ENDLESS = 1 << 62


class Result:
    """An intermediate result of `size` bytes, which takes the place of one of `overwrites` if that is possible.

    Views (reshaped, permuted, parts) are no results: who uses a view uses what it shows, but never overwrites it.
    """

    __slots__ = ("address", "operands", "overwrites", "size", "users")

    def __init__(self, size: int, operands: tuple["Result", ...] = (), overwrites: tuple["Result", ...] = ()) -> None:
        self.size = -(-size // ALIGNMENT) * ALIGNMENT
        self.operands = operands
        self.overwrites = overwrites
        self.users = 0
        self.address: int | None = None


class Rehearsal:
    """Operations in the order of their execution; `peak_bytes` then tells what they need."""

    def __init__(self) -> None:
        self._inputs: list[list[Result]] = [[]]
        self._nodes: list[list[Result]] = [[]]

    def begin_split(self) -> None:
        """What follows is executed after another device had its turn; its inputs are placed together."""
        self._inputs.append([])
        self._nodes.append([])

    def input(self, size: int, *, kept: bool = False, first: bool = False) -> Result:
        """Something placed before the operations of this split, or of the `first`. `kept` ones never make room."""
        result = Result(size)
        result.users = int(kept)
        self._inputs[0 if first else -1].append(result)
        return result

    def node(self, size: int, *operands: Result, overwrites: tuple[Result, ...] = ()) -> Result:
        """An operation; size 0 when it writes outside of the buffer (into the KV cache). Weights are no operands."""
        result = Result(size, operands, overwrites)
        for operand in operands:
            operand.users += 1
        self._nodes[-1].append(result)
        return result

    def over(self, first: Result, *others: Result) -> Result:
        """An operation whose result is as large as its first operand, and may be written over any that is."""
        return self.node(first.size, first, *others, overwrites=(first, *others))

    def peak_bytes(self) -> int:
        memory = _Memory()
        for inputs, nodes in zip(self._inputs, self._nodes, strict=True):
            for result in inputs:
                result.address = memory.take(result.size)
            for result in nodes:
                self._place(memory, result)
                for operand in result.operands:
                    self._leave(memory, operand)
        return memory.peak

    @staticmethod
    def _leave(memory: "_Memory", operand: Result) -> None:
        operand.users -= 1
        if not operand.users and operand.address is not None:
            memory.give_back(operand.address, operand.size)
            operand.address = None

    @staticmethod
    def _place(memory: "_Memory", result: Result) -> None:
        if not result.size:
            return
        for operand in result.overwrites:
            if operand.users == 1 and operand.size == result.size and operand.address is not None:
                result.address, operand.address = operand.address, None
                return
        result.address = memory.take(result.size)


class _Memory:
    """Free blocks in order of address; the last one has no end."""

    def __init__(self) -> None:
        self._blocks: list[tuple[int, int]] = [(0, _ENDLESS)]  # address, size
        self.peak = 0

    def take(self, size: int) -> int:
        fitting = [(room, -at) for at, (_, room) in enumerate(self._blocks[:-1]) if room >= size]
        at = -min(fitting)[1] if fitting else len(self._blocks) - 1  # of equal ones the engine takes the last
        address, room = self._blocks[at]
        if room == size:
            del self._blocks[at]
        else:
            self._blocks[at] = (address + size, room - size)
        self.peak = max(self.peak, address + size)
        return address

    def give_back(self, address: int, size: int) -> None:
        at = next(at for at, (other, _) in enumerate(self._blocks) if other > address)
        following, room = self._blocks[at]
        if address + size == following:
            self._blocks[at] = (address, size + room)
        else:
            self._blocks.insert(at, (address, size))
        if at and sum(self._blocks[at - 1]) == address:
            before, room = self._blocks[at - 1]
            self._blocks[at - 1 : at + 1] = [(before, room + self._blocks[at][1])]
