"""`sollol place`: a dry run, asked of the head or decided here over a node list."""

import argparse
import sys
from pathlib import Path

from sollol.errors import SURFACES, Reason, refuse
from sollol.report import Decision, PlacementWish

from sollold.cli.output import print_json

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
    from sollold.placement.explain import as_json, explain

    decision = _offline(options) if options.nodes else _asked(options)
    if options.json:
        print_json(as_json(decision))
    else:
        sys.stdout.write(explain(decision) + "\n")
    return 0 if decision.refusal is None else SURFACES[decision.refusal.reason].exit_code


def _offline(options: argparse.Namespace) -> Decision:
    import msgspec

    from sollold.placement import PlacementDefaults, decide
    from sollold.placement.offline import nodes_from_json

    if options.policy == "fit":
        message = "policy fit needs the model's GGUF header, which no node list has: leave --policy off, or ask a head"
        raise refuse(Reason.INVALID_REQUEST, message)
    if options.nodes == "-":
        text = sys.stdin.buffer.read(MAX_LIST_BYTES)
    else:
        with Path(options.nodes).open("rb") as file:
            text = file.read(MAX_LIST_BYTES)
    wish = msgspec.structs.replace(wish_from(options), policy="classic")
    return decide(wish, nodes_from_json(text), PlacementDefaults(), files_known=False)


def _asked(options: argparse.Namespace) -> Decision:
    from sollold.cli.connection import ask

    return ask(options, lambda client: client.place(wish_from(options)))
