"""The words of `sollol pki` and `sollol join`."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001 - argparse has no public name

_ROLES = ("agent", "head", "client", "admin")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_MOST_DAYS = 3650
_LAST_PORT = 65_535


def add_pki(commands: "Subparsers") -> None:
    text = "make and renew certificates: who may speak to whom in this cluster"
    pki = commands.add_parser("pki", help=text, description=text[0].upper() + text[1:] + ".")
    actions = pki.add_subparsers(metavar="ACTION", required=True)
    init = _add(actions, "init", "make the cluster's authority, and certificates for this head and for you")
    init.add_argument("--cluster", metavar="NAME", default="home", help="default: %(default)s")
    init.add_argument("--head-id", metavar="ID", default="", help="the head's name (default: this host's)")
    issue = _add(actions, "issue", "make a key and a certificate")
    issue.add_argument("role", choices=_ROLES)
    issue.add_argument("id", metavar="ID", help="the name: of a node, a head or a person")
    issue.add_argument("--out", metavar="DIR", default="", help="default: issued/ROLE-ID beside the authority")
    _add_days(issue)
    rotate = _add(actions, "rotate", "renew certificates in place: same names, new keys; daemons follow by themselves")
    rotate.add_argument("directories", metavar="DIR", nargs="*", help="default: every identity on this machine")
    rotate.add_argument(
        "--authority",
        choices=("add", "switch", "drop"),
        help="replace the authority itself, in three steps: trust a second one, have it sign, drop the first",
    )
    rotate.add_argument("--force", action="store_true", help="drop although somebody would be locked out")
    _add_days(rotate)
    revoke = _add(actions, "revoke", "refuse every certificate that a name has got so far")
    revoke.add_argument("id", metavar="ID")
    revoke.add_argument("--role", choices=_ROLES, default="agent", help="default: %(default)s")
    _add(actions, "show", "list the identities on this machine and when they end")
    _add_invite(actions)


def _add_invite(actions: "Subparsers") -> None:
    invite = _add(actions, "invite", "let one machine join: prints the line to run there, and waits for it")
    invite.add_argument("--node", metavar="ID", help="the name it gets (default: it names itself, after its host)")
    invite.add_argument("--role", choices=_ROLES, default="agent", help="default: %(default)s")
    invite.add_argument("--address", metavar="HOST", help="where it reaches this machine (default: the main address)")
    invite.add_argument("--port", metavar="PORT", type=_port, default=7463, help="default: 7463")
    invite.add_argument("--ttl", metavar="TIME", type=_seconds, default=900.0, help="such as 90s or 2h (default: 15m)")
    invite.add_argument("--redis-url", metavar="URL", help="the registry (default: Redis on this machine)")
    _add_days(invite)


def add_join(commands: "Subparsers") -> None:
    text = "make this machine a node of a cluster, with the token of `sollol pki invite`"
    join = commands.add_parser("join", help=text, description=text[0].upper() + text[1:] + ".")
    join.add_argument("token", metavar="TOKEN")
    join.add_argument(
        "--node-id", metavar="ID", default="", help="default: what the invitation says, else this host's name"
    )
    _add_place(join)
    join.set_defaults(command="sollold.cli.pki:join")


def _add(actions: "Subparsers", name: str, text: str) -> argparse.ArgumentParser:
    added = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    added.set_defaults(command=f"sollold.cli.pki:{name}")
    _add_place(added)
    return added


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= _LAST_PORT:
        raise argparse.ArgumentTypeError(f"{text[:20]!r} is not a port, 1 to {_LAST_PORT}")
    return int(text)


def _add_place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dir", metavar="DIR", default="", help="default: /etc/sollol/pki as root, else ~/.config/…")


def _add_days(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--days", metavar="N", type=_days, default=90, help="how long it lasts (default: %(default)s)")


def _days(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= _MOST_DAYS:
        raise argparse.ArgumentTypeError(f"{text} is not a number of days from 1 to {_MOST_DAYS}")
    return int(text)


def _seconds(text: str) -> float:
    number, unit = text[:-1], text[-1:]
    if not number.isdecimal() or unit not in _UNITS or not 1 <= int(number) * _UNITS[unit] <= 86_400:
        raise argparse.ArgumentTypeError(f"{text} is not a time such as 90s, 15m or 2h, of a day at most")
    return float(int(number) * _UNITS[unit])
