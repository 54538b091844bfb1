"""`sollol place`: a dry run, asked of the head or decided here over a node list."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sollol.errors import SURFACES, Reason, refuse
from sollol.report import Decision, PlacementWish

from sollold.cli.output import print_json, print_table

if TYPE_CHECKING:
    from sollol.client import Client

MAX_LIST_BYTES = 64 << 20


def wish_from(options: argparse.Namespace) -> PlacementWish:
    return PlacementWish(
        model=options.model,
        policy=options.policy,
        context_per_slot=options.context,
        parallel=options.parallel,
        kv_type=options.kv_type,
        require=tuple(options.require),
        prefer=tuple(options.prefer),
        min_cpus=options.min_cpus,
        min_memory_bytes=options.min_memory,
        pinned_node=options.pin,
        local=options.local,
        strategy=options.strategy,
        max_nodes=options.max_nodes,
        backends_per_pool=options.backends_per_pool,
        allow_reduced_context=options.allow_reduced_context,
    )


def place(options: argparse.Namespace) -> int:
    """Exit status 0 when there is a place, else that of the refusal's reason."""
    if options.what_if:
        return _compare(options)
    from sollold.placement.explain import as_json, explain

    (decision,) = _decided(options, [wish_from(options)])
    if options.json:
        print_json(as_json(decision))
    else:
        sys.stdout.write(explain(decision) + "\n")
    return _exit_code(decision)


def _compare(options: argparse.Namespace) -> int:
    """Exit status 0 when any variant has a place, else that of what was asked."""
    from sollold.cli.variants import variants
    from sollold.placement.compare import COLUMNS, compared
    from sollold.placement.explain import as_json

    named = variants(wish_from(options), options.what_if)
    decisions = _decided(options, [wish for _, wish in named])
    rows = [(name, decision) for (name, _), decision in zip(named, decisions, strict=True)]
    if options.json:
        listed = [{"variant": name, **as_json(decision)} for name, decision in rows]
        print_json({"schema": "sollol.what-if/v1", "decisions": listed})
    else:
        print_table(COLUMNS, compared(rows))
    return 0 if any(decision.refusal is None for decision in decisions) else _exit_code(decisions[0])


def _exit_code(decision: Decision) -> int:
    return 0 if decision.refusal is None else SURFACES[decision.refusal.reason].exit_code


def _decided(options: argparse.Namespace, wishes: Sequence[PlacementWish]) -> list[Decision]:
    return _offline(options, wishes) if options.nodes else _asked(options, wishes)


def _offline(options: argparse.Namespace, wishes: Sequence[PlacementWish]) -> list[Decision]:
    import msgspec

    from sollold.placement import PlacementDefaults, decide
    from sollold.placement.offline import nodes_from_json

    if any(wish.policy == "fit" for wish in wishes):
        message = (
            "policy fit needs the model's GGUF header, which no node list has: leave the policy out, or ask a head"
        )
        raise refuse(Reason.INVALID_REQUEST, message)
    if options.nodes == "-":
        text = sys.stdin.buffer.read(MAX_LIST_BYTES)
    else:
        with Path(options.nodes).open("rb") as file:
            text = file.read(MAX_LIST_BYTES)
    nodes = nodes_from_json(text)
    classic = [msgspec.structs.replace(wish, policy="classic") for wish in wishes]
    return [decide(wish, nodes, PlacementDefaults(), files_known=False) for wish in classic]


def _asked(options: argparse.Namespace, wishes: Sequence[PlacementWish]) -> list[Decision]:
    from sollold.cli.connection import ask

    async def decisions(client: "Client") -> list[Decision]:
        return [await client.place(wish) for wish in wishes]

    return ask(options, decisions)
