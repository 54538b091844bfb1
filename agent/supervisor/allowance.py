"""How much of the node's memory one engine may take before the kernel ends it. Pure.

It protects the node from an engine that runs away; it must never end a healthy one.
"""

from collections.abc import Container, Mapping

from sollol.report import CoordinatorPlan

from agent.supervisor.command import CACHE_RAM_MIB, CPU
from agent.supervisor.lending import BackendWish

MIB = 1 << 20
_ROOM_BYTES = 512 * MIB
_DRIVER_BYTES = 1024 * MIB


def limit_bytes(reserved: Mapping[str, int], passing_bytes: int = 0, unified: Container[str] = ()) -> int | None:
    """Return the limit for an engine that was promised these bytes by device id; None when it was promised none.

    - What is reserved on the CPU: weights, KV cache, compute buffers and margin. Mapped weights are charged as page
      cache, which the kernel takes back before it ends anybody. So is what is reserved on `unified` GPUs, which take it
      from the same memory.
    - What the prompt cache may take, which no reservation counts.
    - A quarter of it, and 512 MiB: predictions are wrong by less, and small models are mostly the program itself and
      its threads' stacks and arenas.
    - 1 GiB where it uses a GPU: drivers keep contexts, pinned buffers and compiled kernels in the host's memory.
    - `passing_bytes`: the largest tensor that it sends or receives over RPC, which lies in its memory a second time.
    """
    if not reserved:
        return None
    own_bytes = sum(size for device, size in reserved.items() if device == CPU or device in unified)
    own_bytes += CACHE_RAM_MIB * MIB
    driver_bytes = _DRIVER_BYTES if any(device != CPU for device in reserved) else 0
    return own_bytes + own_bytes // 4 + _ROOM_BYTES + driver_bytes + passing_bytes


def sent_bytes(plan: CoordinatorPlan) -> int:
    """No tensor that a coordinator sends to a backend is larger than this."""
    return max((share.total_bytes for share in plan.shares), default=0) if plan.backends else 0


def received_bytes(wish: BackendWish) -> int:
    """No tensor that a backend receives is larger than what it lends on one device."""
    return max(wish.bytes.values(), default=0)
