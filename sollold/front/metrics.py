"""`GET /metrics`: what the head counts and what its nodes report, for Prometheus."""

import asyncio
import time
from collections.abc import Callable, Iterator

from aiohttp import web
from prometheus_client import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from sollol.certified import expires_in_s
from sollol.tls import TlsFiles

from sollold.catalogue import Catalogue
from sollold.front.https import HttpsFiles
from sollold.gauges import Facts, gauges
from sollold.metrics import Metrics
from sollold.nodes import Nodes
from sollold.pools import Pools

PATH = "/metrics"


class MetricsPage:
    """The page.

    Args:
        metrics: What was counted.
        facts: What is known now; asked from the event loop, and written out in a thread: with many nodes it takes long.
    """

    def __init__(self, metrics: Metrics, facts: Callable[[], Facts]) -> None:
        self.metrics, self._facts = metrics, facts

    async def answer(self, accept: str) -> web.Response:
        """In the form that `accept` asks for, Prometheus's own text if in doubt."""
        try:
            write, content_type = choose_encoder(accept)
        except (TypeError, ValueError):  # the library compares a version that is none with one
            write, content_type = choose_encoder("")
        page = await asyncio.to_thread(write, _Page(self.metrics, self._facts()))
        return web.Response(body=page, headers={"Content-Type": content_type})


def facts_of(nodes: Nodes, pools: Pools, catalogue: Catalogue, tls: TlsFiles | None, https: HttpsFiles | None) -> Facts:
    """What is known of them now. The head has `tls` for its gRPC port, `https` for this one."""
    ends = {"grpc": expires_in_s(tls)} if tls is not None else {}
    if https is not None and https.expires_unix_s is not None:
        ends["https"] = https.expires_unix_s - time.time()
    return Facts(
        nodes=nodes.statuses(),
        pools=pools.all(),
        models=tuple(model.name for model in catalogue.models()),
        certificates_expire_in_s=ends,
    )


class _Page(Collector):
    def __init__(self, metrics: Metrics, facts: Facts) -> None:
        self._metrics, self._facts = metrics, facts

    def collect(self) -> Iterator[Metric]:
        yield from self._metrics.collect()
        yield from gauges(self._facts)
