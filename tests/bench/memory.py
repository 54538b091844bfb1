"""Resident memory of both daemons: idle, relaying, and with readers that stopped while their engines go on."""

import asyncio

from tests.bench.load import measure, stalled
from tests.bench.stack import MODEL, PATH, Stack

STALLED = 50


async def rows(stack: Stack, streams: int, seconds: float) -> list[dict[str, float | str]]:
    marks = stack.cpu_s()
    await asyncio.sleep(seconds)
    idle_cpu = {name: (used - marks[name]) / seconds * 100 for name, used in stack.cpu_s().items()}
    found = [_row("idle", stack, idle_cpu)]
    await measure(stack.front, path=PATH, model=MODEL, streams=streams, seconds=seconds)
    found.append(_row(f"after {streams} streams", stack))
    readers = await stalled(stack.front, path=PATH, model=MODEL, streams=STALLED)
    await asyncio.sleep(seconds)
    found.append(_row(f"{STALLED} stalled readers", stack))
    for reader in readers:
        reader.close()
    await asyncio.sleep(1)
    found.append(_row("after them", stack))
    return found


def _row(what: str, stack: Stack, cpu: dict[str, float] | None = None) -> dict[str, float | str]:
    used = cpu or {"agent": float("nan"), "head": float("nan")}
    return {
        "state": what,
        **stack.memory_mib(),
        "agent_cpu_%": used["agent"],
        "head_cpu_%": used["head"],
    }
