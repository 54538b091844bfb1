"""`sollol cordon`, `uncordon`, `drain`: what an operator does to nodes."""

import argparse
import asyncio
import sys
from collections.abc import Sequence
from contextlib import aclosing

from sollol.client import Client
from sollol.report import Pool

from sollold.cli.connection import ask
from sollold.cli.output import StatusLine

TIMED_OUT = 3


def cordon(options: argparse.Namespace) -> int:
    ask(options, lambda client: client.cordon(options.node))
    sys.stderr.write(f"{options.node} takes no new pools; `sollol uncordon {options.node}` undoes it\n")
    return 0


def uncordon(options: argparse.Namespace) -> int:
    ask(options, lambda client: client.uncordon(options.node))
    sys.stderr.write(f"{options.node} takes pools again\n")
    return 0


def drain(options: argparse.Namespace) -> int:
    """Exit status 3 when time is up first: the node goes on draining then."""
    return ask(options, lambda client: _drained(client, options.node, options.timeout))


async def _drained(client: Client, node_id: str, timeout_s: int | None) -> int:
    status = StatusLine()
    left: tuple[Pool, ...] = ()
    try:
        async with asyncio.timeout(timeout_s), aclosing(client.drain(node_id)) as steps:
            async for left in steps:
                status.show(left_text(left))
    except TimeoutError:
        status.clear()
        sys.stderr.write(
            f"{node_id} is not empty after {timeout_s} s, and goes on draining: {left_text(left)}\n"
            f"  `sollol drain {node_id}` waits again, `sollol unload MODEL` stops at once, "
            f"`sollol uncordon {node_id}` undoes it\n"
        )
        return TIMED_OUT
    finally:
        status.clear()
    sys.stderr.write(f"{node_id} is empty; `sollol uncordon {node_id}` lets it take pools again\n")
    return 0


def left_text(left: Sequence[Pool]) -> str:
    pools = (f"{pool.instance.instance_id} on {pool.node_id} ({pool.instance.active_streams} streams)" for pool in left)
    return f"left: {', '.join(pools) or 'nothing'}"
