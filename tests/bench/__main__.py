"""`python -m tests.bench relay|memory|decision`. README.md beside this says how to read the figures."""

import argparse
import asyncio
import json
import os
import tempfile
from pathlib import Path

from tests.bench import decision, memory, relay
from tests.bench.stack import pieces

Rows = list[dict[str, float | str]]


def run(options: argparse.Namespace) -> Rows:
    if options.what == "decision":
        return decision.rows(options.nodes)
    with tempfile.TemporaryDirectory(prefix="sollol-bench-") as directory, pieces(Path(directory)) as stack:
        if options.what == "memory":
            return asyncio.run(memory.rows(stack, max(options.streams), options.seconds))
        return [asyncio.run(relay.row(stack, streams, options.seconds)) for streams in options.streams]


def table(rows: Rows) -> str:
    texts = [[_text(content) for content in row.values()] for row in rows]
    widths = [max(len(name), *map(len, column)) for name, column in zip(rows[0], zip(*texts, strict=True), strict=True)]
    lines = [list(rows[0]), *texts]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in lines)


def _text(content: float | str) -> str:
    return f"{content:.2f}" if isinstance(content, float) else str(content)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("what", choices=["relay", "memory", "decision"])
    parser.add_argument("--streams", type=_numbers, default=[1, 50, 200], help="relay: 1,50,200")
    parser.add_argument("--nodes", type=_numbers, default=[10, 1000], help="decision: 10,1000")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = run(options)
    print(json.dumps(rows, indent=1) if options.json else table(rows))


if __name__ == "__main__":
    main()
