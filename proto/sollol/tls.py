"""The files of one identity, and TLS contexts that follow them when they change.

gRPC's credentials are in `sollol.channels`, which costs the import of grpc; small processes need only this.
"""

import os
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from sollol import certificates, revocations
from sollol.certificates import Certificate
from sollol.contexts import CLIENT, HTTP2_CLIENT, SERVER, Kind, new_context
from sollol.errors import Reason, Refusal, SollolError, refuse
from sollol.identity import Identity, Role, role_name
from sollol.material import Material, admitted
from sollol.revocations import Revocations
from sollol.running import Running

__all__ = ["Identity", "Material", "Role", "TlsFiles", "admitted", "own_files", "role_name", "shown"]

CA, CERTIFICATE, KEY, REVOKED = "ca.pem", "node.pem", "node.key", "revoked"
_NAMES = (CA, CERTIFICATE, KEY, REVOKED)
# A rotation replaces file after file: key and certificate of different ages are there for a moment.
_SETTLED_WITHIN_S, _SETTLED_POLL_S = 1.0, 0.01

Stamp = tuple[tuple[int, int, int] | None, ...]


class TlsFiles:
    """`ca.pem`, `node.pem`, `node.key` and perhaps `revoked` in one directory. May be used from any thread but `look`.

    Files that change are read again when somebody asks next; a change that cannot be used is logged, and the former
    content stays in use. Its owner calls `look` often.

    Args:
        tell: Called with a level, an event and its fields when the files have changed.

    Raises:
        SollolError: CERTIFICATE_UNREADABLE; a file is missing, not readable, or does not belong to the others.
    """

    def __init__(self, directory: Path, *, tell: Callable[..., None] | None = None) -> None:
        self.directory = directory
        self._tell = tell or _to_our_log
        self._lock = threading.Lock()
        self._keeping = threading.Lock()
        self._problem = ""
        self._stamp, self._material = self._first()
        self._contexts: dict[Kind, tuple[Material, ssl.SSLContext]] = {}
        self.running = Running()
        self._looked_at = self._material
        self._listeners: list[Callable[[], None]] = []

    @property
    def identity(self) -> Identity:
        return self.current().identity

    def current(self) -> Material:
        """The newest content that can be used."""
        with self._lock:
            return self._newest()

    def _newest(self) -> Material:
        stamp = self._stamps()
        if stamp != self._stamp:
            self._follow(stamp)
        return self._material

    def look(self) -> None:
        """Follow the files now; if they have changed, end what is `running` for peers that count no more, and say so.

        Always from one thread.
        """
        material = self.current()
        if material is self._looked_at:
            return
        self._looked_at = material
        for peer, refusal, end in self.running.take(material):
            self._tell("warning", "peer_cut", peer=str(peer), reason=refusal.reason, message=refusal.message)
            end(refusal)
        for listener in tuple(self._listeners):
            listener()

    def subscribe(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Have `listener` called when `look` has seen a change; returns what ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def take_revoked(self, pem: bytes, *, peer: str) -> Revocations | None:
        """Use, and keep, the list of revoked certificates that `peer` has sent; None: it is the one in use. Blocks.

        Raises:
            SollolError: INVALID_REQUEST; it is none, or an older one. FOREIGN_CERTIFICATE; another authority's.
        """
        sent = revocations.verified(pem, self.current().ca)
        with self._keeping:
            if not self._is_news(sent):
                return None
            self._tell("info", "revoked_list_taken", peer=peer, number=sent.number, revoked=len(sent.serials))
            self._keep_revoked(sent)
        return sent

    def _is_news(self, sent: Revocations) -> bool:
        """Use it if it is newer; raises INVALID_REQUEST for an older one."""
        with self._lock:
            ours = self._newest().revoked
            if sent.number < ours.number:
                raise refuse(
                    Reason.INVALID_REQUEST, f"list {sent.number} of revoked certificates is older than {ours.number}"
                )
            if sent.number > ours.number:
                self._material = replace(self._material, revoked=sent)
            return sent.number > ours.number

    def _keep_revoked(self, taken: Revocations) -> None:
        path, draft = self.directory / REVOKED, self.directory / f".{REVOKED}.taken"
        try:
            with draft.open("wb") as file:
                file.write(taken.pem)
                file.flush()
                os.fsync(file.fileno())  # an empty file, after a loss of power, would be none that a daemon starts with
            with self._lock:
                if self._newest().revoked.number == taken.number:  # else a newer one has been put there meanwhile
                    draft.replace(path)
        except OSError as error:
            self._tell("error", "revoked_list_not_kept", path=str(path), problem=str(error.strerror))

    def server_context(self) -> ssl.SSLContext:
        """TLS 1.3; peers show a certificate of our CA. A listener made with it follows the files by itself."""
        context = self._context(SERVER)

        def newest(connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
            connection.context = self._context(SERVER)

        context.sni_callback = newest  # called for every connection, also when no name is asked
        return context

    def client_context(self, *, http2: bool = False) -> ssl.SSLContext:
        """TLS 1.3 with our certificate, as the files are now. Expect `identity.dns_name` or `role_name` as name.

        With `http2` it says that it wants to speak that, without which gRPC's servers answer nothing.
        """
        return self._context(HTTP2_CLIENT if http2 else CLIENT)

    def peer(self, connection: ssl.SSLObject | ssl.SSLSocket) -> Identity:
        """Who is at the other end of a verified connection. Raises SollolError as `admitted`, or NO_CERTIFICATE."""
        return admitted(shown(connection), self.current(), now_s=time.time())

    def _context(self, kind: Kind) -> ssl.SSLContext:
        material = self.current()
        with self._lock:
            known = self._contexts.get(kind)
            if known is not None and known[0] is material:
                return known[1]
        context = new_context(material, kind)
        with self._lock:
            self._contexts[kind] = (material, context)
        return context

    def _first(self) -> tuple[Stamp, Material]:
        """Waits for the end of a rotation that has just begun: a daemon that starts then would not be started again."""
        deadline = time.monotonic() + _SETTLED_WITHIN_S
        while True:
            stamp = self._stamps()
            try:
                return stamp, self._read()
            except SollolError:
                if time.monotonic() > deadline or not _is_changing(self._stamps()):
                    raise
            time.sleep(_SETTLED_POLL_S)

    def _follow(self, stamp: Stamp) -> None:
        try:
            material = self._read()
        except SollolError as error:
            self._complain(error.refusal)
            if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, ssl.SSLError):
                return  # it may pass, such as too many open files: what is there may revoke somebody
        else:
            self._problem = ""
            ours = self._material.revoked
            if material.revoked.number < ours.number:
                self._tell("warning", "revoked_list_older", number=material.revoked.number, in_use=ours.number)
                material = replace(material, revoked=ours)
            if material != self._material:
                self._tell(
                    "info", "certificate_followed", identity=material.identity.uri, serial=material.certificate.serial
                )
                self._material = material
        self._stamp = stamp

    def _complain(self, refusal: Refusal) -> None:
        if refusal.message != self._problem:
            self._tell("warning", "certificate_not_followed", reason=refusal.reason, message=refusal.message)
        self._problem = refusal.message

    def _stamps(self) -> Stamp:
        return tuple(_stamp(self.directory / name) for name in _NAMES)

    def _read(self) -> Material:
        try:
            ca, chain, key = ((self.directory / name).read_bytes() for name in (CA, CERTIFICATE, KEY))
            certificate = certificates.read(chain)
            material = Material(
                ca=ca,
                authorities=frozenset(each.key_id for each in certificates.read_all(ca) if each.key_id),
                chain=chain,
                key=key,
                revoked=self._revoked(),
                certificate=certificate,
                identity=_named(certificate),
            )
            new_context(material, SERVER)
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            problem = f"{error.strerror}: {error.filename}" if isinstance(error, PermissionError) else str(error)
            raise refuse(
                Reason.CERTIFICATE_UNREADABLE,
                f"tls_dir {self.directory}: {problem}. It needs {CA}, {CERTIFICATE} and the {KEY} that belongs to it, "
                "readable by this user: `sollol join` or `sollol pki issue` writes them",
            ) from error
        return material

    def _revoked(self) -> Revocations:
        path = self.directory / REVOKED
        return revocations.read(path.read_bytes()) if path.exists() else Revocations()


def _named(certificate: Certificate) -> Identity:
    if certificate.identity is None:
        raise ValueError(f"{CERTIFICATE} names nobody of a cluster")
    return certificate.identity


def own_files(directory: Path | None, role: Role, node_id: str = "") -> TlsFiles | None:
    """The files that a daemon serves with, when they are its own; None without a directory.

    Raises:
        SollolError: CERTIFICATE_UNREADABLE; WRONG_ROLE or WRONG_NODE when the certificate is somebody else's.
    """
    if directory is None:
        return None
    files = TlsFiles(directory)
    if files.identity.role is not role:
        raise refuse(Reason.WRONG_ROLE, f"tls_dir {directory} is that of {files.identity}, not of a role {role}")
    if node_id and files.identity.node_id != node_id:
        raise refuse(
            Reason.WRONG_NODE,
            f"tls_dir {directory} is that of {files.identity}, and this one is {node_id}: set node_id to "
            f"{files.identity.node_id}, or have it join as {node_id}",
        )
    return files


def shown(connection: ssl.SSLObject | ssl.SSLSocket) -> Certificate:
    """The certificate at the other end of a verified connection. Raises NO_CERTIFICATE."""
    der = connection.getpeercert(binary_form=True)
    if not der:
        raise refuse(Reason.NO_CERTIFICATE, "the peer has shown no certificate")
    return certificates.read_der(der)


def _to_our_log(level: str, event: str, **fields: Any) -> None:
    import structlog  # noqa: PLC0415 - 9 MiB, half of what a small process takes

    getattr(structlog.get_logger(__name__), level)(event, **fields)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size


def _is_changing(stamp: Stamp) -> bool:
    """Whether all is there that must be, and some of it has come a moment ago."""
    needed = [found[0] for found in stamp[:-1] if found is not None]
    return len(needed) == len(stamp) - 1 and time.time_ns() - max(needed) < _SETTLED_WITHIN_S * 1e9
