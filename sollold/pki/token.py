"""The word that lets one machine join: where to ask, whom to trust there, and a secret that counts once."""

import base64
import hashlib

import msgspec
from msgspec import Struct
from sollol.errors import Reason, refuse

PREFIX = "sollol1-"
_SUM_BYTES = 4


class Token(Struct, frozen=True, kw_only=True, array_like=True):
    """`fingerprint` is the SHA-256 of the authority's certificate; `expires_s` is seconds since 1970."""

    host: str
    port: int
    expires_s: int
    fingerprint: bytes
    secret: bytes


def encode(token: Token) -> str:
    body = msgspec.msgpack.encode(token)
    return PREFIX + base64.urlsafe_b64encode(body + _sum(body)).decode().rstrip("=")


def decode(text: str) -> Token:
    """Raises INVITATION_INVALID: it is not a token, or was cut or changed on the way."""
    word = text.strip().removeprefix(PREFIX)
    problem = "it does not begin as one" if word == text.strip() else "its check sum is wrong"
    try:
        data = base64.b64decode(word + "=" * (-len(word) % 4), b"-_", validate=True)
        body, given = data[:-_SUM_BYTES], data[-_SUM_BYTES:]
        if word != text.strip() and given == _sum(body):
            return msgspec.msgpack.decode(body, type=Token)
    except (ValueError, msgspec.MsgspecError) as error:
        problem = str(error)
    raise refuse(
        Reason.INVITATION_INVALID, f"this is not a whole token of `sollol pki invite`: {problem}; copy all of it"
    )


def hashed(secret: bytes) -> str:
    """What the inviting side keeps of a secret."""
    return hashlib.sha256(secret).hexdigest()


def _sum(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()[:_SUM_BYTES]
