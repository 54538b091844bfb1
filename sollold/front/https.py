"""HTTPS for the OpenAI-compatible API: a certificate that people's programs trust, followed when its files change."""

import ssl
from pathlib import Path

import structlog
from sollol.certificates import read
from sollol.errors import Reason, refuse

log = structlog.get_logger(__name__)

_Stamp = tuple[int, ...]


def https_files(certificate: str, key: str) -> "HttpsFiles | None":
    """None when no files are named.

    Raises:
        SollolError: CERTIFICATE_UNREADABLE; the files cannot be read, or do not belong together.
    """
    if not certificate:
        return None
    return HttpsFiles(Path(certificate).expanduser(), Path(key).expanduser())


class HttpsFiles:
    """A certificate and its key. A listener with their `context` takes renewed ones by itself.

    Attributes:
        expires_unix_s: When the certificate that is shown ends; None when that cannot be read from it.
    """

    def __init__(self, certificate: Path, key: Path) -> None:
        self._certificate, self._key = certificate, key
        self._stamp = self._now()
        self._problem = ""
        self.expires_unix_s: float | None = None
        try:
            self._newest = self.context = self._loaded()
        except OSError as error:  # ssl.SSLError is one
            raise refuse(
                Reason.CERTIFICATE_UNREADABLE,
                f"http_tls_cert {certificate}, http_tls_key {key}: {error}. They must be a certificate chain and its "
                "key, in PEM form, readable by this user",
            ) from error
        self.context.sni_callback = self._choose

    def _choose(self, connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        """Called for every connection, also when no name is asked."""
        stamp = self._now()
        if stamp != self._stamp:
            self._follow(stamp)
        connection.context = self._newest

    def _follow(self, stamp: _Stamp) -> None:
        problem = ""
        try:
            self._newest = self._loaded()
        except ssl.SSLError as error:  # half of a renewal, perhaps: the other half changes the stamp again
            self._stamp, problem = stamp, str(error)
        except OSError as error:  # it may pass, such as too many open files: the next connection tries again
            problem = str(error)
        else:
            self._stamp = stamp
            log.info("certificate_followed", file=str(self._certificate))
        if problem and problem != self._problem:
            log.warning("certificate_not_followed", file=str(self._certificate), problem=problem)
        self._problem = problem

    def _loaded(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self._certificate, self._key)
        self.expires_unix_s = _end_of(self._certificate)
        return context

    def _now(self) -> _Stamp:
        try:
            return tuple(path.stat().st_mtime_ns for path in (self._certificate, self._key))
        except OSError:
            return ()


def _end_of(certificate: Path) -> float | None:
    try:
        return read(certificate.read_bytes()).not_after_s
    except ValueError:  # OpenSSL takes forms that we do not read; it serves all the same
        return None
