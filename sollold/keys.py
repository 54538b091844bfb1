"""API keys: what is kept of one, which one a token belongs to, and what it may be used for. Pure.

A key is 256 random bits, so its plain SHA-256 tells nothing of it: a slow hash protects only what can be guessed.
"""

import hashlib
import hmac
import re
from collections.abc import Iterable
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

VERSION = 1
PREFIX = "sk-sollol-"
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._@-]{0,61}[A-Za-z0-9])?")
_GLOB = re.compile(r"[A-Za-z0-9._:/@+*?\[\]!-]{1,200}")


class Standing(StrEnum):
    ACTIVE = "active"
    EXPIRED = "expired"
    REVOKED = "revoked"


class Key(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One key, without the key.

    Attributes:
        sha256: Of the whole token, in hexadecimal.
        models: Shell patterns over models' own names; empty: every model.
        concurrency: Requests at the same time, those that wait included; None: any number.
        tokens_per_minute: Of prompts and answers together; None: any number.
    """

    name: Annotated[str, Meta(min_length=1, max_length=63)]
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    created_unix_s: float
    models: tuple[str, ...] = ()
    concurrency: Annotated[int, Meta(ge=1)] | None = None
    tokens_per_minute: Annotated[int, Meta(ge=1)] | None = None
    expires_unix_s: float | None = None
    revoked_unix_s: float | None = None

    def standing(self, now_unix_s: float) -> Standing:
        if self.revoked_unix_s is not None:
            return Standing.REVOKED
        expired = self.expires_unix_s is not None and self.expires_unix_s <= now_unix_s
        return Standing.EXPIRED if expired else Standing.ACTIVE

    def covers(self, model: str) -> bool:
        """Whether it is for this model, a canonical name."""
        return not self.models or any(fnmatchcase(model, pattern) for pattern in self.models)


class _File(Struct, kw_only=True, forbid_unknown_fields=True):
    version: int
    keys: tuple[Key, ...]


def digest(token: str) -> str:
    return hashlib.sha256(token.encode(errors="surrogateescape")).hexdigest()


def matching(keys: Iterable[Key], token: str) -> Key | None:
    """The key that `token` is. Every key is compared, however early one matches: time tells nothing of which."""
    wanted, found = digest(token), None
    for key in keys:
        if hmac.compare_digest(key.sha256, wanted):
            found = key
    return found


def parse(raw: bytes) -> tuple[Key, ...]:
    """Raises ValueError: it is not a file of keys, or one of another version."""
    file = msgspec.json.decode(raw, type=_File)
    if file.version != VERSION:
        raise ValueError(f"it has version {file.version}, this program reads version {VERSION}")
    return file.keys


def render(keys: Iterable[Key]) -> bytes:
    return msgspec.json.format(msgspec.json.encode(_File(version=VERSION, keys=tuple(keys))), indent=2) + b"\n"


def problem_of(name: str, models: Iterable[str]) -> str | None:
    """What is wrong with a new key's name or patterns; None when nothing is."""
    if not _NAME.fullmatch(name):
        return f"name {name[:70]!r}: use 1 to 63 of A-Z a-z 0-9 . _ @ - between letters or digits"
    for pattern in models:
        if not _GLOB.fullmatch(pattern):
            return f"models {pattern[:70]!r}: a pattern has characters of model names and * ? [ ]"
    return None
