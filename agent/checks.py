"""What heads may ask for: ids, time-outs and plans within their ranges, before anything acts on them. Pure."""

import ipaddress
import re
from collections.abc import Mapping, Sequence

import msgspec
from google.protobuf.message import Message
from sollol import wire
from sollol.errors import Reason, SollolError, refuse
from sollol.identity import POOL_SECRET_BYTES
from sollol.memory import KV_TYPES
from sollol.names import check_model_name
from sollol.report import BackendEndpoint, CoordinatorPlan, DeviceShare

from agent.supervisor.lending import SUFFIX

MAX_TTL_S = 600.0
MAX_BYTES = 1 << 50  # a pebibyte: more than that on one device is a mistake of the caller
_ID = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_DEVICE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,63}")
# Lowest and highest value of each number of a plan; nearly all become engine flags.
_RANGES = {
    "parallel": (1, 1024),
    "context_per_slot": (1, 1 << 24),
    "batch": (1, 1 << 16),
    "ubatch": (1, 1 << 16),
    "threads": (0, 1024),
    "pool_number": (0, 1023),
}
_MAX_SHARES = 64
_MAX_BACKENDS = 15  # the engine's own limit of devices over RPC
_MAX_HOSTS = 16
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")  # a name or an IPv4 address
_MAX_LAYERS = 4096
_MAX_MS_PER_TOKEN = 1e9
_MAX_NODE_ID = 255
_MAX_PORT = 65535


def check_id(found: str, what: str) -> str:
    """Return `found` when it can be a pool or instance id.

    Raises:
        SollolError: INVALID_REQUEST.
    """
    if not _ID.fullmatch(found):
        raise _invalid(f"{what} {found[:40]!r} is not 1 to 128 of A-Z a-z 0-9 _ . -")
    return found


def check_pool_id(found: str) -> str:
    """Return `found` when it can be a pool id: an id that names no backend.

    Raises:
        SollolError: INVALID_REQUEST.
    """
    if check_id(found, "pool id").endswith(SUFFIX):
        raise _invalid(f"pool id {found[:40]!r} ends with {SUFFIX}, as the ids of backends do")
    return found


def check_instance_id(found: str) -> str:
    """Return `found` when it can be a coordinator's id, which is its pool's, or a backend's."""
    check_id(found.removesuffix(SUFFIX), "instance id")
    return found


def check_peer(node_id: str, host: str, port: int) -> tuple[str, str, int]:
    """Return all three when they can be another agent's.

    Raises:
        SollolError: INVALID_REQUEST, naming the field.
    """
    if not 1 <= len(node_id) <= _MAX_NODE_ID:
        raise _invalid(f"node id {node_id[:40]!r} is not 1 to {_MAX_NODE_ID} characters")
    if not (_HOST.fullmatch(host) or _is_address(host)):
        raise _invalid(f"host {host[:40]!r} is no name and no address")
    if not 1 <= port <= _MAX_PORT:
        raise _invalid(f"port {port} is not 1 to {_MAX_PORT}")
    return node_id, host, port


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def check_backend(
    pool_id: str, device_ids: Sequence[str], threads: int, allowed_hosts: Sequence[str], attach_within_s: float
) -> None:
    """Accept what can become a backend's command line and its forwarder's.

    Raises:
        SollolError: INVALID_REQUEST, naming the field.
    """
    check_pool_id(pool_id)
    if not 1 <= len(set(device_ids)) == len(device_ids) <= _MAX_BACKENDS:
        raise _invalid(f"a backend lends 1 to {_MAX_BACKENDS} devices, each once")
    for device_id in device_ids:
        _check_device(device_id)
    _check_within("threads", threads)
    if not 1 <= len(allowed_hosts) <= _MAX_HOSTS:
        raise _invalid(f"a backend has 1 to {_MAX_HOSTS} allowed hosts, not {len(allowed_hosts)}")
    for host in allowed_hosts:
        _check_host(host)
    if not 1 <= attach_within_s <= MAX_TTL_S:  # NaN fails too
        raise _invalid(f"attach_within_s is {attach_within_s}, not 1 to {MAX_TTL_S:.0f} seconds")


def check_tunnel(coordinator_node: str, secret: bytes) -> None:
    """Accept what admits the coordinator's node, or nobody in particular.

    Raises:
        SollolError: INVALID_REQUEST, naming the field and never the secret.
    """
    if len(coordinator_node) > _MAX_NODE_ID:
        raise _invalid(f"coordinator_node is longer than {_MAX_NODE_ID} characters")
    if len(secret) not in (0, POOL_SECRET_BYTES):
        raise _invalid(f"pool_secret has {len(secret)} bytes, not {POOL_SECRET_BYTES}")
    if secret and not coordinator_node:
        raise _invalid("pool_secret is of no use without the coordinator_node that shall show it")


def check_ttl(ttl_s: float) -> float:
    if not 1 <= ttl_s <= MAX_TTL_S:  # NaN fails too
        raise _invalid(f"ttl_s is {ttl_s}, not 1 to {MAX_TTL_S:.0f} seconds")
    return ttl_s


def check_bytes(wanted: Mapping[str, int]) -> dict[str, int]:
    if not 1 <= len(wanted) <= _MAX_SHARES:
        raise _invalid(f"a reservation names 1 to {_MAX_SHARES} devices, not {len(wanted)}")
    for device_id, size in wanted.items():
        _check_device(device_id)
        if not 0 <= size <= MAX_BYTES:
            raise _invalid(f"{size} bytes on {device_id} are not within 0 to {MAX_BYTES}")
    return dict(wanted)


def plan_of(message: Message) -> CoordinatorPlan:
    """Read a plan and check it.

    Raises:
        SollolError: as `check_plan`.
    """
    try:
        plan = wire.value(CoordinatorPlan, message)
    except msgspec.ValidationError as error:
        raise _invalid(f"the plan is not readable: {error}") from error
    check_plan(plan)
    return plan


def check_plan(plan: CoordinatorPlan) -> None:
    """Accept a plan whose every field can become an engine flag.

    Raises:
        SollolError: INVALID_REQUEST or INVALID_MODEL_NAME, naming the field.
    """
    check_model_name(plan.model)
    for name in _RANGES:
        _check_within(name, getattr(plan, name))
    if plan.ubatch > plan.batch:
        raise _invalid(f"plan.ubatch ({plan.ubatch}) is larger than plan.batch ({plan.batch})")
    if plan.kv_type not in KV_TYPES:
        raise _invalid(f"plan.kv_type is {plan.kv_type[:20]!r}, not one of {', '.join(sorted(KV_TYPES))}")
    if not 1 <= len(plan.shares) <= _MAX_SHARES:
        raise _invalid(f"a plan has 1 to {_MAX_SHARES} shares, not {len(plan.shares)}")
    for share in plan.shares:
        _check_share(share)
    # The coordinator's node may have its CPU twice: without layers for itself, and with those of a backend there.
    devices = [(share.node_id, share.device_id, share.layers > 0) for share in plan.shares]
    if len(set(devices)) != len(devices):
        raise _invalid("a plan names each device of a node once")
    if not 0 <= plan.predicted_ms_per_token <= _MAX_MS_PER_TOKEN:  # NaN fails too
        raise _invalid(
            f"plan.predicted_ms_per_token is {plan.predicted_ms_per_token}, not 0 to {_MAX_MS_PER_TOKEN:.0f}"
        )
    if len(plan.backends) > _MAX_BACKENDS:
        raise _invalid(f"a plan has at most {_MAX_BACKENDS} backends, not {len(plan.backends)}")
    for backend in plan.backends:
        _check_endpoint(backend)
    _check_plans_secret(plan)


def _check_plans_secret(plan: CoordinatorPlan) -> None:
    if len(plan.pool_secret) != (POOL_SECRET_BYTES if any(each.tunnelled for each in plan.backends) else 0):
        raise _invalid(
            f"plan.pool_secret has {len(plan.pool_secret)} bytes: {POOL_SECRET_BYTES} with a tunnelled backend, else 0"
        )


def check_covered(plan: CoordinatorPlan, reserved: Mapping[str, int], node_id: str) -> None:
    """Accept a plan whose every share on this node fits into the bytes reserved for its pool.

    Raises:
        SollolError: RESERVATION_MISSING, with the figures.
    """
    needed: dict[str, int] = {}
    for share in plan.shares:
        if share.node_id in ("", node_id):
            needed[share.device_id] = needed.get(share.device_id, 0) + share.total_bytes
    for device_id, size in needed.items():
        have = reserved.get(device_id, 0)
        if size > have:
            raise refuse(
                Reason.RESERVATION_MISSING,
                f"the plan puts {size} bytes on {device_id}, its pool reserved {have} there: "
                "reserve what the plan says",
                numbers={"needed_bytes": size, "reserved_bytes": have},
            )


def check_reserved(device_ids: Sequence[str], reserved: Mapping[str, int], pool_id: str) -> None:
    """Accept devices on each of which the pool has reserved something.

    Raises:
        SollolError: RESERVATION_MISSING.
    """
    missing = [device_id for device_id in device_ids if not reserved.get(device_id)]
    if missing:
        message = f"pool {pool_id!r} has no (or no longer a) reservation on {', '.join(missing)}: reserve what it lends"
        raise refuse(Reason.RESERVATION_MISSING, message, retryable=True)


def _check_endpoint(backend: BackendEndpoint) -> None:
    _check_host(backend.host)
    if not 1 <= backend.port <= 65535:
        raise _invalid(f"port {backend.port} of the backend on {backend.host} is not 1 to 65535")
    if not backend.device_ids:
        raise _invalid(f"the backend on {backend.host} lends no device")
    for device_id in backend.device_ids:
        _check_device(device_id)
    _check_within("threads", backend.threads)


def _check_host(host: str) -> None:
    if not _HOST.fullmatch(host):
        raise _invalid(f"{host[:40]!r} is neither a host name nor an IPv4 address")


def _check_within(name: str, found: int) -> None:
    lowest, highest = _RANGES[name]
    if not lowest <= found <= highest:
        raise _invalid(f"{name} is {found}, not {lowest} to {highest}")


def _check_share(share: DeviceShare) -> None:
    _check_device(share.device_id)
    if share.layers > _MAX_LAYERS:
        raise _invalid(f"{share.layers} layers on {share.device_id} are more than {_MAX_LAYERS}")
    parts = share.weight_bytes + share.kv_bytes + share.compute_bytes + share.margin_bytes
    if parts != share.total_bytes or parts > MAX_BYTES:
        raise _invalid(f"the bytes on {share.device_id} add up to {parts}, its total says {share.total_bytes}")


def _check_device(device_id: str) -> None:
    if not _DEVICE_ID.fullmatch(device_id):
        raise _invalid(f"device id {device_id[:40]!r} is not 1 to 64 of A-Z a-z 0-9 _ . : -")


def _invalid(message: str) -> SollolError:
    return refuse(Reason.INVALID_REQUEST, message)
