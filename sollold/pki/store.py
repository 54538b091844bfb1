"""The authority's files, and the directories of identities beside them.

`authority/` has `ca.pem` and `ca.key`, while another one takes over also `next.pem` and `next.key`, or `old.pem`; what
was issued (`issued`), to whom a machine was invited (`invitations.json`) and the list of certificates that are
`revoked`. Only root, or the user, reads it: whoever has `ca.key` is everybody.
"""

import contextlib
import functools
import os
import pwd
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from msgspec import Struct
from sollol import certificates, kept, revocations
from sollol.certificates import Certificate
from sollol.errors import Reason, SollolError, refuse
from sollol.identity import Identity, Role, checked
from sollol.revocations import Revocations
from sollol.tls import CA, CERTIFICATE, KEY, REVOKED

from sollold.pki import issued
from sollold.pki.authority import LEAF_DAYS, Authority, cluster_of, issue, new_authority, new_key
from sollold.pki.authority import revocations as signed_revocations
from sollold.pki.issued import Issued

P = ParamSpec("P")
R = TypeVar("R")

SERVICE_USER = "sollol"
_SERVED = (Role.HEAD, Role.AGENT)  # what daemons read
_NEXT, _NEXT_KEY, _OLD, _CA_KEY = "next.pem", "next.key", "old.pem", "ca.key"
_ISSUED = "issued"


class Held(Struct, frozen=True):
    """An identity's directory on this machine."""

    directory: Path
    certificate: Certificate


def _alone(change: Callable[Concatenate["Store", P], R]) -> Callable[Concatenate["Store", P], R]:
    """One change at a time, whoever makes it: each builds on what the last one left."""

    @functools.wraps(change)
    def changed(store: "Store", /, *args: P.args, **words: P.kwargs) -> R:
        store.authority()  # says why there is none
        with kept.locked(store.directory):
            return change(store, *args, **words)

    return changed


class Store:
    """All below `base`, `/etc/sollol/pki` or the user's own."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.directory = base / "authority"

    def exists(self) -> bool:
        return (self.directory / _CA_KEY).exists()

    def authority(self) -> Authority:
        """What signs now. Raises CERTIFICATE_UNREADABLE when this machine has none."""
        try:
            pem, key = (self.directory / "ca.pem").read_bytes(), (self.directory / _CA_KEY).read_bytes()
        except OSError as error:
            raise refuse(
                Reason.CERTIFICATE_UNREADABLE,
                f"no authority in {self.directory} ({error.strerror}): `sollol pki init` makes one; where there is one "
                "already, run this there, as the user that made it",
            ) from error
        return Authority(cluster_of(pem), pem, key)

    def bundle(self) -> bytes:
        """Every authority to be trusted: the one that signs, and the one before or after it."""
        others = (self.directory / name for name in (_NEXT, _OLD))
        return self.authority().certificate + b"".join(path.read_bytes() for path in others if path.exists())

    def init(self, cluster: str) -> None:
        """Raises INVALID_REQUEST: there is an authority already, or the name cannot be one."""
        if self.exists():
            raise refuse(Reason.INVALID_REQUEST, f"{self.directory} has an authority already: it is kept as it is")
        named(cluster, Role.HEAD, "x")
        self.base.mkdir(parents=True, exist_ok=True)
        self.base.chmod(0o755)  # daemons pass through it to what is theirs
        made = new_authority(cluster)
        _folder(self.directory)
        write(self.directory / "ca.pem", made.certificate, 0o644)
        write(self.directory / _CA_KEY, made.key, 0o600)

    @_alone
    def issue(self, role: Role, node_id: str, directory: Path, *, days: float = LEAF_DAYS) -> Certificate:
        """A new key and certificate in `directory`, with all that its owner needs."""
        authority = self.authority()
        identity, key = named(authority.cluster, role, node_id), new_key()
        chain = issue(authority, identity, key, days=days)
        self.record(chain)
        place(directory, role, key=key, chain=chain, ca=self.bundle(), revoked=self.revoked().pem)
        return certificates.read(chain)

    def record(self, chain: bytes) -> None:
        """Keep, before anybody has it, who got which serial number: what `revoke` looks up."""
        issued.record(self.directory / _ISSUED, certificates.read(chain))

    def issued(self) -> Iterator[Issued]:
        """Everything that was issued here, the oldest first."""
        return issued.read(self.directory / _ISSUED)

    def counting(self) -> list[Issued]:
        """What was issued here and is neither over nor revoked."""
        revoked, now_s = self.revoked().serials, time.time()
        return [each for each in self.issued() if each.ends_s > now_s and each.serial not in revoked]

    def is_taken(self, identity: Identity) -> bool:
        """Somebody has a certificate that still counts, of that name or of one that TLS takes for the same."""
        return any(each.identity.dns_name == identity.dns_name for each in self.counting())

    def held(self) -> list[Held]:
        """Every identity in a directory below `base`."""
        found = []
        for path in sorted(self.base.glob(f"**/{CERTIFICATE}")):
            with contextlib.suppress(ValueError, OSError):
                found.append(Held(path.parent, certificates.read(path.read_bytes())))
        return found

    def rotate(self, directories: list[Path], *, days: float = LEAF_DAYS) -> list[Held]:
        """New keys and certificates of the same names in these directories."""
        renewed = []
        for directory in directories:
            try:
                identity = certificates.read((directory / CERTIFICATE).read_bytes()).identity
            except (OSError, ValueError) as error:
                raise refuse(Reason.CERTIFICATE_UNREADABLE, f"{directory}: {error}") from error
            if identity is None:
                raise refuse(Reason.CERTIFICATE_UNREADABLE, f"{directory} has no certificate of a cluster")
            renewed.append(Held(directory, self.issue(identity.role, identity.node_id, directory, days=days)))
        return renewed

    @_alone
    def add_authority(self) -> None:
        """From now on a second one is trusted, which signs nothing yet."""
        if (self.directory / _NEXT).exists() or (self.directory / _OLD).exists():
            raise refuse(Reason.INVALID_REQUEST, "an authority is being replaced already: go on with switch or drop")
        made = new_authority(self.authority().cluster)
        write(self.directory / _NEXT_KEY, made.key, 0o600)
        write(self.directory / _NEXT, made.certificate, 0o644)
        self._tell_all()

    @_alone
    def switch_authority(self) -> None:
        """The second one signs from now on; the first is trusted still."""
        if not (self.directory / _NEXT).exists():
            raise refuse(Reason.INVALID_REQUEST, "there is no second authority: begin with `--authority add`")
        write(self.directory / _OLD, self.authority().certificate, 0o644)
        (self.directory / _NEXT_KEY).replace(self.directory / _CA_KEY)
        (self.directory / _NEXT).replace(self.directory / "ca.pem")
        self._tell_all()
        if serials := self.revoked().serials:
            self._sign_revoked(serials)

    @_alone
    def drop_authority(self, *, force: bool = False) -> None:
        """The former one is trusted no more.

        Raises:
            SollolError: INVALID_REQUEST; nothing is replaced, or somebody would be locked out and that is not forced.
        """
        old = self.directory / _OLD
        if not old.exists():
            raise refuse(Reason.INVALID_REQUEST, "there is no former authority to drop: `--authority switch` makes one")
        left = self._signed_before(old.stat().st_mtime)
        if left and not force:
            raise refuse(
                Reason.INVALID_REQUEST,
                f"the former authority signed what these still use, and would lock them out: {', '.join(left)}. Renew "
                "them first (`sollol pki rotate`, or `invite` and `join`), revoke them, or say --force",
            )
        old.unlink()
        self._tell_all()

    def _signed_before(self, switched_s: float) -> list[str]:
        """Who has got nothing since then, though what he has still counts."""
        newest = {each.identity: each.made_s for each in self.counting()}
        return sorted(str(identity) for identity, made_s in newest.items() if made_s <= switched_s)

    def _tell_all(self) -> None:
        for held in self.held():
            write(held.directory / CA, self.bundle(), 0o644)

    def revoked(self) -> Revocations:
        """The newest list that was signed here. An authority that was restored from a copy may know an older one than
        this machine's daemons, and must not bring back who is in theirs. Raises CERTIFICATE_UNREADABLE.
        """
        path = self.directory / REVOKED
        try:
            ours = revocations.read(path.read_bytes()) if path.exists() else Revocations()
        except ValueError as error:
            raise refuse(Reason.CERTIFICATE_UNREADABLE, f"{path}: {error}") from error
        return max([ours, *self._handed_on()], key=lambda each: each.number)

    def _handed_on(self) -> Iterator[Revocations]:
        if not self.exists():
            return
        authorities = self.bundle()
        for held in self.held():
            with contextlib.suppress(OSError, SollolError):  # what none of the authorities signed counts for nothing
                yield revocations.verified((held.directory / REVOKED).read_bytes(), authorities)

    @_alone
    def revoke(self, role: Role, node_id: str) -> list[str]:
        """Refuse every certificate that this name has got so far; returns the serial numbers.

        Raises:
            SollolError: INVALID_REQUEST; nobody of that name has got one.
        """
        identity = named(self.authority().cluster, role, node_id)
        serials = [each.serial for each in self.issued() if each.identity == identity]
        if not serials:
            raise refuse(Reason.INVALID_REQUEST, f"nobody has a certificate as {identity}: `sollol pki show` lists all")
        self._sign_revoked(self.revoked().serials | set(serials))
        return serials

    def _sign_revoked(self, serials: frozenset[str]) -> None:
        # The time: an authority that was restored from a copy must not number a list anew.
        number = max(self.revoked().number + 1, int(time.time()))
        pem = signed_revocations(self.authority(), serials, number)
        write(self.directory / REVOKED, pem, 0o644)
        for held in self.held():
            write(held.directory / REVOKED, pem, 0o644)
            _own(held.directory, held.certificate.identity.role if held.certificate.identity else Role.ADMIN)


def named(cluster: str, role: Role, node_id: str) -> Identity:
    """Raises INVALID_REQUEST: a name that cannot stand in a certificate."""
    try:
        return checked(cluster, role, node_id)
    except ValueError as error:
        raise refuse(Reason.INVALID_REQUEST, str(error)) from error


def place(directory: Path, role: Role, *, key: bytes, chain: bytes, ca: bytes, revoked: bytes = b"") -> None:
    """Write an identity's files, the certificate last: whoever follows them takes it when it fits the key."""
    _folder(directory)
    write(directory / CA, ca, 0o644)
    if revoked:
        write(directory / REVOKED, revoked, 0o644)
    write(directory / KEY, key, 0o600)
    write(directory / CERTIFICATE, chain, 0o644)
    _own(directory, role)


def write(path: Path, content: bytes, mode: int) -> None:
    """Put a whole file in place and on the disk: nobody ever sees half of it, or a key that others may read."""
    draft = path.with_name(f".{path.name}.new")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        if os.geteuid() == 0 and path.is_file() and not path.is_symlink():
            owner = path.stat()
            os.fchown(file.fileno(), owner.st_uid, owner.st_gid)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    kept.sync_directory(path.parent)


def _folder(path: Path) -> None:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)


def _own(directory: Path, role: Role) -> None:
    """Daemons run as `sollol`; what is theirs becomes so when root writes it and that user is there.

    Theirs is `head` or `agent`, what this machine's own daemon reads; never what was issued for another machine. Links
    that `sollol` may have put there are not followed.
    """
    if os.geteuid() != 0 or role not in _SERVED or directory.name != role:
        return
    try:
        user = pwd.getpwnam(SERVICE_USER)
    except KeyError:
        return  # `sollol systemd install` makes the user, and gives it these directories
    for path in (directory, *directory.iterdir()):
        os.chown(path, user.pw_uid, user.pw_gid, follow_symlinks=False)


def host_id() -> str:
    """This machine's name as an id."""
    return socket.gethostname().split(".")[0] or "node"
