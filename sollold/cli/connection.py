"""Asking the head: one connection per command, and one event loop for it."""

import argparse
import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import TypeVar

from sollol.client import Client
from sollol.pki_directories import users_tls_directory

T = TypeVar("T")


def ask(options: argparse.Namespace, question: Callable[[Client], Awaitable[T]]) -> T:
    """Run `question` against the head that `--head` names, with the key in `$SOLLOL_KEY` if there is one.

    Raises:
        SollolError: the head's refusal, or AGENT_UNREACHABLE when nobody answers there.
    """

    async def asked() -> T:
        tls_dir = users_tls_directory(options.tls_dir, os.environ)
        async with Client(options.head, tls_dir=tls_dir, key=os.environ.get("SOLLOL_KEY", "")) as client:
            return await question(client)

    return asyncio.run(asked())
