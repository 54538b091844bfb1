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
_SEQUENCE, _OCTETS, _UTC_TIME, _TIME = 0x30, 0x04, 0x17, 0x18
_VERSION, _EXTENSIONS, _URI, _KEY_ID = 0xA0, 0xA3, 0x86, 0x80
_OWN_KEY, _ALTERNATIVE_NAMES, _SIGNERS_KEY = (bytes((0x55, 0x1D, last)) for last in (0x0E, 0x11, 0x23))


class Certificate(Struct, frozen=True):
    """Serial number and ids of keys are lower-case hexadecimal; times are seconds since 1970.

    Attributes:
        key_id: Names the key of an authority; empty for others.
        signed_by: The `key_id` of the authority that has signed it. TLS believes no other signature.
    """

    identity: Identity | None
    serial: str
    not_before_s: float
    not_after_s: float
    key_id: str = ""
    signed_by: str = ""


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


def read_all(pem: bytes) -> tuple[Certificate, ...]:
    """Every certificate of a PEM text. Raises ValueError as `read`."""
    return tuple(read(found[0]) for found in _PEM.finditer(pem))


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
    said = next((extensions(content) for tag, content in fields[6:] if tag == _EXTENSIONS), {})
    names = items(one(said[_ALTERNATIVE_NAMES], _SEQUENCE)) if _ALTERNATIVE_NAMES in said else ()
    uris = (content.decode("ascii") for tag, content in names if tag == _URI)
    identities = [identity for identity in map(parse, uris) if identity is not None]
    signers = items(one(said[_SIGNERS_KEY], _SEQUENCE)) if _SIGNERS_KEY in said else ()
    return Certificate(
        # Two names would let their owner choose.
        identity=identities[0] if len(identities) == 1 else None,
        serial=fields[0][1].hex().lstrip("0"),
        not_before_s=before,
        not_after_s=after,
        key_id=one(said[_OWN_KEY], _OCTETS).hex() if _OWN_KEY in said else "",
        signed_by=next((content.hex() for tag, content in signers if tag == _KEY_ID), ""),
    )


def extensions(content: bytes) -> dict[bytes, bytes]:
    """What each extension says, by its object identifier; whether it is critical lies between the two."""
    found = (list(items(extension)) for _, extension in items(one(content, _SEQUENCE)))
    return {parts[0][1]: parts[-1][1] for parts in found}


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
