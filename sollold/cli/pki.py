"""`sollol pki …` and `sollol join`: the cluster's authority, its certificates, and machines that are invited."""

import argparse
import asyncio
import os
import socket
import sys
import time
import tomllib
from pathlib import Path

from sollol import log
from sollol.errors import Reason, refuse
from sollol.identity import Role, checked
from sollol.pki_directories import SYSTEM, user_pki

from sollold.cli.output import print_table
from sollold.pki.invitations import Invitation
from sollold.pki.invite import Invited, Inviter
from sollold.pki.join import join as ask_to_join
from sollold.pki.join import role_of
from sollold.pki.messages import Answer
from sollold.pki.store import Held, Store, host_id, named, place, write

_DAY_S = 86_400


def init(options: argparse.Namespace) -> int:
    store = _store(options)
    head = named(options.cluster, Role.HEAD, options.head_id or host_id())
    operator = _operator(options.cluster)
    store.init(options.cluster)
    store.issue(Role.HEAD, head.node_id, store.base / Role.HEAD)
    store.issue(Role.ADMIN, operator, store.base / Role.ADMIN)
    print(f"The authority of cluster {options.cluster} is in {store.directory}: whoever has its ca.key is everybody.")
    print(f"This head's certificate is in {store.base / Role.HEAD}, yours is in {store.base / Role.ADMIN}.")
    print("`sollol pki invite` adds a machine.")
    return 0


def _operator(cluster: str) -> str:
    """The user's name; `operator` for one that cannot stand in a certificate, as directories' `user@domain`."""
    name = os.environ.get("SUDO_USER") or os.environ.get("USER") or "operator"
    try:
        return checked(cluster, Role.ADMIN, name).node_id
    except ValueError:
        return "operator"


def issue(options: argparse.Namespace) -> int:
    store, role = _store(options), Role(options.role)
    out = Path(options.out) if options.out else store.base / "issued" / f"{role}-{options.id}"
    made = store.issue(role, options.id, out.absolute(), days=options.days)
    print(f"{made.identity} until {_day(made.not_after_s)}: {out}")
    print(f"To use it on another machine, move the directory there, as {SYSTEM / role}.")
    return 0


def rotate(options: argparse.Namespace) -> int:
    store = _store(options)
    if options.authority == "add":
        store.add_authority()
        print("A second authority is trusted now where this machine's daemons are. Have every other machine renew its")
        print(
            "certificate (`sollol pki invite --node ID` here, `sollol join` there), then `rotate --authority switch`."
        )
        return 0
    if options.authority == "drop":
        store.drop_authority(force=options.force)
        print("This machine's daemons trust the former authority no more. Every other machine does until it renews its")
        print("certificate once again (`sollol pki invite --node ID` here, `sollol join` there).")
        return 0
    if options.authority == "switch":
        store.switch_authority()
    directories = [Path(item).absolute() for item in options.directories] or _renewable(store)
    for held in store.rotate(directories, days=options.days):
        print(f"renewed {held.certificate.identity} until {_day(held.certificate.not_after_s)}: {held.directory}")
    print("Daemons take new certificates by themselves; nothing has to be restarted.")
    if options.authority == "switch":
        print("Have every other machine renew its certificate once more: `--authority drop` ends those of before.")
    return 0


def _renewable(store: Store) -> list[Path]:
    """Every identity of this machine but those that are revoked: who shut them out did not mean for a while."""
    revoked, found = store.revoked().serials, []
    for held in store.held():
        if held.certificate.serial in revoked:
            print(f"left alone, since it is revoked: {held.certificate.identity}: {held.directory}")
        else:
            found.append(held.directory)
    return found


def revoke(options: argparse.Namespace) -> int:
    store = _store(options)
    serials = store.revoke(Role(options.role), options.id)
    print(
        f"revoked {len(serials)} certificate(s) of {options.role} {options.id}; daemons of this machine follow at once."
    )
    print("Heads and agents hand the list on: one of them has to run here, or get a copy of")
    print(f"{store.directory / 'revoked'} into its tls_dir.")
    return 0


def show(options: argparse.Namespace) -> int:
    store = _store(options)
    held = store.held()
    if not held and not store.exists():
        raise refuse(Reason.CERTIFICATE_UNREADABLE, f"nothing in {store.base} that this user can read")
    revoked = store.revoked().serials
    print_table(("WHO", "ROLE", "CLUSTER", "EXPIRES", "SERIAL", "DIRECTORY"), [_row(item, revoked) for item in held])
    return 0


def invite(options: argparse.Namespace) -> int:
    """Exit status 0 once somebody has joined, 3 when the time was over."""
    log.configure("info", "auto")
    address = options.address or _own_address()
    url = f"redis://{address}:6379/0" if options.redis_url is None else options.redis_url
    terms = Invited(host=address, port=options.port, ttl_s=options.ttl, days=options.days, redis_url=url)
    invitation = Invitation(secret_hash="", expires_s=0, role=Role(options.role), node_id=options.node or "")

    async def serve() -> int:
        async with Inviter(_store(options), invitation, terms) as inviter:
            print(f"sollol join {inviter.token}", flush=True)
            sys.stderr.write(f"Run that line on the new machine within {options.ttl:.0f} s; waiting for it …\n")
            who = await inviter.joined()
        if who is None:
            raise refuse(Reason.INVITATION_EXPIRED, "nobody has joined in time")
        sys.stderr.write(f"{who} has joined.\n")
        return 0

    return asyncio.run(serve())


def join(options: argparse.Namespace) -> int:
    answer, key = asyncio.run(ask_to_join(options.token, options.node_id or host_id()))
    base, role = _base(options), role_of(answer)
    directory = base / role
    base.mkdir(parents=True, exist_ok=True)
    base.chmod(0o755)  # daemons pass through it to what is theirs
    place(directory, role, key=key, chain=answer.certificate.encode(), ca=answer.ca.encode())
    print(
        f"This machine is {role} {answer.node_id} of cluster {answer.cluster} now; its certificate is in {directory}."
    )
    if role is Role.AGENT:
        settings, user = base.parent / "agent.toml", "" if base == SYSTEM else " --user"
        _configure(settings, answer)
        print(
            f"What is left: `sollol systemd install --agent{user}`, then `systemctl{user} enable --now sollol-agent`;"
        )
        print(f"or by hand: `sollol-agent --config {settings}`.")
    return 0


def _configure(path: Path, answer: Answer) -> None:
    """Write what an agent must know, unless somebody has set something already; an example file sets nothing."""
    former = path.read_text() if path.exists() else ""
    wanted = {"node_id": answer.node_id, "host": answer.host, "listen": answer.host, "redis_url": answer.redis_url}
    lines = "".join(f'{name} = "{value}"\n' for name, value in wanted.items())
    if tomllib.loads(former):
        print(f"{path} has settings already and is left as it is. They should agree with:\n{lines}", end="")
        return
    if path.exists():
        path.write_text(f"{former}\n{lines}")
    else:  # the registry's address may hold a password
        write(path, lines.encode(), 0o640)
    print(f"Its settings are in {path}.")


def _base(options: argparse.Namespace) -> Path:
    if options.dir:
        return Path(options.dir).expanduser().absolute()
    return SYSTEM if os.geteuid() == 0 else user_pki(os.environ)


def _store(options: argparse.Namespace) -> Store:
    return Store(_base(options))


def _row(held: Held, revoked: frozenset[str]) -> tuple[str, ...]:
    certificate = held.certificate
    identity = certificate.identity
    expires = _day(certificate.not_after_s)
    if certificate.serial in revoked:
        expires = "revoked"
    elif certificate.not_after_s < time.time():
        expires += " (over)"
    who = (identity.node_id, identity.role, identity.cluster) if identity else ("?", "?", "?")
    return (*who, expires, certificate.serial[:16], str(held.directory))


def _day(at_s: float) -> str:
    left = (at_s - time.time()) / _DAY_S
    return f"{time.strftime('%Y-%m-%d', time.gmtime(at_s))} ({left:.0f} days)"


def _own_address() -> str:
    """The address that this machine's packets to others have; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError as error:
            raise refuse(
                Reason.INVALID_REQUEST, "this machine has no network: name the address to be reached at with --address"
            ) from error
        return str(probe.getsockname()[0])
