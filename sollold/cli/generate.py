"""`sollol run`: one prompt, its answer streamed to standard output, everything else to standard error."""

import argparse
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing

from sollol.client import Client
from sollol.errors import Reason, refuse
from sollol.inference import Message, Piece, Progress, Sampling

from sollold.cli.connection import ask
from sollold.cli.output import StatusLine


def run(options: argparse.Namespace) -> int:
    prompt = prompt_from(options.prompt, "" if sys.stdin.isatty() else sys.stdin.read())
    return ask(options, lambda client: _show(_pieces(client, options, prompt)))


def prompt_from(argument: str | None, piped: str) -> str:
    """The argument, then what was piped in.

    Raises:
        SollolError: INVALID_REQUEST when there is neither.
    """
    parts = [part for part in (argument or "", piped.rstrip("\n")) if part]
    if not parts:
        raise refuse(Reason.INVALID_REQUEST, 'no prompt: sollol run MODEL "prompt", or pipe it in')
    return "\n\n".join(parts)


def _pieces(client: Client, options: argparse.Namespace, prompt: str) -> AsyncGenerator[Progress | Piece, None]:
    sampling = Sampling(max_tokens=options.max_tokens, temperature=options.temperature, seed=options.seed)
    if options.raw:
        return client.complete(options.model, prompt, sampling)
    messages = [Message("user", prompt)]
    if options.system:
        messages.insert(0, Message("system", options.system))
    return client.chat(options.model, messages, sampling)


async def _show(pieces: AsyncGenerator[Progress | Piece, None]) -> int:
    status = StatusLine()
    ended_line = True
    try:
        async with aclosing(pieces):  # leaving early cancels the generation
            async for piece in pieces:
                if isinstance(piece, Progress):
                    status.show(progress_text(piece))
                elif piece.text:
                    status.clear()
                    sys.stdout.write(piece.text)
                    sys.stdout.flush()
                    ended_line = piece.text.endswith("\n")
                elif piece.reasoning:
                    status.show("thinking")
    finally:
        status.clear()
        if not ended_line:
            sys.stdout.write("\n")
    return 0


def progress_text(progress: Progress) -> str:
    where = f" on {progress.node_id}" if progress.node_id else ""
    percent = f" {progress.percent:.0f} %" if progress.state == "loading" else ""
    nodes = ", ".join(f"{node.node_id} {node.percent:.0f} %" for node in progress.nodes)
    return f"{progress.state}{where}{percent}{f' ({nodes})' if nodes else ''}"
