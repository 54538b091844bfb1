"""The notice board: Redis, and the only place that knows its keys.

| key                             | type   | value                                             | life                |
|---------------------------------|--------|---------------------------------------------------|---------------------|
| `sollol:node:<node id>`         | string | JSON of `sollol.report.Report`                    | lease               |
| `sollol:agent:<node id>`        | string | its agent's `host:port`                           | lease               |
| `sollol:owner:<node id>`        | string | the `agent_token` of the one agent of that name   | lease               |
| `sollol:nodes`                  | zset   | node id, scored by its lease's end in server ms   | longest lease in it |
| `sollol:rpc:node:<host>:<port>` | string | JSON of `SeedNode`, the seed's record             | lease               |
| `sollol:events`                 | stream | `kind`, `payload` in JSON: decisions and events   | 10 000 entries      |

Never the only copy of anything, and never obeyed: heads read here where agents are, agents read nothing. What is found
here was written by others, so each value is checked alone, and a bad one costs its own node only. Deadlines are the
server's clock, so that no node's wrong clock makes it or others vanish.
"""

import asyncio
import re
from collections.abc import Awaitable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import msgspec
from msgspec import Struct
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import RedisError

from sollol.report import DeviceKind, Report

NODES_KEY = "sollol:nodes"
EVENTS_KEY = "sollol:events"
EVENTS_KEPT = 10_000

_SOCKET_TIMEOUT_S = 1.0
_RETRIES = 2
_CONNECTIONS = 8  # a burst of events waits for one instead of opening more
_HEALTH_CHECK_S = 15
_CALL_WITHIN_S = 3.0  # against a frozen server the retries of connecting and of asking would multiply

_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.%]{2,64}\]|[A-Za-z0-9_.-]{1,253}):[0-9]{1,5}")

# Writes the report, its place in the index and the seed's record at once. An index of a wrong type is replaced: a
# stranger's SET must not hide the cluster for ever.
_PUBLISH = """
local owner = redis.call('GET', KEYS[5])
if owner and owner ~= ARGV[6] then return 0 end
local time = redis.call('TIME')
local now, lease = time[1] * 1000 + math.floor(time[2] / 1000), tonumber(ARGV[2])
if redis.call('TYPE', KEYS[2]).ok ~= 'zset' then redis.call('DEL', KEYS[2]) end
redis.call('SET', KEYS[1], ARGV[3], 'PX', lease)
redis.call('SET', KEYS[3], ARGV[4], 'PX', lease)
redis.call('SET', KEYS[4], ARGV[5], 'PX', lease)
redis.call('SET', KEYS[5], ARGV[6], 'PX', lease)
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
redis.call('ZADD', KEYS[2], now + lease, ARGV[1])
if redis.call('PTTL', KEYS[2]) < lease then redis.call('PEXPIRE', KEYS[2], lease) end
return 1
"""

# Nobody takes down the report of another agent of the same name.
_WITHDRAW = """
local owner = redis.call('GET', KEYS[1])
if owner and owner ~= ARGV[1] then return 0 end
redis.call('DEL', unpack(KEYS, 1, 4))
if redis.call('TYPE', KEYS[5]).ok == 'zset' then redis.call('ZREM', KEYS[5], ARGV[2]) end
return 1
"""

_CLAIM = """
local owner = redis.call('GET', KEYS[1])
if owner and owner ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""

_LIVE_IDS = """
if redis.call('TYPE', KEYS[1]).ok ~= 'zset' then return {} end
local time = redis.call('TIME')
return redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. time[1] * 1000 + math.floor(time[2] / 1000), '+inf')
"""


def node_key(node_id: str) -> str:
    return f"sollol:node:{node_id}"


def agent_key(node_id: str) -> str:
    return f"sollol:agent:{node_id}"


def owner_key(node_id: str) -> str:
    return f"sollol:owner:{node_id}"


def rpc_node_key(report: Report) -> str:
    """The seed's key of a node, so that the seed's commands go on working."""
    return f"sollol:rpc:node:{report.host}:{report.port}"


class RegistryUnavailable(Exception):  # noqa: N818 - it names a condition that callers live through, not a defect
    """Raised when Redis cannot be reached in time or refuses; what was asked may or may not have been done."""


class SeedNode(Struct, frozen=True, kw_only=True):
    """The seed's record of a node: totals, in MB of 2**20 bytes.

    Only GPUs that layers can go to are listed. A GPU that shares the CPU's memory has 0 of its own.
    """

    has_gpu: bool
    gpu_devices: tuple[str, ...]
    gpu_vram_mb: tuple[int, ...]
    gpu_names: tuple[str, ...]
    cpu_ram_mb: int


def seed_node(report: Report) -> SeedNode:
    gpus = [device for device in report.devices if device.kind is DeviceKind.GPU and device.usable]
    ram = sum(device.total_bytes for device in report.devices if device.kind is DeviceKind.CPU)
    return SeedNode(
        has_gpu=bool(gpus),
        gpu_devices=tuple(gpu.device_id for gpu in gpus),
        gpu_vram_mb=tuple(0 if gpu.unified else gpu.total_bytes >> 20 for gpu in gpus),
        gpu_names=tuple(gpu.name for gpu in gpus),
        cpu_ram_mb=ram >> 20,
    )


class Registry:
    """One client of the notice board. Every call ends within a few seconds.

    Every method but `close` raises RegistryUnavailable.

    Args:
        url: `redis://`, `rediss://` or `unix://`, as redis-py reads them.
        client_name: Shown by `CLIENT LIST`; no spaces.
    """

    def __init__(self, url: str, *, client_name: str = "sollol") -> None:
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=_CONNECTIONS,
            timeout=_SOCKET_TIMEOUT_S,
            client_name=client_name,
            socket_timeout=_SOCKET_TIMEOUT_S,
            socket_connect_timeout=_SOCKET_TIMEOUT_S,
            retry=Retry(ExponentialWithJitterBackoff(cap=0.5, base=0.05), _RETRIES),
            health_check_interval=_HEALTH_CHECK_S,
        )
        self._redis: Redis = Redis.from_pool(pool)
        self._publish = self._redis.register_script(_PUBLISH)
        self._withdraw = self._redis.register_script(_WITHDRAW)
        self._claim = self._redis.register_script(_CLAIM)
        self._live_ids = self._redis.register_script(_LIVE_IDS)

    async def ping(self) -> None:
        await self._ask(self._redis.ping())

    async def claim(self, node_id: str, agent_token: str, lease_s: float) -> bool:
        """Take a node's name for an agent that is about to start; false when another agent has it."""
        return bool(
            await self._ask(self._claim(keys=[owner_key(node_id)], args=[agent_token, max(1, int(lease_s * 1000))]))
        )

    async def publish(self, report: Report, lease_s: float) -> bool:
        """Put a report up for `lease_s` seconds; its node is listed until then or until the next report.

        Returns false, and leaves all as it was, while another agent has the node's name.
        """
        done = await self._ask(
            self._publish(
                keys=[
                    *(node_key(report.node_id), NODES_KEY, rpc_node_key(report), agent_key(report.node_id)),
                    owner_key(report.node_id),
                ],
                args=[
                    report.node_id,
                    max(1, int(lease_s * 1000)),
                    msgspec.json.encode(report),
                    msgspec.json.encode(seed_node(report)),
                    report.address,
                    report.agent_token,
                ],
            )
        )
        return bool(done)

    async def withdraw(self, report: Report) -> None:
        """Take a node's report down at once, when its agent leaves in order."""
        node_id = report.node_id
        keys = [owner_key(node_id), node_key(node_id), rpc_node_key(report), agent_key(node_id), NODES_KEY]
        await self._ask(self._withdraw(keys=keys, args=[report.agent_token, node_id]))

    async def addresses(self) -> tuple[str, ...]:
        """Where agents are whose lease stands, as `host:port`, ordered by node id. Costs no KEYS and no SCAN."""
        raw_ids: list[bytes] = await self._ask(self._live_ids(keys=[NODES_KEY]))
        keys = [agent_key(node_id) for node_id in sorted(raw.decode(errors="backslashreplace") for raw in raw_ids)]
        values: list[bytes | None] = await self._ask(self._redis.mget(keys)) if keys else []
        found = (value.decode(errors="backslashreplace") for value in values if value is not None)
        # Others can write here: nothing but host:port is dialled, no socket path and no resolver's scheme.
        return tuple(address for address in found if _ADDRESS.fullmatch(address))

    async def record(self, kind: str, payload: Struct | Mapping[str, Any]) -> None:
        """Add one decision or event to the history, which drops its oldest entries."""
        entry: dict[Any, Any] = {"kind": kind, "payload": msgspec.json.encode(payload)}
        await self._ask(self._redis.xadd(EVENTS_KEY, entry, maxlen=EVENTS_KEPT, approximate=True))

    async def close(self) -> None:
        await self._redis.aclose()

    async def _ask(self, answer: Awaitable[Any]) -> Any:
        with _no_cancellation_lost():
            try:
                async with asyncio.timeout(_CALL_WITHIN_S):
                    return await answer
            except (RedisError, OSError, TimeoutError) as error:
                raise RegistryUnavailable(f"Redis: {error or type(error).__name__}") from error


@contextmanager
def _no_cancellation_lost() -> Iterator[None]:
    """Raise CancelledError at the end of the block when the task was cancelled in it and nobody said so.

    redis-py waits with `asyncio.wait_for`, which before Python 3.12 drops a cancellation that comes in the moment in
    which its future completes: a loop around our calls would then run for ever.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task else 0
    try:
        yield
    finally:
        if task and task.cancelling() > before:
            raise asyncio.CancelledError
