"""Asking the head: one connection per command, and one event loop for it."""

import argparse
import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from sollol.client import Client

T = TypeVar("T")


def ask(options: argparse.Namespace, question: Callable[[Client], Awaitable[T]]) -> T:
    """Run `question` against the head that `--head` names.

    Raises:
        SollolError: the head's refusal, or AGENT_UNREACHABLE when nobody answers there.
    """

    async def asked() -> T:
        async with Client(options.head) as client:
            return await question(client)

    return asyncio.run(asked())
