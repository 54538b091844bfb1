"""Which files make SOLLOL a service, and what they say on this machine. Decides only; `systemd` writes and removes."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HEAD, AGENT = "sollold.service", "sollol-agent.service"
_ENGINES = "sollol-engines.service"
_WITH_SUBGROUPS = 254  # systemd's version; earlier ones complain about DelegateSubgroup
_BY_HAND = re.compile(r"(?m)^(ExecStart=)/bin/sh -c '.*; exec (.*)'$|^ExecStopPost=.*\n")
_SYSTEM = Path("etc")
_HOMES = tuple(map(Path, ("/home", "/root", "/run/user")))
_PROGRAMS = {"/usr/bin/sollold": "sollold", "/usr/bin/sollol-agent": "agent"}


@dataclass(frozen=True)
class Service:
    """One daemon as a service: the unit to enable, all of its units, and the example of its settings."""

    unit: str
    units: tuple[str, ...]
    settings: str


SERVICES = {"head": Service(HEAD, (HEAD,), "head.toml"), "agent": Service(AGENT, (_ENGINES, AGENT), "agent.toml")}


@dataclass(frozen=True)
class UnitFile:
    """`settings`: it becomes the owner's, and is neither written again nor removed. `mode` is its permissions."""

    path: Path
    text: str
    settings: bool = False
    mode: int = 0o644


@dataclass(frozen=True)
class Site:
    """Where the files go, and the interpreter that the units start.

    Args:
        shipped: The directory of the files as they are shipped.
        root: `/`, or the directory that is to become one.
        configuration: For one user's services only: their `$XDG_CONFIG_HOME`.
        home: A directory that the interpreter needs lies in somebody's home.
        systemd: The version that is to read the units; 0: any may be.
    """

    shipped: Path
    root: Path
    interpreter: Path
    configuration: Path | None = None
    home: bool = False
    systemd: int = 0

    def under_root(self, path: Path) -> Path:
        return self.root / path.relative_to(path.anchor)

    @property
    def units(self) -> Path:
        if self.configuration:
            return self.under_root(self.configuration / "systemd/user")
        return self._etc("systemd/system")

    @property
    def settings(self) -> Path:
        return self.under_root(self.configuration / "sollol") if self.configuration else self._etc("sollol")

    def _etc(self, name: str) -> Path:
        return self.root / _SYSTEM / name


def unit_files(name: str, site: Site) -> Iterator[UnitFile]:
    """What the daemon `name`, head or agent, is a service by; nothing that both have."""
    source = site.shipped / "user" if site.configuration else site.shipped
    for unit in SERVICES[name].units:
        yield UnitFile(site.units / unit, for_this_machine((source / unit).read_text(), site))
    example = SERVICES[name].settings
    yield UnitFile(site.settings / example, (site.shipped / example).read_text(), settings=True, mode=0o640)


def common_files(site: Site) -> Iterator[UnitFile]:
    """The user, directories and ports that both daemons share; one user's own services need none."""
    if site.configuration is None:
        for source, target in (
            ("sollol.sysusers", "sysusers.d/sollol.conf"),
            ("sollol.tmpfiles", "tmpfiles.d/sollol.conf"),
            ("sollol.sysctl", "sysctl.d/60-sollol.conf"),
        ):
            yield UnitFile(site.root / _SYSTEM / target, (site.shipped / source).read_text())


def for_this_machine(text: str, site: Site) -> str:
    """The shipped unit, with the commands of packages replaced by this interpreter's."""

    def started(found: re.Match[str]) -> str:
        return re.sub("|".join(_PROGRAMS), lambda each: f"{site.interpreter} -P -m {_PROGRAMS[each[0]]}", found[0])

    if site.systemd >= _WITH_SUBGROUPS:
        text = _with_subgroup(text)
    text = re.sub(r"(?m)^Exec\w+=.*$", started, text)
    if site.home:
        text = re.sub(
            r"(?m)^ProtectHome=yes$", "# ProtectHome: the interpreter lies in a home.\nProtectHome=read-only", text
        )
    return text


def _with_subgroup(text: str) -> str:
    """The agent's unit for a systemd that puts its main process beside engines, instead of a shell that does."""
    if "\nDelegate=yes\n" not in text:
        return text
    plain = _BY_HAND.sub(lambda found: f"{found[1]}{found[2]}" if found[1] else "", text)
    return plain.replace("\nDelegate=yes\n", "\nDelegate=yes\nDelegateSubgroup=agent\n")


def version_in(text: str) -> int:
    """The number in what `systemctl --version` prints, as in "systemd 252 (252.39-1)"; 0 when there is none."""
    found = re.match(r"systemd (\d+)\b", text)
    return int(found[1]) if found else 0


def is_plain(path: Path) -> bool:
    """Whether a path is one word for systemd and for a shell, as it stands."""
    return re.fullmatch(r"[\w./+@:,=-]+", str(path), re.ASCII) is not None


def in_a_home(path: Path) -> bool:
    return any(path.is_relative_to(home) for home in _HOMES)
