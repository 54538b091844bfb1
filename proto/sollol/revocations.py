"""The list of certificates that are refused whatever else they say: an X.509 CRL, signed by the authority.

One that is our own is read as certificates are (see `certificates`); what a peer sends is verified first, which is rare
enough for the `cryptography` package.
"""

import base64
import re

from msgspec import Struct

from sollol.certificates import extensions, items, one
from sollol.errors import Reason, refuse

_PEM = re.compile(rb"-----BEGIN X509 CRL-----\s+([A-Za-z0-9+/=\s]+?)-----END X509 CRL-----")
_MOST_BYTES = 1 << 20
_INTEGER, _SEQUENCE, _EXTENSIONS = 0x02, 0x30, 0xA0
_CRL_NUMBER = bytes((0x55, 0x1D, 0x14))


class Revocations(Struct, frozen=True, kw_only=True):
    """A list; the one with the highest `number` counts.

    Attributes:
        serials: Of certificates, in lower-case hexadecimal.
        pem: What the authority signed.
    """

    number: int = 0
    serials: frozenset[str] = frozenset()
    pem: bytes = b""


def read(pem: bytes) -> Revocations:
    """A list that is trusted already. Raises ValueError: it is none."""
    found = _PEM.search(pem)
    if found is None:
        raise ValueError("no list of revoked certificates as `sollol pki revoke` writes it")
    try:
        fields = list(items(one(one(base64.b64decode(found[1]), _SEQUENCE), _SEQUENCE)))
        # version, signature, issuer, thisUpdate, nextUpdate, then revokedCertificates unless there are none
        revoked = fields[5][1] if fields[5][0] == _SEQUENCE else b""
        serials = (one(entry, _INTEGER) for _, entry in items(revoked))
        return Revocations(
            number=_number(*fields[-1]), serials=frozenset(each.hex().lstrip("0") for each in serials), pem=pem
        )
    except (IndexError, ValueError) as error:
        raise ValueError(f"not a list of revoked certificates: {error}") from error


def _number(tag: int, content: bytes) -> int:
    said = extensions(content) if tag == _EXTENSIONS else {}
    if _CRL_NUMBER not in said:
        raise ValueError("it has no number")
    return int.from_bytes(one(said[_CRL_NUMBER], _INTEGER), "big")


def verified(pem: bytes, ca: bytes) -> Revocations:
    """A list that somebody sent, when one of the authorities (PEM) has signed it.

    Raises:
        SollolError: INVALID_REQUEST; it is no list. FOREIGN_CERTIFICATE; none of them has signed it.
    """
    if len(pem) > _MOST_BYTES:
        raise refuse(Reason.INVALID_REQUEST, f"a list of revoked certificates has at most {_MOST_BYTES} bytes")
    from cryptography import x509  # noqa: PLC0415 - 11 MiB, for something that hardly ever comes
    from cryptography.hazmat.primitives.serialization import Encoding  # noqa: PLC0415

    try:
        sent = x509.load_pem_x509_crl(pem)
        authorities = x509.load_pem_x509_certificates(ca)
        signed = any(sent.is_signature_valid(each.public_key()) for each in authorities)  # type: ignore[arg-type]
        canonical = sent.public_bytes(Encoding.PEM)  # what was verified, and nothing around it
        found = read(canonical)
    except (ValueError, TypeError, x509.InvalidVersion) as error:
        raise refuse(Reason.INVALID_REQUEST, f"what came is no list of revoked certificates: {error}") from error
    if not signed:
        raise refuse(
            Reason.FOREIGN_CERTIFICATE, f"list {found.number} of revoked certificates is not signed by our authority"
        )
    return found
