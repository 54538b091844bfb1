"""Predicted against logged memory as a page: errors per model, and a selection of the points."""

import csv
import io
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import groupby

from msgspec import Struct

from sollold.placement.classic import estimate_mb

MIB = 1024**2
KINDS = ("weights", "KV", "compute")
ROUNDING = MIB // 100 + 1  # of two lines of the log, which is as many as any of these figures has


class Load(Struct, frozen=True, kw_only=True):
    context: int
    parallel: int
    kv_type: str
    ubatch: int

    def __str__(self) -> str:
        return f"{self.context} x {self.parallel} {self.kv_type}, ubatch {self.ubatch}"


class Point(Struct, frozen=True, kw_only=True):
    """One device of one load: bytes of weights, KV and compute buffer. `device` 0 is the coordinator's CPU.

    `split`: layers per device. `repacked`: the log counts weights twice, as pages of the file and as a repacked copy.
    """

    model: str
    split: tuple[int, ...]
    device: int
    load: Load
    predicted: tuple[int, int, int]
    margin: int
    logged: tuple[int, int, int]
    repacked: bool = False

    def errors(self, rounding: int = ROUNDING) -> dict[str, float]:
        """In percent of what was logged, less what rounding explains."""
        return {
            kind: 100 * max(0, abs(predicted - logged) - rounding) / logged
            for kind, predicted, logged in zip(KINDS, self.predicted, self.logged, strict=True)
            if logged and not (kind == "weights" and self.repacked)
        }

    @property
    def short_bytes(self) -> int:
        """How much more was logged than predicted, in all."""
        if self.repacked:
            return sum(self.logged[1:]) - sum(self.predicted[1:])
        return sum(self.logged) - sum(self.predicted)


def median_and_worst(errors: Iterable[float]) -> tuple[float, float]:
    known = list(errors)
    return (statistics.median(known), max(known)) if known else (0.0, 0.0)


INTRODUCTION = """\
# The memory model, measured

Made by `make memory-model` (`python -m tests.memory_grid --write docs/memory-model.md`); do not edit. Every point is
beside it in [memory-model.csv](memory-model.csv).

`sollol.memory` predicts from a GGUF header alone what each device of a plan needs. Here its figures stand against what
llama.cpp logs when it loads the same model with the same flags, flash attention left on "auto" as the agent leaves it.
Models are small, with real proportions and weights of zero (`tests/many_architectures.py`); backends are
`ggml-rpc-server`s on loopback. Weights and KV cache are sums; compute buffers come from rehearsing the engine's own graph
and allocator (`sollol.compute`). Errors are in percent of the logged size, after taking off what the log's rounding to
0.01 MiB explains.
"""

NOTES = """\
## What is not in these figures

- **GPUs.** None was at hand. Weights and KV follow the same rules there; compute buffers are rehearsed with the CPU's
  alignment, and what a GPU copies to help with layers on the CPU is a bound. The margin of 512 MiB per GPU is for drivers.
- **Repacked weights.** On a CPU with AVX2 the engine copies weights of Q4_0, Q4_K and some other types into another
  order. The log then counts them twice, as `CPU_REPACK` and as pages of the mapped file; the pages are read once and
  can be dropped, so the model counts them once. The weights of those rows are left out of the errors.
- **Other recurrences** (Mamba hybrids, gated delta nets, linear attention, RWKV 6) and layers with both attention and a
  state are counted with the operations of their relatives, and MLA with its compressed heads: not measured.
- **Sparse attention.** The keys of an indexer (DeepSeek 3.2, GLM DSA) are counted for every layer with a cache, in the
  cache's type. That the engine keeps just these, and what computing with them takes, is unverified.
- **Memory that the engine does not log**: the process itself, the vocabulary, work buffers of its threads, what a
  backend needs to receive a tensor. That is what the margin is for.
"""


def as_markdown(points: Sequence[Point]) -> str:
    return "\n".join([INTRODUCTION, _summary(points), _by_model(points), _selection(points), NOTES])


def _summary(points: Sequence[Point]) -> str:
    every = [error for point in points for error in point.errors().values()]
    median, worst = median_and_worst(every)
    raw = median_and_worst(error for point in points for error in point.errors(rounding=0).values())
    short = max(points, key=lambda point: point.short_bytes)
    loads = len({(point.model, point.split, point.load) for point in points})
    return (
        f"**{loads} loads, {len(points)} devices, {len(every)} sizes: median error {median:.2f} %, worst {worst:.2f} %** "
        f"(with the log's rounding left in: {raw[0]:.2f} % and {raw[1]:.2f} %).\n"
        f"**The most that was missing on any device: {_mib(max(0, short.short_bytes))} MiB, of a margin of "
        f"{_mib(short.margin)} MiB.**\n"
    )


def _by_model(points: Sequence[Point]) -> str:
    """Errors per model; the seed's estimate from the name stands beside the totals that were logged."""
    lines = [
        "| model | loads | weights median / worst % | KV | compute | total logged, MiB | the seed's estimate, MB |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for model, group in groupby(points, key=lambda point: point.model):
        own = list(group)
        totals: dict[tuple[tuple[int, ...], Load], int] = defaultdict(int)
        for point in own:
            totals[point.split, point.load] += sum(point.logged)
        cells = []
        for kind in KINDS:
            errors = [point.errors()[kind] for point in own if kind in point.errors()]
            cells.append("{:.2f} / {:.2f}".format(*median_and_worst(errors)))
        span = f"{_mib(min(totals.values()))} to {_mib(max(totals.values()))}"
        lines.append(f"| {model} | {len(totals)} | {' | '.join(cells)} | {span} | {estimate_mb(model)} |")
    return "\n".join(lines) + (
        "\n\nThe seed's estimate is 2048 MB for each billion of parameters in the name and 16384 MB when the name has "
        "none,\nwhatever the context, the slots or the quantization.\n"
    )


def _selection(points: Sequence[Point]) -> str:
    """Each split of each model once, with another load each time."""
    lines = [
        "## Device by device",
        "",
        "One load per split and model; MiB, predicted / logged. The first device is the coordinator's CPU.",
        "",
        "| model | context x slots, KV | layers on | weights | KV | compute | total error % |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    loads = list(dict.fromkeys(point.load for point in points))
    for turn, (_, group) in enumerate(groupby(points, key=lambda point: (point.model, point.split))):
        lines += [_row(point) for point in group if point.load == loads[turn % len(loads)]]
    return "\n".join(lines) + "\n"


def _row(point: Point) -> str:
    pairs = [f"{_mib(p)} / {_mib(q)}" for p, q in zip(point.predicted, point.logged, strict=True)]
    if point.repacked:
        pairs[0] += " (repacked)"
    place = "CPU" if not point.device else f"backend {point.device}"
    error = "" if point.repacked else f"{-100 * point.short_bytes / sum(point.logged):+.2f}"
    where = f"{place}: {point.split[point.device]}"
    return f"| {point.model} | {point.load} | {where} | {' | '.join(pairs)} | {error} |"


def as_csv(points: Sequence[Point]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["model", "layers_per_device", "device", "context", "parallel", "kv_type", "ubatch", "repacked"]
        + [f"{kind}_{side}" for kind in KINDS for side in ("predicted", "logged")]
    )
    for point in points:
        pairs = zip(point.predicted, point.logged, strict=True)
        load = point.load
        writer.writerow(
            [point.model, "+".join(map(str, point.split)), point.device]
            + [load.context, load.parallel, load.kv_type, load.ubatch, int(point.repacked)]
            + [size for pair in pairs for size in pair]
        )
    return out.getvalue()


def _mib(size: int) -> str:
    return f"{size / MIB:.2f}"
