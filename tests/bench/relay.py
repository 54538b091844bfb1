"""What SOLLOL adds to a token: time and CPU, against asking the source directly in the same run."""

from tests.bench.load import measure
from tests.bench.stack import MODEL, PATH, Stack


async def row(stack: Stack, streams: int, seconds: float) -> dict[str, float | str]:
    marks: list[dict[str, float]] = []
    wanted = {"path": PATH, "model": MODEL, "streams": streams, "seconds": seconds}
    direct = await measure(stack.direct, **wanted)
    relayed = await measure(stack.front, **wanted, between=lambda: marks.append(stack.cpu_s()))
    tokens = max(1, len(relayed.delays_ns))
    agent_us, head_us = ((marks[1][name] - marks[0][name]) / tokens * 1e6 for name in ("agent", "head"))
    return {
        "streams": streams,
        "failed": direct.failed + relayed.failed,
        "tokens_per_s": tokens / seconds,
        "direct_p50_ms": direct.percentile_ms(0.5),
        "added_p50_ms": relayed.percentile_ms(0.5) - direct.percentile_ms(0.5),
        "direct_p99_ms": direct.percentile_ms(0.99),
        "added_p99_ms": relayed.percentile_ms(0.99) - direct.percentile_ms(0.99),
        "agent_us/token": agent_us,
        "head_us/token": head_us,
        "both_us/token": agent_us + head_us,
    }
