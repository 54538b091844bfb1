"""Real counts without a head around them, and what a page of them says."""

from collections.abc import Iterable

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from sollold.front.metrics import MetricsPage
from sollold.gauges import Facts
from sollold.metrics import Metrics

NOTHING = Facts(nodes=(), pools=(), models=(), certificates_expire_in_s={})
KNOWN = {"tiny": "tiny", "tiny:latest": "tiny"}


def counting() -> Metrics:
    return Metrics(KNOWN.get)


def page_of(metrics: Metrics, facts: Facts = NOTHING) -> MetricsPage:
    return MetricsPage(metrics, lambda: facts)


def families(page: str) -> dict[str, Metric]:
    """By name as the page spells it: Prometheus's own parser takes `_total` off counters."""
    return {
        f"{family.name}_total" if family.type == "counter" else family.name: family
        for family in text_string_to_metric_families(page)
    }


def samples(found: Iterable[Metric]) -> dict[str, float]:
    """By `name{label=value}`, labels in alphabetical order."""
    return {
        f"{sample.name}{{{','.join(f'{label}={value}' for label, value in sorted(sample.labels.items()))}}}": sample.value
        for family in found
        for sample in family.samples
    }
