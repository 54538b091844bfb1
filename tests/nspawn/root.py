"""The file system that the machines boot from: Debian with systemd, and our dependencies, but not ourselves. Cached."""

import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sollol.directories import cache_directory

SOURCE = Path(__file__).parents[2]
# What redis wants below Python 3.11.3: pip goes by the conditions of the Python that it runs in.
BESIDES = ("async-timeout>=4.0.3",)
CLEAN = ("env", "-i", "PATH=/usr/bin:/bin:/usr/sbin:/sbin", "HOME=/root", "LC_ALL=C.UTF-8")
PACKAGES = ("systemd", "systemd-sysv", "dbus", "python3", "python3-venv", "iproute2", "redis-server")
VENV = "/opt/sollol"
MADE_WITHIN_S = 600.0


@dataclass(frozen=True)
class Debian:
    """A release, its Python, and what is to be there besides `PACKAGES`. `name` is its place in the cache."""

    name: str
    suite: str
    python: str
    more: tuple[str, ...] = ()


CONTAINER = Debian("container-12", "bookworm", "3.11")


def machine_root(debian: Debian = CONTAINER) -> Path:
    """Make it once, in about two minutes; what went in names it, and another one of that name replaces it."""
    home = cache_directory(os.environ) / "nspawn"
    home.mkdir(parents=True, exist_ok=True)
    root = home / f"{debian.name}-{_key(debian)}"
    with _alone(home / "lock"):
        if not root.exists():
            for other in home.glob(f"{debian.name}-*/"):
                shutil.rmtree(other)
            draft = home / "draft"
            if draft.exists():  # of a run that was interrupted
                shutil.rmtree(draft)
            _make(debian, draft)
            draft.rename(root)
    return root


def wheel(directory: Path) -> Path:
    """This source tree as a user gets it."""
    pip(sys.executable, "wheel", "--no-deps", "--wheel-dir", str(directory), str(SOURCE))
    (built,) = directory.glob("sollol-*.whl")
    return built


def pip(python: str, *words: str, root: Path | None = None) -> None:
    inside = ("chroot", str(root), *CLEAN) if root else ()
    run(*inside, python, "-m", "pip", "--quiet", "--disable-pip-version-check", *words)


def run(*command: str) -> None:
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=MADE_WITHIN_S,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}"


def _requirements() -> list[str]:
    project = tomllib.loads((SOURCE / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *BESIDES]


def _key(debian: Debian) -> str:
    packages = (*PACKAGES, *debian.more)
    made_of = "\n".join((debian.suite, debian.python, *packages, *_requirements(), platform.machine()))
    return hashlib.sha256(made_of.encode()).hexdigest()[:12]


def _make(debian: Debian, root: Path) -> None:
    packages = ",".join((*PACKAGES, *debian.more))
    run("debootstrap", "--variant=minbase", f"--include={packages}", debian.suite, str(root))
    machine = platform.machine()
    known = [f"manylinux_2_{minor}_{machine}" for minor in range(17, 37)] + [f"manylinux2014_{machine}"]
    wheels = root / "wheels"
    pip(
        *(
            sys.executable,
            "download",
            "--dest",
            str(wheels),
            "--only-binary",
            ":all:",
            "--python-version",
            debian.python,
        ),
        *(word for name in known for word in ("--platform", name)),
        *_requirements(),
    )
    run("chroot", str(root), *CLEAN, "python3", "-m", "venv", VENV)
    pip(f"{VENV}/bin/python", "install", "--no-index", "--find-links", "/wheels", *_requirements(), root=root)
    shutil.rmtree(wheels)
    shutil.rmtree(root / "var/cache/apt/archives")
    # Each machine starts what a test wants, and gets an identity of its own when it boots.
    (root / "etc/systemd/system/multi-user.target.wants/redis-server.service").unlink(missing_ok=True)
    (root / "etc/machine-id").write_text("")


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    machine_root()
