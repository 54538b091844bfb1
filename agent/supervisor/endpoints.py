"""Where coordinators are reached: on a unix socket each, and on a TCP port when people's own tools shall reach them."""

from pathlib import Path

from msgspec import Struct
from sollol.errors import Reason, refuse

from agent.supervisor.ports import Ports


class TcpSite(Struct, frozen=True, kw_only=True):
    """What all coordinators of this node that listen on TCP have in common.

    Attributes:
        listen: The address they listen on.
        host: Where others reach that.
        ports: For one coordinator each, the lowest free one first.
        key: What whoever asks them must know; empty: nothing. It holds for their unix sockets too.
    """

    listen: str
    host: str
    ports: range
    key: str = ""


class Endpoint(Struct, frozen=True, kw_only=True):
    """`port` is 0 for a coordinator that listens on its socket only; `url` is for people."""

    url: str
    listen: str = ""
    port: int = 0


class Endpoints:
    """Owner of the ports that coordinators listen on.

    Args:
        site: None: on their unix sockets only.
    """

    def __init__(self, site: TcpSite | None) -> None:
        self._site = site
        self._ports = Ports(site.ports, host=site.listen) if site is not None else None
        self._taken: dict[str, int] = {}

    @property
    def key(self) -> str:
        return self._site.key if self._site is not None else ""

    def claim(self, pool_id: str, socket: Path) -> Endpoint:
        """Return where this pool's coordinator shall listen; its port is nobody else's until `give_back`.

        Raises:
            SollolError: PORT_TAKEN when all of them are.
        """
        if self._site is None or self._ports is None:
            return Endpoint(url=f"unix:{socket}")
        port = self._ports.claim()
        if port is None:
            first, last, listen = self._site.ports.start, self._site.ports.stop - 1, self._site.listen
            raise refuse(
                Reason.PORT_TAKEN,
                f"none of the ports {first} to {last} is free on {listen} for a coordinator: stop what listens there, "
                "or set coordinator_port to another",
                retryable=True,
                numbers={"first_port": first, "last_port": last},
            )
        self._taken[pool_id] = port
        host = f"[{self._site.host}]" if ":" in self._site.host else self._site.host
        return Endpoint(url=f"http://{host}:{port}", listen=self._site.listen, port=port)

    def hold(self, pool_id: str, endpoint: Endpoint) -> None:
        """This pool's coordinator listens there already."""
        if endpoint.port and self._ports is not None:
            self._taken[pool_id] = endpoint.port
            self._ports.hold(endpoint.port)

    def give_back(self, pool_id: str) -> None:
        """The coordinator is gone, or never was."""
        port = self._taken.pop(pool_id, None)
        if port is not None and self._ports is not None:
            self._ports.give_back(port)
