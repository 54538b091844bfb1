"""Where a daemon keeps state, engine logs and sockets: systemd's directories, else the user's XDG ones."""

import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sollol.config import ConfigError


@dataclass(frozen=True)
class Directories:
    """All three exist and belong to this user; `run` and `state` are private (0700) unless systemd made them."""

    state: Path
    log: Path
    run: Path


def directories(
    environ: Mapping[str, str], *, state: str = "auto", log: str = "auto", run: str = "auto"
) -> Directories:
    """Resolve "auto", expand `~`, and create what is missing.

    Raises:
        ConfigError: a directory cannot be made, or one that others could have prepared in /tmp is not ours alone.
    """
    state_path = _chosen("state_dir", state, environ.get("STATE_DIRECTORY"), lambda: state_home(environ) / "sollol")
    log_path = _chosen("log_dir", log, environ.get("LOGS_DIRECTORY"), lambda: state_home(environ) / "sollol" / "log")
    run_path = _chosen("run_dir", run, environ.get("RUNTIME_DIRECTORY"), lambda: runtime_directory(environ))
    return Directories(state=state_path, log=log_path, run=run_path)


def _chosen(setting: str, configured: str, systemd: str | None, fallback: Callable[[], Path]) -> Path:
    if configured != "auto":
        path = Path(configured).expanduser()
    elif systemd:
        path = Path(systemd.split(":")[0])  # systemd lists several when the unit names several
    else:
        path = fallback()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{setting} = {path}: cannot be made: {error.strerror}; set {setting} to another") from error
    return path.absolute()


def _home(environ: Mapping[str, str]) -> Path:
    return Path(environ["HOME"]) if environ.get("HOME") else Path.home()


def state_home(environ: Mapping[str, str]) -> Path:
    """`$XDG_STATE_HOME`, else `~/.local/state`. Not created."""
    given = environ.get("XDG_STATE_HOME", "")
    return Path(given) if given.startswith("/") else _home(environ) / ".local" / "state"


def cache_directory(environ: Mapping[str, str]) -> Path:
    """`$XDG_CACHE_HOME/sollol`, else `~/.cache/sollol`; built engines live there. Not created."""
    given = environ.get("XDG_CACHE_HOME", "")
    return (Path(given) if given.startswith("/") else _home(environ) / ".cache") / "sollol"


def runtime_directory(environ: Mapping[str, str], *, temporary: Path = Path("/tmp")) -> Path:  # noqa: S108 - checked
    """`$XDG_RUNTIME_DIR/sollol` when that is this user's, else `/tmp/sollol-<uid>`, created private.

    Short on purpose: a unix socket's path has at most 107 bytes.

    Raises:
        ConfigError: the directory in /tmp exists and is not a directory of this user's alone.
    """
    given = environ.get("XDG_RUNTIME_DIR", "")
    if given.startswith("/") and os.path.isdir(given) and os.stat(given).st_uid == os.getuid():  # noqa: PTH112, PTH116
        return private(Path(given) / "sollol")
    return private(temporary / f"sollol-{os.getuid()}")


def private(path: Path) -> Path:
    """Create `path` for this user only, or check that it is so.

    Raises:
        ConfigError: it is a link, another user's, or open to others: somebody else may have prepared it.
    """
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be made: {error.strerror}; set run_dir to another") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise ConfigError(f"{path}: must be a directory of yours with mode 0700; remove it, or set run_dir to another")
    return path
