"""How the journals are put together: what is promised, and what an agent's restart changes about it."""

import json

from tests.cluster.journal import journal_of, promised

BEGINS, READY = ('{"event":"engine_found"}', '{"event":"agent_ready"}')


def entry(at_s, change, pool_id="p", size=5):
    fields = {"at_s": at_s, "change": change, "pool_id": pool_id, "bytes": {"CPU": size}}
    return json.dumps({"event": "ledger_changed", "entry": fields})


def sums(**logs):
    return list(promised(journal_of({host: "\n".join(lines) for host, lines in logs.items()})))


def test_promises_of_all_hosts_are_told_in_the_order_of_time():
    a = [BEGINS, READY, entry(1, "reserved"), entry(4, "reserved", "q"), entry(5, "bound", "q"), entry(6, "released")]
    b = [BEGINS, READY, entry(2, "reserved", size=7), entry(3, "lapsed", size=7)]
    assert sums(a=a, b=b)[2:] == [
        {("a", "CPU"): 5},
        {("a", "CPU"): 5, ("b", "CPU"): 7},
        {("a", "CPU"): 5},
        {("a", "CPU"): 10},
        {("a", "CPU"): 10},
        {("a", "CPU"): 5},
    ]


def test_of_an_agent_that_was_killed_only_what_the_next_one_promises_again_is_promised():
    killed = [BEGINS, READY, entry(1, "bound"), entry(2, "reserved", "lost")]
    assert sums(a=[*killed, BEGINS, READY])[-1] == {}
    assert sums(a=[*killed, BEGINS, entry(3, "restored"), READY])[-1] == {("a", "CPU"): 5}
    assert sums(a=[*killed, BEGINS, entry(3, "restored"), READY, entry(4, "freed")])[-1] == {}
