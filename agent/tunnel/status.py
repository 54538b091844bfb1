"""What a tunnel tells its agent, as forwarders do."""

import json
from pathlib import Path
from typing import Any, NamedTuple


class RouteStatus(NamedTuple):
    """`up_bytes` went to the backend of `node_id`.

    `failed` is about the last connection that could not be made, or that ended first at the backend's side: why.
    """

    node_id: str
    port: int
    open: int = 0
    connections: int = 0
    up_bytes: int = 0
    down_bytes: int = 0
    failed: str = ""


class TunnelStatus(NamedTuple):
    """`ended` is empty while it runs, then says why."""

    routes: tuple[RouteStatus, ...]
    refused: int = 0
    ended: str = ""

    def as_json(self) -> dict[str, Any]:
        return {**self._asdict(), "routes": [route._asdict() for route in self.routes]}


def read_tunnel_status(path: Path) -> TunnelStatus | None:
    """Return the newest status; None when there is none yet."""
    try:
        found = json.loads(path.read_text())
        return TunnelStatus(**{**found, "routes": tuple(RouteStatus(**route) for route in found["routes"])})
    except (FileNotFoundError, ValueError, TypeError, KeyError):  # no file, or one of another version
        return None
