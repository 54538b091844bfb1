"""Who somebody is: the name in a certificate, `spiffe://sollol/<cluster>/<role>/<id>`, and how it is written as DNS."""

import re
from enum import StrEnum

from msgspec import Struct

_CLUSTER = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
# A host's name or a person's; dots and underscores are in both.
_ID = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
_URI = re.compile(rf"spiffe://sollol/({_CLUSTER})/(head|agent|client|admin)/({_ID})")
_DOMAIN = "sollol"
POOL_SECRET_BYTES = 32
"""Of what the nodes of one pool know beside their certificates: these say who they are, not in which pool."""


class Role(StrEnum):
    """What a certificate lets its owner be. A client asks models; an admin also operates the cluster."""

    HEAD = "head"
    AGENT = "agent"
    CLIENT = "client"
    ADMIN = "admin"


class Identity(Struct, frozen=True):
    """`node_id` is the name within cluster and role: the node's for agents."""

    cluster: str
    role: Role
    node_id: str

    @property
    def uri(self) -> str:
        return f"spiffe://sollol/{self.cluster}/{self.role}/{self.node_id}"

    @property
    def dns_name(self) -> str:
        """What a TLS client expects of exactly this peer; addresses change, and are in no certificate."""
        return f"{self.node_id}.{role_name(self.role)}".lower()

    @property
    def dns_names(self) -> tuple[str, str]:
        return self.dns_name, role_name(self.role)

    def __str__(self) -> str:
        return f"{self.role} {self.node_id} of {self.cluster}"


def role_name(role: Role) -> str:
    """What a TLS client expects of any peer of a role."""
    return f"{role}.{_DOMAIN}"


def checked(cluster: str, role: str, node_id: str) -> Identity:
    """Raises ValueError: a part cannot stand in a certificate."""
    identity = parse(f"spiffe://sollol/{cluster}/{role}/{node_id}")
    if identity is None:
        raise ValueError(
            f'"{role} {node_id}" of cluster "{cluster}" cannot stand in a certificate: the role is head, agent, client '
            "or admin, the id 1 to 63 of A-Z a-z 0-9 . _ - between letters or digits, the cluster the same in lower "
            "case without . and _"
        )
    return identity


def parse(uri: str) -> Identity | None:
    """Return what a URI names; None when it is not ours."""
    found = _URI.fullmatch(uri)
    return Identity(found[1], Role(found[2]), found[3]) if found else None
