"""What running engines have already taken out of the free memory that was measured.

The ledger must not subtract those bytes twice. Weights that are mapped from a file stay "available" to the system
however much is promised for them, so of the CPU's share only anonymous memory counts. Of a GPU's share all counts once
the engine is ready and nothing before: until then drivers and promises overlap by an unknown part, and doubt is
resolved against a new promise.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

from sollol.report import Instance, InstanceKind, InstanceState

from agent.probe import CPU_ID
from agent.supervisor.state import LIVE


def anonymous_bytes(pid: int, root: Path = Path("/")) -> int:
    """Anonymous memory of a process; 0 when it is gone or the system does not say."""
    try:
        lines = (root / "proc" / str(pid) / "status").read_text().splitlines()
    except OSError:  # gone, or no Linux
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def materialised(
    instances: Iterable[Instance], anonymous: Callable[[int], int] = anonymous_bytes
) -> dict[str, dict[str, int]]:
    """Bytes per pool and device, of each instance never more than its own share of it."""
    taken: dict[str, dict[str, int]] = {}
    for instance in instances:
        if instance.state not in LIVE:
            continue
        pool = taken.setdefault(instance.pool_id or instance.instance_id, {})
        for device_id, share_bytes in _own_shares(instance).items():
            pool[device_id] = pool.get(device_id, 0) + _taken(instance, device_id, share_bytes, anonymous)
    return taken


def _own_shares(instance: Instance) -> dict[str, int]:
    """Bytes by device that the instance itself takes on this node: a coordinator's plan also names other nodes'."""
    shares: dict[str, int] = {}
    for share in instance.shares:
        if not share.node_id:
            shares[share.device_id] = shares.get(share.device_id, 0) + share.total_bytes
    return shares


def _taken(instance: Instance, device_id: str, share_bytes: int, anonymous: Callable[[int], int]) -> int:
    if device_id == CPU_ID:
        return min(share_bytes, anonymous(instance.pid)) if instance.pid else 0
    # A backend is ready before anything is on its devices, and nobody says when it is.
    return share_bytes if instance.state is InstanceState.READY and instance.kind is InstanceKind.COORDINATOR else 0
