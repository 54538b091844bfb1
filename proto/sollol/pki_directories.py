"""Where certificates lie: one directory per identity, named by its role, below the machine's or the user's own."""

import os
from collections.abc import Mapping
from pathlib import Path

from sollol.identity import Role

SYSTEM = Path("/etc/sollol/pki")


def user_pki(environ: Mapping[str, str]) -> Path:
    """`$XDG_CONFIG_HOME/sollol/pki`, else `~/.config/sollol/pki`. Not created."""
    given = environ.get("XDG_CONFIG_HOME", "")
    home = Path(environ["HOME"]) if environ.get("HOME") else Path.home()
    return (Path(given) if given.startswith("/") else home / ".config") / "sollol" / "pki"


def tls_directory(setting: str, role: Role, environ: Mapping[str, str], *, system: Path = SYSTEM) -> Path | None:
    """The directory that a daemon's `tls_dir` means; None for none.

    "auto" finds what is there even when it cannot be read: that must be an error, not a daemon without TLS.
    """
    if setting != "auto":
        return Path(setting).expanduser() if setting else None
    places = (base / role for base in (system, user_pki(environ)))
    return next((place for place in places if os.path.isdir(place)), None)  # noqa: PTH112 - False where we may not look


def users_tls_directory(setting: str, environ: Mapping[str, str], *, system: Path = SYSTEM) -> Path | None:
    """The same for people and their programs: what they can read, an operator's before a client's."""
    if setting != "auto":
        return Path(setting).expanduser() if setting else None
    places = (base / role for role in (Role.ADMIN, Role.CLIENT) for base in (system, user_pki(environ)))
    return next((place for place in places if os.access(place / "node.key", os.R_OK)), None)
