import pytest
from hypothesis import given
from hypothesis import strategies as st
from sollol.topics import Topics, level, problem_with_response_topic


def test_the_topics_of_a_cluster_are_those_that_the_readme_names():
    topics = Topics("home")
    assert topics.node_status("bigbox") == "sollol/v1/home/node/bigbox/status"
    assert topics.node_state("bigbox") == "sollol/v1/home/node/bigbox/state"
    assert topics.pool_state("tiny-1f") == "sollol/v1/home/pool/tiny-1f/state"
    assert topics.head_status("h") == "sollol/v1/home/head/h/status"
    assert topics.event() == "sollol/v1/home/event"
    assert topics.generate() == "sollol/v1/home/generate"
    assert topics.cancel() == "sollol/v1/home/generate/cancel"


@given(st.text(min_size=1))
def test_any_name_is_one_level_that_matches_nothing_else(name):
    written = level(name)
    assert not set("/+#\0") & set(written)
    written.encode()


@given(st.text(alphabet="ab/+#%\n", max_size=6), st.text(alphabet="ab/+#%\n", max_size=6))
def test_two_names_never_share_a_level(one, other):
    assert (level(one) == level(other)) == (one == other)


@pytest.mark.parametrize("topic", ["reply/x", "esp32/1/answers", "sollol-replies", "solloland/x", "homeassistants"])
def test_an_answer_may_go_to(topic):
    assert problem_with_response_topic(topic, "homeassistant") is None


@pytest.mark.parametrize(
    ("topic", "says"),
    [
        ("", "no response topic"),
        ("a/+/b", "wildcards"),
        ("a/#", "wildcards"),
        ("a\0b", "characters"),
        ("a\nb", "characters"),
        ("x" * 1025, "longer"),
        ("$SYS/broker", "below $"),
        ("$share/x/y", "below $"),
        ("sollol/v1/home/node/a/status", "below sollol/v1/"),
        ("sollol/v1", "below sollol/v1/"),
        ("sollol/v1/other/generate", "below sollol/v1/"),
        ("homeassistant/device/x/config", "below homeassistant/"),
    ],
)
def test_an_answer_may_not_go_to(topic, says):
    assert says in (problem_with_response_topic(topic, "homeassistant") or "")
