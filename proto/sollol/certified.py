"""What each daemon does about its certificate: finds it at the start, and warns before it ends."""

import asyncio
import time
from collections.abc import Callable, Mapping, MutableMapping
from typing import Protocol

import structlog

from sollol.certificates import Certificate
from sollol.config import is_loopback
from sollol.identity import Role
from sollol.lifecycle import Closing, Stop
from sollol.pki_directories import tls_directory
from sollol.tls import TlsFiles, own_files

log = structlog.get_logger(__name__)

WARNED_FROM = 0.2  # of a certificate's life
WARNED_EVERY_S = 86_400.0
LOOKED_EVERY_S = 60.0
FOLLOWED_EVERY_S = 0.25


class Config(Protocol):
    """What a daemon's settings say of it. An agent's also have its `node_id`."""

    @property
    def tls_dir(self) -> str: ...
    @property
    def listen(self) -> str: ...


def certified(config: Config, role: Role, environ: Mapping[str, str], closing: Closing, stop: Stop) -> TlsFiles | None:
    """The certificate to serve with, watched until `closing`.

    None on loopback, or where a human said `insecure`, which is said aloud.

    Raises:
        SollolError: as `own_files`.
    """
    directory = tls_directory(config.tls_dir, role, environ)
    tls = own_files(directory, role, getattr(config, "node_id", ""))
    if tls is not None:
        material = tls.current()
        log.info("certificate_in_use", identity=material.identity.uri, directory=str(directory))
        closing.run("certificate", watch_expiry(tls), stop, within_s=1.0)
        closing.run("revocations", follow(tls), stop, within_s=1.0)
    elif not is_loopback(config.listen):
        log.warning(
            "INSECURE",
            listen=config.listen,
            meaning="no TLS: whoever reaches this address can use this daemon, and read all that it says",
            hint="`sollol join` or `sollol pki issue` gives it a certificate",
        )
    return tls


def let_grpc_tell_of_handshakes(tls_dir: str, role: Role, environ: MutableMapping[str, str]) -> None:
    """Why a peer's handshake failed only gRPC's C core knows, and it writes its own lines to standard error.

    To be called before grpc is imported; without certificates it stays as silent as `sollol` makes it.
    """
    if tls_directory(tls_dir, role, environ) is not None and environ.get("GRPC_VERBOSITY") == "NONE":
        environ["GRPC_VERBOSITY"] = "INFO"


def expires_in_s(tls: TlsFiles, now_s: float | None = None) -> float:
    return tls.current().certificate.not_after_s - (time.time() if now_s is None else now_s)


def is_ending(certificate: Certificate, now_s: float) -> bool:
    life_s = certificate.not_after_s - certificate.not_before_s
    return certificate.not_after_s - now_s < WARNED_FROM * life_s


async def follow(tls: TlsFiles, *, every_s: float = FOLLOWED_EVERY_S) -> None:
    """Have a change of the files end at once what may not go on; until cancelled."""
    while True:
        tls.look()
        await asyncio.sleep(every_s)


async def watch_expiry(
    tls: TlsFiles, *, clock: Callable[[], float] = time.time, every_s: float = LOOKED_EVERY_S
) -> None:
    """Warn once a day while the certificate is in the last part of its life; until cancelled."""
    warned_s = float("-inf")
    while True:
        now_s, certificate = clock(), tls.current().certificate
        if is_ending(certificate, now_s) and now_s - warned_s >= WARNED_EVERY_S:
            warned_s = now_s
            log.warning(
                "certificate_ends",
                identity=str(certificate.identity),
                expires_in_s=round(certificate.not_after_s - now_s),
                directory=str(tls.directory),
                hint="`sollol pki rotate` renews it where the authority is",
            )
        await asyncio.sleep(every_s)
