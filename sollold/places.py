"""Where a head keeps what outlives it."""

import os
from collections.abc import Mapping
from pathlib import Path

from sollol.directories import state_home

SERVICE_DIRECTORY = Path("/var/lib/sollol/head")


def state_directory(setting: str, environ: Mapping[str, str], service: Path = SERVICE_DIRECTORY) -> Path:
    """Not created. "auto": systemd's directory, the service's for who may look there, else the user's."""
    if setting != "auto":
        return Path(setting).expanduser()
    if environ.get("STATE_DIRECTORY"):
        return Path(environ["STATE_DIRECTORY"].split(":")[0])
    if os.access(service, os.R_OK | os.W_OK | os.X_OK):
        return service
    return state_home(environ) / "sollol" / "head"
