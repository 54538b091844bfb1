"""What presence publishes after which report, and in which order."""

from msgspec.structs import replace
from sollol.mqtt_client import Received
from sollol.report import Instance, InstanceState, Report
from sollol.topics import Topics

from agent.presence.home_assistant import Discovery
from agent.presence.presence import Presence

TOPICS = Topics("home")
POOL = Instance(instance_id="p", model="m", state=InstanceState.READY)
REPORT = Report(node_id="a", host="h", port=1, devices=(), instances=(POOL,))
WITHOUT = replace(REPORT, instances=())
STATE, POOL_STATE, EVENT = TOPICS.node_state("a"), TOPICS.pool_state("p"), TOPICS.event()
BIRTH = "homeassistant/status"


class Connection:
    def __init__(self):
        self.published, self.handlers = [], {}

    def subscribe(self, topic, handler):
        self.handlers[topic] = handler

    def publish(self, publication):
        self.published.append(publication)

    def topics(self):
        """Of what was published since the last call."""
        topics = [publication.topic for publication in self.published]
        self.published.clear()
        return topics


def presence(connection, now=(0.0,), **more):
    found = Discovery(TOPICS, cluster="home", node_id="a", prefix="homeassistant", expire_after_s=30)
    made = Presence(
        connection, topics=TOPICS, watch=None, interval_s=10, discovery=found, clock=iter(now).__next__, **more
    )
    return made, found.topic


def test_a_pool_that_went_is_taken_from_home_assistant_before_its_state_is_removed():
    connection = Connection()
    made, config = presence(connection, now=(0, 0.1))
    made.heard(REPORT)
    assert connection.topics() == [POOL_STATE, STATE, config]
    made.heard(WITHOUT)
    assert connection.published[-1].payload == b""
    assert connection.topics() == [EVENT, STATE, config, POOL_STATE]


def test_when_nothing_happens_state_is_told_once_per_interval():
    connection = Connection()
    made, _ = presence(connection, now=(0, 9.9, 10))
    made.heard(REPORT)
    connection.topics()
    made.heard(REPORT)
    assert connection.topics() == []
    made.heard(REPORT)
    assert connection.topics() == [POOL_STATE, STATE]


def test_a_home_assistant_that_starts_is_told_again_and_one_that_ends_is_not():
    connection = Connection()
    made, config = presence(connection)
    made.heard(REPORT)
    connection.topics()
    for word, told in ((b"offline", []), (b"online", [config])):
        connection.handlers[BIRTH](Received(topic=BIRTH, payload=word))
        assert connection.topics() == told


def test_without_discovery_home_assistant_is_told_to_forget_this_node_and_nothing_else():
    connection = Connection()
    made, config = presence(connection, discoverable=False)
    assert [(each.topic, each.payload, each.retain) for each in connection.published] == [(config, b"", True)]
    assert connection.topics() == [config]
    made.heard(REPORT)
    assert config not in connection.topics()
    assert connection.handlers == {}
