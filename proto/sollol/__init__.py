"""The contract: everything the head, the agents and users' programs must agree on.

Importing this package switches grpc's fork handlers off before grpc can be imported: with them on, children that a
daemon spawns under load die at random before exec.
"""

import os

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

__version__ = "0.1.0"
