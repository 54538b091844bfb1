"""The command line: its words, their help, and which function runs each command."""

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence

from sollol import __version__

from sollold.cli.pki_arguments import add_join, add_pki

DEFAULT_HEAD = "127.0.0.1:7461"
MOST, MOST_BYTES = 2**31 - 1, 2**63 - 1  # what the contract's numbers hold
EXIT_CODES = """\
exit codes: 0 done · 1 bug · 2 wrong usage or request · 3 head or node unavailable · 4 not found · 5 refused
(no room, not now) · 6 an engine or a child process broke · 130 interrupted"""

Subparsers = argparse._SubParsersAction  # noqa: SLF001 - argparse has no public name for it


def run(argv: Sequence[str]) -> int:
    """Parse, run one command, and return the exit status."""
    options = parser().parse_args(argv)
    try:
        return _run(options)
    except BrokenPipeError:
        # Whoever read our output (`| head`) has gone: point stdout at nothing so that the exit does not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if options.debug:
            raise
        from sollold.cli.failure import report_failure

        return report_failure(error)


def _run(options: argparse.Namespace) -> int:
    status = _command(options.command)(options)
    sys.stdout.flush()  # here, where it may break, and not at exit
    return status


def _command(path: str) -> Callable[[argparse.Namespace], int]:
    module, function = path.split(":")
    found: Callable[[argparse.Namespace], int] = getattr(importlib.import_module(module), function)
    return found


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="sollol",
        description="Run big language models on the small machines you already own.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"sollol {__version__}")
    top.add_argument(
        "--head",
        metavar="HOST:PORT",
        default=os.environ.get("SOLLOL_HEAD") or DEFAULT_HEAD,
        help="the head's gRPC address (default: $SOLLOL_HEAD, else %(default)s)",
    )
    top.add_argument(
        "--tls-dir",
        metavar="DIR",
        default=os.environ.get("SOLLOL_TLS_DIR", "auto"),
        help="your certificate, for a head that asks for one; '' for none (default: $SOLLOL_TLS_DIR, else pki/admin or "
        "pki/client in /etc/sollol and ~/.config/sollol)",
    )
    top.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    _add_up(commands)
    _add_reads(commands)
    _add_place(commands)
    _add_run(commands)
    _add_pool_commands(commands)
    _add_engine(commands)
    _add_systemd(commands)
    _add_keys(commands)
    _add_node_commands(commands)
    add_pki(commands)
    add_join(commands)
    return top


def _add(
    commands: "Subparsers[argparse.ArgumentParser]", name: str, command: str, text: str
) -> argparse.ArgumentParser:
    added = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    added.set_defaults(command=f"sollold.cli.{command}")
    return added


def _add_up(commands: "Subparsers[argparse.ArgumentParser]") -> None:
    up = _add(commands, "up", "up:up", "run everything on this machine, in the foreground, until Ctrl-C")
    up.add_argument(
        "--models", metavar="DIR", action="append", default=[], help="directory with GGUF files; repeatable"
    )
    up.add_argument("--agents", metavar="N", type=_positive, default=1, help="agents to start; unequal when several")
    up.add_argument("--engine", metavar="PATH", default="", help="a llama-server to use instead of the one found")
    up.add_argument("--http-port", metavar="PORT", type=_port, default=7460, help="default: %(default)s")
    up.add_argument("--grpc-port", metavar="PORT", type=_port, default=7461, help="default: %(default)s")
    up.add_argument(
        "--agent-port",
        metavar="PORT",
        type=_port,
        default=7462,
        help="of the first agent, the others follow: %(default)s",
    )
    up.add_argument("--redis-url", metavar="URL", default="", help="a running Redis to use instead of a private one")
    up.add_argument("--mqtt-url", metavar="URL", default="", help="an MQTT broker to tell everything, mqtt://HOST")
    up.add_argument("--mqtt-inference", action="store_true", help="answer requests that devices publish there")
    up.add_argument("--state", metavar="DIR", default="", help="state and logs (default: the user's state directory)")
    up.add_argument("-v", "--verbose", action="store_true", help="show every log line of the daemons")


def _add_reads(commands: "Subparsers[argparse.ArgumentParser]") -> None:
    for name, text in (
        ("nodes", "list nodes: memory, devices, engine, what runs there"),
        ("links", "list the links between nodes that agents have measured"),
        ("models", "list the models that some node can load"),
        ("pools", "list running replicas of models"),
    ):
        _add_json(_add(commands, name, f"reads:{name}", text))


def _add_place(commands: "Subparsers[argparse.ArgumentParser]") -> None:
    place = _add(commands, "place", "place:place", "show where a model would run and why; changes nothing")
    place.add_argument("model", metavar="MODEL")
    place.add_argument(
        "--nodes",
        metavar="FILE",
        help='without a head, over a JSON list of {"host", "cpu_ram_mb", "gpu_vram_mb", "has_gpu"}; "-" is standard '
        "input; policy classic, since such a list knows no model file",
    )
    place.add_argument(
        "--what-if",
        metavar="NAME=VALUE",
        nargs="+",
        action="append",
        default=[],
        help="compare with this variant, as `--what-if context=32768 kv=q8_0`; repeatable, a row each; names: "
        "context, parallel, kv, policy, strategy, max_nodes, backends, pin",
    )
    _add_wish(place)
    _add_json(place)


def _add_wish(command: argparse.ArgumentParser) -> None:
    command.add_argument("--policy", choices=("fit", "classic"), help="default: the head's")
    command.add_argument("--strategy", choices=("pack", "spread"), help="between equally good nodes")
    command.add_argument("--context", metavar="TOKENS", type=_positive, help="context of each parallel request")
    command.add_argument("--parallel", metavar="N", type=_positive, help="requests to generate for at the same time")
    command.add_argument("--kv-type", metavar="TYPE", help="f16, q8_0, q4_0, ...")
    command.add_argument(
        "--require", metavar="LABEL", action="append", default=[], help="name or name=value; repeatable"
    )
    command.add_argument("--prefer", metavar="LABEL", action="append", default=[], help="wins a tie; repeatable")
    command.add_argument("--min-cpus", metavar="N", type=_positive)
    command.add_argument("--min-memory", metavar="BYTES", type=_bytes, help="free on the node")
    command.add_argument("--pin", metavar="NODE", help="this node or none")
    command.add_argument("--local", action="store_true", help="only the head's own host")
    command.add_argument(
        "--max-nodes", metavar="N", type=_positive, help="most nodes that hold the model together; 1: never split it"
    )
    command.add_argument(
        "--backends-per-pool", metavar="N", type=_count, help="exactly so many backends (default: what is fastest)"
    )
    command.add_argument(
        "--allow-reduced-context",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="take the longest context that fits where the asked one does not",
    )


def _add_run(commands: "Subparsers[argparse.ArgumentParser]") -> None:
    run_ = _add(commands, "run", "generate:run", "ask a model and stream its answer")
    run_.add_argument("model", metavar="MODEL")
    run_.add_argument("prompt", metavar="PROMPT", nargs="?", help="standard input is used, or appended, when piped")
    run_.add_argument("--max-tokens", metavar="N", type=_positive)
    run_.add_argument("--temperature", metavar="T", type=float)
    run_.add_argument("--seed", metavar="N", type=int)
    run_.add_argument("--system", metavar="TEXT", help="system message")
    run_.add_argument("--raw", action="store_true", help="continue the prompt as it is, without the chat template")


def _add_pool_commands(commands: "Subparsers[argparse.ArgumentParser]") -> None:
    load = _add(commands, "load", "operate:load", "load a model now and wait until it is ready")
    load.add_argument("model", metavar="MODEL")
    load.add_argument(
        "--pools", metavar="N", type=_positive, default=1, help="replicas to bring up side by side: %(default)s"
    )
    _add_wish(load)
    _add_json(load)
    unload = _add(commands, "unload", "operate:unload", "stop every pool of a model")
    unload.add_argument("model", metavar="MODEL")
    _add_json(unload)
    logs = _add(commands, "logs", "operate:logs", "show the engine's log of a pool, or of a model's newest pool")
    logs.add_argument("pool", metavar="POOL_OR_MODEL")
    logs.add_argument("-n", "--lines", metavar="N", type=_positive, default=50, help="default: %(default)s")
    logs.add_argument("-f", "--follow", action="store_true", help="go on with new lines until Ctrl-C")


def _add_engine(commands: "Subparsers[argparse.ArgumentParser]") -> None:
    engine = _add(commands, "engine", "engine:engine", "build llama.cpp for this machine, or show the engine in use")
    engine.add_argument("action", choices=("build", "show"))
    engine.add_argument("rest", metavar="...", nargs=argparse.REMAINDER, help="passed on; try `build --help`")


def _add_systemd(commands: "Subparsers[argparse.ArgumentParser]") -> None:
    systemd = commands.add_parser("systemd", help="make the daemons services", description="Make the daemons services.")
    actions = systemd.add_subparsers(metavar="ACTION", required=True)
    for name, text in (("install", "write units, user and directories; safe to repeat"), ("uninstall", "remove them")):
        action = _add(actions, name, f"systemd:{name}", text)
        action.add_argument("--head", action="store_true", help="the daemon that takes requests")
        action.add_argument("--agent", action="store_true", help="the daemon of each node")
        action.add_argument("--user", action="store_true", help="services of your own, without root")
        action.add_argument("--prefix", metavar="DIR", default="", help="write below DIR, and touch nothing else")


def _add_keys(commands: "Subparsers[argparse.ArgumentParser]") -> None:
    keys = commands.add_parser("keys", help="say who may use the HTTP API", description="Say who may use the HTTP API.")
    actions = keys.add_subparsers(metavar="ACTION", required=True)
    add = _add(actions, "add", "keys:add", "make a key and print it, once")
    add.add_argument("name", metavar="NAME", help="whose it is; for lists and logs")
    add.add_argument(
        "--models", metavar="GLOB", nargs="+", action="extend", default=[], help="only models whose name matches one"
    )
    add.add_argument("--concurrency", metavar="N", type=_positive, help="most requests at the same time")
    add.add_argument("--tokens-per-minute", metavar="N", type=_positive, help="of prompts and answers together")
    add.add_argument("--expires", metavar="DAYS", type=_positive, help="days until it is refused")
    show = _add(actions, "list", "keys:show", "list keys and their limits; the keys themselves are nowhere")
    _add_json(show)
    revoke = _add(actions, "revoke", "keys:revoke", "refuse a key from now on")
    revoke.add_argument("name", metavar="NAME")
    for action in (add, show, revoke):
        action.add_argument("--file", metavar="PATH", default="", help="default: keys_file of this machine's head")


def _add_node_commands(commands: "Subparsers[argparse.ArgumentParser]") -> None:
    for name, text in (
        ("cordon", "keep new pools away from a node, over restarts too"),
        ("uncordon", "let a node take pools again"),
        ("drain", "cordon a node and stop its pools as their streams end"),
    ):
        command = _add(commands, name, f"cordon:{name}", text)
        command.add_argument("node", metavar="NODE")
    command.add_argument("--timeout", metavar="SECONDS", type=_positive, help="leave after so long, with status 3")


def _add_json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print one JSON value with a `schema` field")


def _positive(text: str) -> int:
    return _within(text, 1, MOST)


def _count(text: str) -> int:
    return _within(text, 0, MOST)


def _bytes(text: str) -> int:
    return _within(text, 1, MOST_BYTES)


def _within(text: str, least: int, most: int) -> int:
    if not text.strip().isdecimal() or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from {least} to {most}")
    return int(text)


def _port(text: str) -> int:
    return _within(text, 1, 65535)
