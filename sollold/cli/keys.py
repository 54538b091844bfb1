"""`sollol keys`: who may ask models over HTTP. Works on the head's file, on the head's machine; the head follows it."""

import argparse
import os
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec.structs import replace
from sollol.config import load
from sollol.errors import Reason, refuse

from sollold import key_file, keys
from sollold.__main__ import DEFAULT_FILE
from sollold.cli.output import print_json, print_table
from sollold.config import HeadConfig
from sollold.keys import Key, Standing

DAY_S = 86_400
_HEAD = ("NAME", "STATE", "MODELS", "CONCURRENCY", "TOKENS/MINUTE", "CREATED", "EXPIRES")


def add(options: argparse.Namespace) -> int:
    """Prints the key on standard output, this once; everything else goes to standard error."""
    path, now = _path(options), time.time()
    problem = keys.problem_of(options.name, options.models)
    if problem:
        raise refuse(Reason.INVALID_REQUEST, problem)
    token = keys.PREFIX + secrets.token_urlsafe(32)
    key = Key(
        name=options.name,
        sha256=keys.digest(token),
        created_unix_s=now,
        models=tuple(options.models),
        concurrency=options.concurrency,
        tokens_per_minute=options.tokens_per_minute,
        expires_unix_s=None if options.expires is None else now + options.expires * DAY_S,
    )
    key_file.change(path, lambda present: _added(present, key, now))
    sys.stdout.write(token + "\n")
    sys.stderr.write(f"{options.name}: this is the only time the key is shown; {path} has no more than its hash\n")
    return 0


def _added(present: tuple[Key, ...], key: Key, now_unix_s: float) -> tuple[Key, ...]:
    if any(other.name == key.name and other.standing(now_unix_s) is Standing.ACTIVE for other in present):
        raise refuse(
            Reason.INVALID_REQUEST, f"there is a key {key.name}: `sollol keys revoke {key.name}`, or take another name"
        )
    return (*present, key)


def revoke(options: argparse.Namespace) -> int:
    path, now = _path(options), time.time()
    key_file.change(path, lambda present: _revoked(present, options.name, now))
    sys.stderr.write(f"{options.name} is revoked: a running head refuses it from now on\n")
    return 0


def _revoked(present: Sequence[Key], name: str, now_unix_s: float) -> tuple[Key, ...]:
    if not any(key.name == name and key.revoked_unix_s is None for key in present):
        raise refuse(Reason.INVALID_REQUEST, f"there is no key {name} to revoke; `sollol keys list` shows them")
    return tuple(
        replace(key, revoked_unix_s=now_unix_s) if key.name == name and key.revoked_unix_s is None else key
        for key in present
    )


def show(options: argparse.Namespace) -> int:
    """Hashes are left out: nobody needs them, and a list may be pasted somewhere."""
    now = time.time()
    found = key_file.read(_path(options))
    if options.json:
        listed = [
            {"state": key.standing(now), **{k: v for k, v in msgspec.to_builtins(key).items() if k != "sha256"}}
            for key in found
        ]
        print_json({"schema": "sollol.keys/v1", "keys": listed})
    elif found:
        print_table(_HEAD, [_row(key, now) for key in found])
    else:
        sys.stderr.write("no keys\n")
    return 0


def _row(key: Key, now_unix_s: float) -> tuple[str, ...]:
    return (
        key.name,
        key.standing(now_unix_s),
        ", ".join(key.models) or "all",
        str(key.concurrency or "-"),
        str(key.tokens_per_minute or "-"),
        _day(key.created_unix_s),
        "-" if key.expires_unix_s is None else _day(key.expires_unix_s),
    )


def _day(unix_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(unix_s))


def _path(options: argparse.Namespace) -> Path:
    return Path(options.file) if options.file else default_path()


def default_path(settings: Path = DEFAULT_FILE) -> Path:
    """Where the head of this machine has its keys, as its settings say; whether it could listen now does not matter."""
    argv = ["--listen", "127.0.0.1"]
    config = load(HeadConfig, name="head", argv=argv, environ=os.environ, default_file=settings).value
    return key_file.keys_path(config.keys_file, config.state_dir, os.environ)
