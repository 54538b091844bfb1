"""The head's queues over nodes whose reports, and loads whose ends, a test writes."""

import asyncio

from sollol.report import Instance, InstanceState

from sollold.away import LOST_AFTER_S
from sollold.numbers import PoolNumbers
from sollold.pools import Pools
from tests.placement_cases import MODEL, node
from tests.waiting import wait_until

STARTING, READY = InstanceState.STARTING, InstanceState.READY


def instance(pool_id="p0", state=READY, parallel=2, model=MODEL, **more):
    return Instance(instance_id=pool_id, model=model, state=state, parallel=parallel, **more)


class Cluster:
    """Nodes whose reports the test writes, and loads that the test ends."""

    def __init__(self, max_queue=2000, limit=1):
        self.nodes = {}
        self.loads = []
        self.sinks = []
        self.numbers = []
        self.pools = Pools(self, load=self.load, numbers=PoolNumbers(self), max_queue=max_queue, limit=lambda _: limit)

    def statuses(self):
        return tuple(self.nodes.values())

    def status(self, node_id):
        return self.nodes.get(node_id)

    async def load(self, wish, number, on_progress):
        ended = asyncio.get_running_loop().create_future()
        self.loads.append((wish, ended))
        self.numbers.append(number)
        self.sinks.append(on_progress)
        return await ended

    def report(self, *instances, node_id="n0", draining=False):
        self.nodes[node_id] = node(node_id, instances=instances, draining=draining)
        self.pools.on_node_changed(node_id)

    def lose(self, node_id="n0", silent_s=LOST_AFTER_S):
        status = self.nodes[node_id]
        self.nodes[node_id] = type(status)(report=status.report, report_age_s=silent_s, connected=False)
        self.pools.on_node_changed(node_id)

    def ask(self, model=MODEL, sink=lambda _: None, asker=""):
        return asyncio.create_task(self.pools.acquire(model, sink, asker=asker))

    async def loading(self, count=1):
        await wait_until(lambda: len(self.loads) == count, what=f"{count} loads began")
        return self.loads[-1][1]


async def settle():
    """Let everything that can go on do so."""
    for _ in range(5):
        await asyncio.sleep(0)


def reason_of(task):
    return task.exception().refusal.reason
