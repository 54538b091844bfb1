"""The way between two nodes: TLS 1.3, both ends with a certificate of the cluster, and the word of their pool.

A certificate of the cluster opens nothing by itself. The backend's end admits the pool's coordinator node only, and
only with the secret that the head has told the agents of this pool; the coordinator's end gives the secret away to the
node that lends and to nobody else. Imported only where there is TLS: it costs memory.
"""

import contextlib
import errno
import hashlib
import hmac
import socket
import ssl
import sys
from pathlib import Path

from sollol.errors import Refusal, SollolError
from sollol.identity import POOL_SECRET_BYTES, Identity, Role
from sollol.tls import TlsFiles, shown

from agent.forwarder.loop import READ, WRITE, Loop
from agent.forwarder.refused import NO_TLS, WRONG_NODE, WRONG_POOL, WRONG_ROLE, WRONG_SECRET, RefusedError
from agent.forwarder.status import log
from agent.forwarder.stream import (
    BLOCKED,
    Opening,
    Stream,
    Wait,
    closed_unless_open,
    connect,
    read_exactly,
    write_all,
)

FOLLOWED_EVERY_S = 0.5
_MAGIC = b"SOLLOL1\n"
_NO_CERTIFICATE = "PEER_DID_NOT_RETURN_A_CERTIFICATE"
_EXPIRED = 10  # X509_V_ERR_CERT_HAS_EXPIRED
# TLS carries at most so much at a time. A shorter piece is all that there is just now.
_RECORD_BYTES = 16 * 1024


class Tls:
    """A connection after its handshake.

    Its end is that of TCP: whoever can cut a cable can end it, and the engine's messages say how long they are. The end
    that TLS has would not let the other side go on speaking: OpenSSL takes what comes then for an error.
    """

    def __init__(self, connection: ssl.SSLSocket, files: TlsFiles) -> None:
        self.connection: socket.socket = connection
        self._tls = connection
        self._cut: Refusal | None = None
        self._forget = files.running.add(shown(connection), self._cut_off)

    def _cut_off(self, why: Refusal) -> None:
        """The peer's certificate counts no more: from now on not a byte to or from it. Its link sees a broken end."""
        self._cut = why
        with contextlib.suppress(OSError):  # it has broken already
            socket.socket.shutdown(self._tls, socket.SHUT_RDWR)

    def _check(self) -> None:
        if self._cut is not None:
            raise ConnectionResetError(errno.ECONNRESET, f"{self._cut.reason.lower()} ({self._cut.message})")

    def recv_into(self, view: memoryview) -> int:
        """As much as there is and `view` takes, of any number of records."""
        got = 0
        self._check()
        try:
            while got < len(view):
                size = self._tls.recv_into(view[got:])
                got += size
                if not size or (size < _RECORD_BYTES and not self._tls.pending()):
                    break
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return got or BLOCKED
        except OSError:
            if not got:  # else it is told once that is passed on
                raise
        return got

    def send(self, view: memoryview) -> int:
        self._check()
        try:
            return self._tls.send(view)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return BLOCKED

    def close(self) -> None:
        self._forget()
        self._tls.close()

    def end(self) -> None:
        socket.socket.shutdown(self._tls, socket.SHUT_WR)  # SSLSocket's own would end TLS both ways

    def holds(self) -> bool:
        return self._tls.pending() > 0


class Pool:
    """What its two ends say to each other first: which pool, and that they belong to it.

    Args:
        secret: `POOL_SECRET_BYTES` that nobody else knows.
    """

    def __init__(self, pool_id: str, secret: bytes) -> None:
        if len(secret) != POOL_SECRET_BYTES:
            raise ValueError(f"a pool's secret has {POOL_SECRET_BYTES} bytes, not {len(secret)}")
        self._named = _MAGIC + hashlib.sha256(pool_id.encode()).digest()
        self.preamble = self._named + secret

    def check(self, preamble: bytes, who: str) -> None:
        """Raises RefusedError: it is another pool's, or has another secret."""
        if not hmac.compare_digest(preamble, self.preamble):
            raise RefusedError(WRONG_SECRET if preamble.startswith(self._named) else WRONG_POOL, who)


def admit(connection: socket.socket, files: TlsFiles, pool: Pool, coordinator: str) -> Opening[Stream]:
    """Open the backend's end for the coordinator's node of this pool, and for nobody else.

    Raises:
        RefusedError: Whoever came is somebody else, as far as they showed who they are.
        OSError: They hung up.
    """
    tls = _wrapped(connection, files, server=True)
    with closed_unless_open(tls):
        yield from _shake_hands(tls)
        who = _coordinator(tls, files, coordinator)
        stream = Tls(tls, files)
    with closed_unless_open(stream):
        pool.check((yield from read_exactly(stream, len(pool.preamble))), str(who))
    return stream


def reach(address: tuple[str, int], files: TlsFiles, pool: Pool, lender: str) -> Opening[Stream]:
    """Open the way to a backend's forwarder; nobody but `lender` gets to know the secret.

    Raises:
        RefusedError: Somebody else answers there.
        OSError: Nobody does.
    """
    plain = yield from connect(address)
    tls = _wrapped(plain.connection, files, server=False, lender=lender)
    with closed_unless_open(tls):
        yield from _shake_hands(tls)
        _peer(tls, files)  # its name fits, that is checked by TLS; it may be revoked
        stream = Tls(tls, files)
    with closed_unless_open(stream):
        yield from write_all(stream, pool.preamble)
    return stream


def credentials(directory: Path, pool_id: str) -> tuple[TlsFiles, Pool] | None:
    """The files, and the pool with the secret that our standard input tells. None: logged why not."""
    try:
        secret = sys.stdin.buffer.read(POOL_SECRET_BYTES + 1)
        return TlsFiles(directory, tell=lambda _, event, **fields: log(event, **fields)), Pool(pool_id, secret)
    except (SollolError, OSError, ValueError) as error:
        log("no_tls", error=str(error))
        return None


def follow(files: TlsFiles, loop: Loop) -> None:
    """From now on have a change of the files cut at once who counts no more."""
    files.look()
    loop.later(FOLLOWED_EVERY_S, lambda: follow(files, loop))


def _wrapped(connection: socket.socket, files: TlsFiles, *, server: bool, lender: str = "") -> ssl.SSLSocket:
    """The files are looked at each time: a rotation needs no restart."""
    context = files.server_context() if server else files.client_context()
    context.options |= ssl.OP_IGNORE_UNEXPECTED_EOF
    name = None if server else Identity(files.identity.cluster, Role.AGENT, lender).dns_name
    return context.wrap_socket(connection, server_side=server, server_hostname=name, do_handshake_on_connect=False)


def _shake_hands(tls: ssl.SSLSocket) -> Opening[None]:
    while True:
        try:
            tls.do_handshake()
        except ssl.SSLWantReadError:
            yield Wait(tls, READ)
        except ssl.SSLWantWriteError:
            yield Wait(tls, WRITE)
        except ssl.SSLCertVerificationError as error:
            why = "certificate_expired" if error.verify_code == _EXPIRED else "foreign_certificate"
            raise RefusedError(why, error.verify_message) from error
        except ssl.SSLError as error:
            why = "no_certificate" if error.reason == _NO_CERTIFICATE else NO_TLS
            raise RefusedError(why, error.reason) from error
        else:
            return


def _peer(tls: ssl.SSLSocket, files: TlsFiles) -> Identity:
    try:
        return files.peer(tls)
    except SollolError as error:
        raise RefusedError(error.refusal.reason.lower(), error.refusal.message) from error


def _coordinator(tls: ssl.SSLSocket, files: TlsFiles, node_id: str) -> Identity:
    who = _peer(tls, files)
    if who.role is not Role.AGENT:
        raise RefusedError(WRONG_ROLE, str(who))
    if who.node_id != node_id:
        raise RefusedError(WRONG_NODE, str(who))
    return who
