"""Reads the few fields of an X.509 certificate that daemons look at: name, serial number, validity.

For certificates that TLS has verified, or that are our own. The `cryptography` package would cost each daemon 11 MiB
of memory for these four fields; whoever makes certificates uses it.
"""

import base64
import binascii
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import lru_cache

from msgspec import Struct

from sollol.identity import Identity, parse

_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----\s+([A-Za-z0-9+/=\s]+?)-----END CERTIFICATE-----")
_SEQUENCE, _OCTETS, _BOOLEAN, _OID, _UTC_TIME, _TIME = 0x30, 0x04, 0x01, 0x06, 0x17, 0x18
_VERSION, _EXTENSIONS, _URI = 0xA0, 0xA3, 0x86
_ALTERNATIVE_NAMES = bytes((0x55, 0x1D, 0x11))


class Certificate(Struct, frozen=True):
    """`serial` is lower-case hexadecimal; times are seconds since 1970."""

    identity: Identity | None
    serial: str
    not_before_s: float
    not_after_s: float


@lru_cache(maxsize=1024)
def read(pem: bytes) -> Certificate:
    """Read the first certificate of a PEM text.

    Raises:
        ValueError: there is none, or it is not X.509.
    """
    found = _PEM.search(pem)
    if found is None:
        raise ValueError("no certificate in PEM form")
    try:
        return read_der(base64.b64decode(found[1]))
    except binascii.Error as error:
        raise ValueError(f"not a certificate in PEM form: {error}") from error


def read_der(der: bytes) -> Certificate:
    """Raises ValueError: it is not X.509."""
    try:
        return _read(der)
    except (IndexError, UnicodeDecodeError) as error:
        raise ValueError(f"not an X.509 certificate: {error}") from error


def _read(der: bytes) -> Certificate:
    fields = [item for item in items(one(one(der, _SEQUENCE), _SEQUENCE)) if item[0] != _VERSION]
    # serialNumber, signature, issuer, validity, subject, subjectPublicKeyInfo, then what is optional
    if len(fields) < 6:
        raise ValueError("not an X.509 certificate: fields are missing")
    before, after = (_time(*item) for item in items(fields[3][1]))
    extensions = next((content for tag, content in fields[6:] if tag == _EXTENSIONS), None)
    uris = _uris(extensions) if extensions is not None else ()
    identities = [identity for identity in map(parse, uris) if identity is not None]
    return Certificate(
        # Two names would let their owner choose.
        identity=identities[0] if len(identities) == 1 else None,
        serial=fields[0][1].hex().lstrip("0"),
        not_before_s=before,
        not_after_s=after,
    )


def _uris(extensions: bytes) -> tuple[str, ...]:
    for _, extension in items(one(extensions, _SEQUENCE)):
        parts = [item for item in items(extension) if item[0] != _BOOLEAN]
        if parts[0] == (_OID, _ALTERNATIVE_NAMES):
            names = items(one(parts[1][1], _SEQUENCE))
            return tuple(content.decode("ascii") for tag, content in names if tag == _URI)
    return ()


def _time(tag: int, content: bytes) -> float:
    text = content.decode("ascii")
    if tag == _UTC_TIME:
        text = ("19" if text >= "50" else "20") + text
    elif tag != _TIME:
        raise ValueError("not an X.509 certificate: no validity")
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp()


def one(data: bytes, tag: int) -> bytes:
    found, content = next(items(data), (None, b""))
    if found != tag:
        raise ValueError("not an X.509 certificate")
    return content


def items(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Tag and content of each DER element of `data`, one after the other."""
    at = 0
    while at < len(data):
        tag, length, at = data[at], data[at + 1], at + 2
        if length & 0x80:
            width = length & 0x7F
            length, at = int.from_bytes(data[at : at + width], "big"), at + width
        if at + length > len(data):
            raise ValueError("not an X.509 certificate: it is cut off")
        yield tag, data[at : at + length]
        at += length
