"""`sollol systemd install|uninstall`: makes the daemons of this very installation services, for all or for one user."""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from sollol.errors import Reason, refuse

from sollold.cli.units import SERVICES, Site, UnitFile, common_files, in_a_home, is_plain, unit_files, version_in

_PACKAGE = Path(__file__).parents[1]
_SYSTEM_WIDE = (
    ("systemd-sysusers", "sollol.conf"),
    ("systemd-tmpfiles", "--create", "sollol.conf"),
    ("/lib/systemd/systemd-sysctl", "60-sollol.conf"),
)


def install(options: argparse.Namespace) -> int:
    """Write the files, say what became of each, and what to do next. Doing it again changes nothing."""
    names = _chosen(options)
    if not names:
        raise refuse(Reason.INVALID_REQUEST, "which daemon? --head, --agent, or both")
    site = _site(options)
    if _is_live(site) and site.configuration is None:
        _check_reach(_needed())
    for file in [*common_files(site), *(file for name in names for file in unit_files(name, site))]:
        _say(_write(file), file.path)
    if _is_live(site):
        _make_known(site)
    _say_next(names, site)
    return 0


def uninstall(options: argparse.Namespace) -> int:
    """Stop the services and remove their files, but not settings, state and the user."""
    site = _site(options)
    names = _chosen(options) or list(SERVICES)
    if _is_live(site):
        units = [SERVICES[name].unit for name in names if (site.units / SERVICES[name].unit).exists()]
        if units:
            _run("systemctl", *_scope(site), "disable", "--now", "--quiet", *units)
    files = [file for name in names for file in unit_files(name, site) if not file.settings]
    others = [name for name in SERVICES if name not in names]
    if not any((site.units / SERVICES[name].unit).exists() for name in others):
        files += common_files(site)
    for file in files:
        if file.path.exists():
            file.path.unlink()
            _say("removed", file.path)
    if _is_live(site):
        _run("systemctl", *_scope(site), "daemon-reload")
    return 0


def _chosen(options: argparse.Namespace) -> list[str]:
    return [name for name in SERVICES if getattr(options, name)]


def _site(options: argparse.Namespace) -> Site:
    root = Path(options.prefix or "/").absolute()
    if root == Path("/") and not options.user and os.geteuid() != 0:
        raise refuse(
            Reason.INVALID_REQUEST,
            "services of the whole machine need root: sudo it, or --user for services of your own, or --prefix DIR",
        )
    if not is_plain(Path(sys.executable)):
        raise refuse(
            Reason.INVALID_REQUEST,
            f"{sys.executable} has characters that mean something to systemd or a shell: install sollol elsewhere",
        )
    return Site(
        shipped=_shipped(),
        root=root,
        interpreter=Path(sys.executable),
        configuration=_configuration_home() if options.user else None,
        home=any(in_a_home(path) for path in _needed()),
        systemd=_version() if root == Path("/") else 0,
    )


def _version() -> int:
    """Of the systemd that is here; 0 when it does not say."""
    if shutil.which("systemctl") is None:
        return 0
    done = subprocess.run(
        ("systemctl", "--version"), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    return version_in(done.stdout)


def _shipped() -> Path:
    """In an installed package; else beside it, in the source tree that it runs from."""
    packaged = _PACKAGE / "systemd"
    return packaged if packaged.is_dir() else _PACKAGE.parent / "systemd"


def _configuration_home() -> Path:
    given = os.environ.get("XDG_CONFIG_HOME", "")
    return Path(given) if given.startswith("/") else Path.home() / ".config"


def _needed() -> list[Path]:
    """What the service's user must reach: this code, its interpreter, and the one that a venv rests on."""
    return [_PACKAGE, Path(sys.executable), Path(sys.executable).resolve()]


def _check_reach(paths: Sequence[Path]) -> None:
    """Refuse before anything is written: the service could not start."""
    for path in paths:
        for folder in path.parents:
            if not folder.stat().st_mode & 0o001:
                raise refuse(
                    Reason.INVALID_REQUEST,
                    f"the services' user, sollol, could not reach {path}: {folder} is closed to others. Install sollol "
                    "where everybody can read it (python3 -m venv /opt/sollol; /opt/sollol/bin/pip install ...), or "
                    "use --user",
                )


def _is_live(site: Site) -> bool:
    """Whether the files are this machine's own, and not being staged for another root."""
    return site.root == Path("/")


def _write(file: UnitFile) -> str:
    if file.path.exists() and (file.settings or file.path.read_text() == file.text):
        return "kept" if file.settings else "unchanged"
    file.path.parent.mkdir(parents=True, exist_ok=True)
    draft = file.path.with_name(file.path.name + ".new")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, file.mode), "w") as out:
        os.fchmod(out.fileno(), file.mode)  # whatever the umask
        out.write(file.text)
    draft.replace(file.path)
    return "wrote"


def _make_known(site: Site) -> None:
    if site.configuration is None:
        for command in _SYSTEM_WIDE:
            _run(*command)
    _run("systemctl", *_scope(site), "daemon-reload")


def _scope(site: Site) -> tuple[str, ...]:
    return ("--user",) if site.configuration else ()


def _run(*command: str) -> None:
    """Say what failed and go on: the files are there, and a machine may lack one of these on purpose."""
    if shutil.which(command[0]) is None:
        _say("not installed:", Path(command[0]))
        return
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.stderr.write(f"sollol: `{' '.join(command)}` failed: {done.stderr.strip() or done.returncode}\n")


def _say(what: str, path: Path) -> None:
    sys.stdout.write(f"{what:9} {path}\n")


def _say_next(names: Sequence[str], site: Site) -> None:
    units = " ".join(SERVICES[name].unit.removesuffix(".service") for name in names)
    user = " --user" if site.configuration else ""
    lines = [f"edit {site.settings / SERVICES[name].settings}" for name in names]
    lines.append(f"systemctl{user} enable --now {units}")
    if site.configuration:
        lines.append("loginctl enable-linger    # so that they run while you are logged out")
    sys.stdout.write("\nnext:\n" + "".join(f"  {line}\n" for line in lines))
