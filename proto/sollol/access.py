"""Who may call what: every method of every service, by the role in the caller's certificate.

What is not here is denied. A test walks over all services and fails when a method is missing.
"""

from collections.abc import Mapping

from sollol.identity import Role

ANYBODY = frozenset(Role)
_HEADS = frozenset({Role.HEAD})
_DAEMONS = frozenset({Role.HEAD, Role.AGENT})
_USERS = frozenset({Role.CLIENT, Role.ADMIN, Role.HEAD})
_OPERATORS = frozenset({Role.ADMIN})


def _of(service: str, roles: frozenset[Role], *methods: str) -> dict[str, frozenset[Role]]:
    return {f"/{service}/{method}": roles for method in methods}


ACCESS: Mapping[str, frozenset[Role]] = {
    **_of(
        "sollol.v1.AgentService",
        _HEADS,
        *("GetReport", "WatchReport", "Reserve", "Release", "StartBackend", "StartCoordinator", "WatchInstance"),
        *("Stop", "SetCordoned", "Relay", "TailLog", "MeasureLink"),
    ),
    **_of("sollol.v1.AgentService", _DAEMONS, "ProbeLink"),
    **_of("sollol.v1.RevocationService", _HEADS, "ExchangeRevoked"),
    **_of("sollol.v1.InferenceService", _USERS, "Chat", "Complete", "ListModels"),
    **_of(
        "sollol.v1.ClusterService",
        _OPERATORS,
        *("ListNodes", "ListPools", "Place", "Load", "Unload", "Cordon", "Uncordon", "Drain", "TailPoolLog"),
    ),
    **_of("grpc.health.v1.Health", ANYBODY, "Check", "List", "Watch"),
}
