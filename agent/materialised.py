"""What running engines have already taken out of the free memory that was measured.

The ledger must not subtract those bytes twice. Weights that are mapped from a file stay "available" to the system
however much is promised for them, so of the CPU's share only anonymous memory counts. Of a GPU's share all counts once
the engine is ready and nothing before: until then drivers and promises overlap by an unknown part, and doubt is
resolved against a new promise.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

from sollol.report import Instance, InstanceState

from agent.probe import CPU_ID

_LIVE = frozenset({InstanceState.STARTING, InstanceState.READY, InstanceState.STOPPING})


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
    """Bytes per pool and device, never more than the pool's share of it."""
    return {
        instance.instance_id: {
            share.device_id: _taken(instance, share.device_id, share.total_bytes, anonymous)
            for share in instance.shares
        }
        for instance in instances
        if instance.state in _LIVE
    }


def _taken(instance: Instance, device_id: str, share_bytes: int, anonymous: Callable[[int], int]) -> int:
    if device_id == CPU_ID:
        return min(share_bytes, anonymous(instance.pid)) if instance.pid else 0
    return share_bytes if instance.state is InstanceState.READY else 0
