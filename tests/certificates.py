"""Certificates for tests: a cluster's authority, and directories as daemons want them."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

from sollol.certificates import read
from sollol.identity import checked

from sollold.pki.authority import Authority, issue, new_authority, new_key, revocations


def authority(cluster: str = "test") -> Authority:
    return new_authority(cluster)


def write_identity(
    directory: Path,
    signed_by: Authority,
    role: str,
    node_id: str,
    *,
    days: float = 90,
    trusts: bytes = b"",
    expired: bool = False,
    cluster: str = "",
) -> Path:
    """`ca.pem`, `node.pem` and `node.key` with a new key; returns the directory. `trusts` stands in for the CA."""
    directory.mkdir(parents=True, exist_ok=True)
    key = new_key()
    now = datetime.now(UTC) - timedelta(days=days + 1 if expired else 0)
    identity = checked(cluster or signed_by.cluster, role, node_id)
    replace_file(directory / "ca.pem", trusts or signed_by.certificate)
    replace_file(directory / "node.key", key)
    replace_file(directory / "node.pem", issue(signed_by, identity, key, days=days, now=now))
    return directory


def revoke(directory: Path, signed_by: Authority, *who: Path, number: int = 1) -> None:
    """Have `directory` refuse those whose directories these are, by a list of that number."""
    replace_file(directory / "revoked", revoked_list(signed_by, *who, number=number))


def revoked_list(signed_by: Authority, *who: Path, number: int = 1) -> bytes:
    return revocations(signed_by, [serial_of(each) for each in who], number)


def serial_of(directory: Path) -> str:
    return read((directory / "node.pem").read_bytes()).serial


def replace_file(path: Path, content: bytes) -> None:
    beside = path.with_name(f".{path.name}.new")
    beside.touch(0o600)
    beside.write_bytes(content)
    beside.replace(path)
