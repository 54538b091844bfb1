"""An agent's service over parts in memory, behind a real server."""

from contextlib import AsyncExitStack

import pytest
from sollol.channels import new_server

from tests.agent_service import Node
from tests.relays import agent_stub


@pytest.fixture
def node(tmp_path):
    return Node(tmp_path)


@pytest.fixture
async def stack():
    async with AsyncExitStack() as entered:
        yield entered


@pytest.fixture
async def address(node, stack, tmp_path):
    server = new_server()
    node.service.add_to(server)
    server.add_insecure_port(f"unix:{tmp_path}/agent.sock")
    await server.start()
    stack.push_async_callback(server.stop, 0)
    return f"unix:{tmp_path}/agent.sock"


@pytest.fixture
async def stub(stack, address):
    return await stack.enter_async_context(agent_stub(address))
