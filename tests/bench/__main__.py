"""`python -m tests.bench [relay|memory|decision]`, all three by default. README.md beside this explains the figures."""

import argparse
import asyncio
import json
import os
import tempfile
from pathlib import Path

from tests.bench import decision, memory, relay
from tests.bench.stack import daemons

Rows = list[dict[str, float | str]]
SECTIONS = ("memory", "relay", "decision")


def run(section: str, options: argparse.Namespace) -> Rows:
    if section == "decision":
        return decision.rows(options.nodes)
    with (
        tempfile.TemporaryDirectory(prefix="sollol-bench-", dir="/tmp") as directory,  # a short path: for sockets
        daemons(Path(directory), options.profile if section == "relay" else None) as stack,
    ):
        if section == "memory":
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
    parser.add_argument("section", nargs="*", help=f"of {', '.join(SECTIONS)}; all of them by default")
    parser.add_argument("--streams", type=_numbers, default=[1, 50, 200], help="relay: 1,50,200")
    parser.add_argument("--nodes", type=_numbers, default=[10, 1000], help="decision: 10,1000")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--profile", type=Path, help="relay: leave agent.prof and head.prof in this directory")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if unknown := set(options.section) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    found: dict[str, Rows] = {}
    for section in options.section or SECTIONS:
        found[section] = run(section, options)
        if not options.json:
            print(f"{section}\n{table(found[section])}\n", flush=True)
    if options.json:
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
