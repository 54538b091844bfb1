import os
import socket

from sollol.notices import Notices, sd_notify


def test_without_systemd_notices_go_nowhere():
    Notices().ready()


def test_a_systemd_that_does_not_listen_is_said_once_and_harms_nothing(tmp_path, capfd):
    notices = Notices(str(tmp_path / "nobody"))

    notices.ready()
    notices.stopping()

    assert capfd.readouterr().out.count("systemd_not_reached") == 1


def test_an_abstract_notify_socket_works():
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind("\0sollol-test-notify")
        sd_notify("READY=1", "@sollol-test-notify")
        assert systemd.recv(99) == b"READY=1"


def test_the_same_status_is_sent_once(systemd):
    for text in ("1 node", "1 node", "2 nodes"):
        systemd.notices.status(text)

    assert systemd.heard() == ["STATUS=1 node", "STATUS=2 nodes"]


def test_more_time_is_asked_for_in_microseconds(systemd):
    systemd.notices.extend(2.5)

    assert systemd.heard() == ["EXTEND_TIMEOUT_USEC=2500000"]


def test_the_environment_says_where_to_and_how_often(tmp_path):
    environ = {"NOTIFY_SOCKET": str(tmp_path), "WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}

    assert Notices.to_systemd(environ, os.getpid()).watchdog_s == 30
    assert Notices.to_systemd({**environ, "WATCHDOG_PID": "1"}, os.getpid()).watchdog_s == 0, (
        "meant for another process"
    )
    assert Notices.to_systemd({}, os.getpid()).watchdog_s == 0
    assert Notices.to_systemd({"WATCHDOG_USEC": "soon"}, os.getpid()).watchdog_s == 0
