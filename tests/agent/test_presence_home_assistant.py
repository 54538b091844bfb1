import re

from msgspec.structs import replace
from sollol.report import Instance, InstanceState, Report
from sollol.topics import Topics

from agent.presence.home_assistant import Discovery, slug
from agent.presence.state import node_state, pool_states

POOL = Instance(instance_id="llama-1f", model="llama3.1:70b", state=InstanceState.READY, pool_number=1)


def discovery(node_id="bigbox"):
    return Discovery(Topics("home"), cluster="home", node_id=node_id, prefix="homeassistant", expire_after_s=30)


def config(made, *instances, node_id="bigbox"):
    report = Report(node_id=node_id, host="h", port=1, devices=(), instances=instances, version="9")
    pools = pool_states(report)
    return made.config(node_state(report, pools), pools)


def test_a_node_is_one_device_with_components_that_read_its_state():
    made = discovery()
    device = config(made)
    assert made.topic == "homeassistant/device/sollol_home_bigbox/config"
    assert device["dev"] == {
        "ids": ["sollol_home_bigbox"],
        "name": "SOLLOL bigbox",
        "mf": "SOLLOL",
        "mdl": "node",
        "sw": "9",
    }
    assert device["o"]["name"] == "SOLLOL"
    free = device["cmps"]["free_memory"]
    assert (free["p"], free["state_topic"]) == ("sensor", "sollol/v1/home/node/bigbox/state")
    assert (free["value_template"], free["unit_of_measurement"]) == ("{{ value_json.free_bytes }}", "B")
    assert (free["availability_topic"], free["expire_after"]) == ("sollol/v1/home/node/bigbox/status", 30)
    online = device["cmps"]["online"]
    assert (online["p"], online["payload_on"], online["payload_off"]) == ("binary_sensor", "online", "offline")
    assert "availability_topic" not in online, "it shall show off, not unavailable"


def test_every_component_reads_a_field_that_the_state_has():
    made = discovery()
    report = Report(node_id="bigbox", host="h", port=1, devices=(), instances=(POOL,))
    pools = pool_states(report)
    fields = {made_of.__struct_fields__ for made_of in (node_state(report, pools), *pools)}
    for component in config(made, POOL)["cmps"].values():
        if "value_template" in component:
            (field,) = re.findall(r"value_json\.(\w+)", component["value_template"])
            assert any(field in known for known in fields), field


def test_ids_are_unique_and_of_characters_that_home_assistant_takes():
    components = config(discovery(), POOL)["cmps"]
    ids = [component["unique_id"] for component in components.values()]
    assert len(set(ids)) == len(ids)
    for text in (*ids, *components):
        assert re.fullmatch(r"[A-Za-z0-9_-]+", text)
    assert slug("a.b") != slug("a_b")


def test_nodes_of_two_clusters_that_have_one_name_are_two_devices():
    other = Discovery(Topics("lab"), cluster="lab", node_id="bigbox", prefix="homeassistant", expire_after_s=30)
    assert other.topic != discovery().topic
    assert config(other)["dev"]["ids"] != config(discovery())["dev"]["ids"]


def test_a_pool_is_a_component_by_its_model_and_number_whoever_takes_that_seat():
    made = discovery()
    (seat,) = config(made, POOL)["cmps"].keys() - config(discovery())["cmps"].keys()
    first = config(made, POOL)["cmps"][seat]
    other = config(made, replace(POOL, instance_id="llama-2e"))["cmps"][seat]
    assert first["unique_id"] == other["unique_id"]
    assert (first["state_topic"], other["state_topic"]) == tuple(
        f"sollol/v1/home/pool/{pool}/state" for pool in ("llama-1f", "llama-2e")
    )


def test_a_pool_that_is_gone_is_taken_out_by_name_until_it_is_back():
    made = discovery()
    before = config(made)["cmps"]
    (seat,) = config(made, POOL)["cmps"].keys() - before.keys()
    assert config(made)["cmps"][seat] == {"p": "sensor"}
    assert config(made)["cmps"][seat] == {"p": "sensor"}
    assert config(made, POOL)["cmps"][seat]["name"] == "llama3.1:70b pool 1"
