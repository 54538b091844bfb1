"""`sollol load`, `unload`, `logs`: what an operator does to pools."""

import argparse
import sys
from contextlib import aclosing

import msgspec
from sollol.client import Client
from sollol.inference import Progress
from sollol.report import Pool

from sollold.cli.connection import ask
from sollold.cli.generate import progress_text
from sollold.cli.output import StatusLine, print_json
from sollold.cli.place import wish_from


def load(options: argparse.Namespace) -> int:
    """Prints every ready pool of the model."""
    pools = ask(options, lambda client: _loaded(client, options))
    if options.json:
        print_json({"schema": "sollol.load/v1", "pools": msgspec.to_builtins(pools)})
        return 0
    for pool in pools:
        instance = pool.instance
        sys.stdout.write(
            f"{instance.model}: pool {instance.pool_number} is ready on {pool.node_id} as {instance.instance_id}\n"
        )
    return 0


async def _loaded(client: Client, options: argparse.Namespace) -> tuple[Pool, ...]:
    status = StatusLine()

    def show(progress: Progress) -> None:
        status.show(progress_text(progress))

    try:
        return await client.load_pools(wish_from(options), options.pools, on_progress=show)
    finally:
        status.clear()


def unload(options: argparse.Namespace) -> int:
    stopped = ask(options, lambda client: client.unload(options.model))
    if options.json:
        print_json({"schema": "sollol.unload/v1", "instance_ids": list(stopped)})
    elif stopped:
        sys.stdout.write(f"stopped {', '.join(stopped)}\n")
    else:
        sys.stderr.write(f"no pool of {options.model} was running\n")
    return 0


def logs(options: argparse.Namespace) -> int:
    return ask(options, lambda client: _logged(client, options))


async def _logged(client: Client, options: argparse.Namespace) -> int:
    async with aclosing(client.tail_log(options.pool, lines=options.lines, follow=options.follow)) as lines:
        async for line in lines:
            sys.stdout.write(line + "\n")
            if options.follow:
                sys.stdout.flush()
    return 0
