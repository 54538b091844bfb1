"""Which invitations were made on this machine, and what became of them. Only hashes of their secrets are kept."""

import fcntl
import hmac
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
from msgspec import Struct
from msgspec.structs import replace
from sollol.errors import Reason, refuse
from sollol.identity import Role

from sollold.pki.store import write
from sollold.pki.token import hashed

KEPT_S = 30 * 86_400


class Invitation(Struct, frozen=True, kw_only=True):
    """`node_id` is empty where the machine may name itself."""

    secret_hash: str
    expires_s: float
    role: Role = Role.AGENT
    node_id: str = ""
    used_by: str = ""


class Invitations:
    """The file; several commands may use it at once."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, invitation: Invitation, *, now_s: float) -> None:
        with self._locked() as known:
            kept = [item for item in known if item.expires_s > now_s - KEPT_S]
            self._write([*kept, invitation])

    def check(self, secret: bytes, *, now_s: float) -> Invitation:
        """The invitation that a secret belongs to, still open.

        Raises:
            SollolError: INVITATION_INVALID, INVITATION_USED or INVITATION_EXPIRED.
        """
        with self._locked() as known:
            return _open(known, secret, now_s)

    def use(self, secret: bytes, node_id: str, *, now_s: float) -> None:
        """Let it count no more. Raises as `check`: of two at the same time one comes too late."""
        with self._locked() as known:
            found = _open(known, secret, now_s)
            self._write([replace(item, used_by=node_id) if item is found else item for item in known])

    @contextmanager
    def _locked(self) -> Iterator[list[Invitation]]:
        descriptor = os.open(self._path.with_suffix(".lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            content = self._path.read_bytes() if self._path.exists() else b"[]"
            yield msgspec.json.decode(content, type=list[Invitation])
        finally:
            os.close(descriptor)

    def _write(self, invitations: list[Invitation]) -> None:
        write(self._path, msgspec.json.encode(invitations), 0o600)


def _open(known: list[Invitation], secret: bytes, now_s: float) -> Invitation:
    given = hashed(secret)
    found = next((item for item in known if hmac.compare_digest(item.secret_hash, given)), None)
    if found is None:
        raise refuse(Reason.INVITATION_INVALID, "this authority has made no such invitation: `sollol pki invite` does")
    if found.used_by:
        raise refuse(
            Reason.INVITATION_USED,
            f"this invitation has been used by {found.used_by}, and counts once: if that was not you, revoke it with "
            f"`sollol pki revoke {found.used_by}`",
        )
    if now_s > found.expires_s:
        raise refuse(Reason.INVITATION_EXPIRED, "this invitation is over: ask for another one")
    return found
