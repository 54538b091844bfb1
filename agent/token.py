"""Which agent of its name this is, for registry and heads: of two with one node id, one is the node."""

import secrets
from pathlib import Path

import structlog
from sollol import kept
from sollol.errors import Reason, refuse
from sollol.registry import Registry, RegistryUnavailable

log = structlog.get_logger(__name__)

FILE_NAME = "agent-token.json"
VERSION = 1


def own_token(state: Path) -> str:
    """The same for every agent with this state directory, so that one that is restarted is no other.

    Raises:
        OSError: the directory cannot be written.
    """
    found = kept.load(state / FILE_NAME, str, version=VERSION)
    if not found:
        found = secrets.token_hex(16)
        kept.save(state / FILE_NAME, found, version=VERSION)
    return found


async def claim(registry: Registry | None, node_id: str, token: str, lease_s: float) -> None:
    """Take the node id, as far as the registry can tell. Heads refuse a second one, too, but cannot know who is first.

    Raises:
        SollolError: NODE_ID_IN_USE; another agent of that name has a lease that stands.
    """
    if registry is None:
        return
    try:
        if await registry.claim(node_id, token, lease_s):
            return
    except RegistryUnavailable as error:
        log.warning("node_id_not_checked", node=node_id, problem=str(error), hint="heads refuse a second one")
        return
    raise refuse(
        Reason.NODE_ID_IN_USE,
        f"another agent is node {node_id}: give this one another --node-id; or, if that one is gone for good, wait "
        f"{lease_s:.0f} s until its lease has ended",
    )
