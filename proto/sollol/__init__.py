"""The contract: everything the head, the agents and users' programs must agree on.

Importing this package switches grpc's fork handlers off before grpc can be imported: with them on, children that a
daemon spawns under load die at random before exec.
"""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sollol.client import Client

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
# Otherwise grpc's C core writes lines of its own form into the daemons' logs whenever a peer goes away.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

__version__ = "0.1.0"
__all__ = ["Client", "__version__"]


def __getattr__(name: str) -> object:
    """Import the client on first use: most commands and every daemon go without it."""
    if name == "Client":
        from sollol.client import Client  # noqa: PLC0415 -- lazily: grpc takes 100 ms

        return Client
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
