import pytest
from sollol.broker import Broker, broker_of, check_broker, parse_broker
from sollol.errors import SollolError


@pytest.mark.parametrize(
    ("url", "broker"),
    [
        ("mqtt://box", Broker(host="box", port=1883)),
        ("mqtts://box", Broker(host="box", port=8883, tls=True)),
        ("mqtt://u:p%40ss%2F@box:1884/", Broker(host="box", port=1884, user="u", password="p@ss/")),
        ("mqtt://u@[::1]:1", Broker(host="::1", port=1, user="u")),
    ],
)
def test_a_url_names_a_broker(url, broker):
    assert parse_broker(url) == broker


@pytest.mark.parametrize(
    "url", ["box", "http://box", "mqtt://", "mqtt://u:secret@box:port", "mqtt://u:secret@box/topic", "mqtt://[u:secret"]
)
def test_another_url_is_refused_without_showing_it(url):
    with pytest.raises(ValueError, match="mqtt_url is not mqtt://") as refused:
        parse_broker(url)
    assert "secret" not in str(refused.value)


def test_the_address_for_logs_has_no_user():
    assert parse_broker("mqtts://u:secret@[::1]").address == "mqtts://[::1]:8883"


def test_the_password_file_wins_over_the_url(tmp_path):
    file = tmp_path / "password"
    file.write_text("from the file\n")
    broker = broker_of("mqtt://u:p@box", password_file=str(file), ca_file="/ca")
    assert (broker.user, broker.password, broker.ca_file) == ("u", "from the file", "/ca")


@pytest.mark.parametrize("content", [None, "", "\n", b"\xff"])
def test_a_password_file_that_holds_none_is_refused(tmp_path, content):
    file = tmp_path / "password"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SollolError, match="mqtt_password_file = "):
        broker_of("mqtt://u@box", password_file=str(file), ca_file="")


def test_a_password_without_a_user_is_refused():
    with pytest.raises(ValueError, match="needs a user"):
        check_broker("mqtt://box", "/password")
    check_broker("", "/password")
    check_broker("mqtt://u@box", "/password")
