import io
import json
import logging
import os
import subprocess
import sys
import warnings

import pytest
import structlog
from sollol import log
from sollol.redaction import redact


@pytest.fixture(autouse=True)
def former_logging():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(capture=False)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def lines_of(stream: io.StringIO) -> list[dict]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def configured(level: str = "info", log_format: str = "json") -> io.StringIO:
    stream = io.StringIO()
    log.configure(level, log_format, stream=stream)
    return stream


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_off_a_terminal_each_fact_is_one_json_line_with_its_fields():
    stream = configured(log_format="auto")
    structlog.get_logger("x").info("coordinator_ready", model="a\nb", took_s=1.5)
    (line,) = lines_of(stream)
    assert line.pop("timestamp").endswith("Z")
    assert line == {"level": "info", "event": "coordinator_ready", "model": "a\nb", "took_s": 1.5}


def test_a_name_that_is_no_utf8_is_written_escaped_and_ends_nobody():
    stream = configured()
    name = os.fsdecode(b"/models/caf\xe9")
    structlog.get_logger("x").warning("unreadable", path=name, parts=[name], huge=1 << 70, numbers={name: 1})
    (line,) = lines_of(stream)
    assert line["path"] == "/models/caf\\udce9"
    assert line["parts"] == [line["path"]]
    assert (line["huge"], line["numbers"]) == (str(1 << 70), {line["path"]: "1"})


def test_on_a_terminal_lines_are_for_people():
    stream = Terminal()
    log.configure("info", "auto", stream=stream)
    structlog.get_logger("x").info("coordinator_ready", model="m")
    assert "coordinator_ready" in stream.getvalue()
    assert not stream.getvalue().startswith("{")


def test_lines_below_the_level_are_not_written():
    stream = configured("warning")
    structlog.get_logger("x").info("quiet")
    structlog.get_logger("x").warning("loud")
    assert [line["event"] for line in lines_of(stream)] == ["loud"]


def test_a_logger_made_before_configure_obeys_it_too():
    early = structlog.get_logger("early")
    stream = configured("error")
    early.warning("quiet")
    early.error("loud")
    assert [line["event"] for line in lines_of(stream)] == ["loud"]


def test_context_of_the_task_joins_every_line():
    stream = configured()
    with structlog.contextvars.bound_contextvars(request_id="r1"):
        structlog.get_logger("x").info("relayed")
    assert lines_of(stream)[0]["request_id"] == "r1"


def test_libraries_logs_and_warnings_take_the_same_way_from_warning_on():
    stream = configured()
    logging.getLogger("aiohttp.server").info("chatter")
    logging.getLogger("aiohttp.server").warning("odd %s", "request")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(capture=True)
        warnings.warn("old thing", DeprecationWarning, stacklevel=1)
    odd, old = lines_of(stream)
    assert (odd["event"], odd["logger"], odd["level"]) == ("odd request", "aiohttp.server", "warning")
    assert "old thing" in old["event"]


def test_an_exception_is_written_with_its_traceback_and_without_local_variables():
    for log_format in ("json", "console"):
        stream = configured(log_format=log_format)
        hidden = "hunter2"
        try:
            int(hidden[:-1])
        except ValueError:
            structlog.get_logger("x").exception("broke")
        assert "ValueError: invalid literal" in stream.getvalue()
        assert "hunter2" not in stream.getvalue()


def test_secrets_are_masked_wherever_they_stand():
    for log_format in ("json", "console"):
        stream = configured(log_format=log_format)
        logger = structlog.get_logger("x")
        logger.info("connected", url="redis://me:hunter2@host/0", password="hunter2", token="hunter2")
        logger.info("sent", headers={"Authorization": "Bearer hunter2"}, query="a=1&api_key=hunter2&b=2")
        logging.getLogger("redis").warning("retrying redis://:hunter2@host")
        assert "hunter2" not in stream.getvalue()
        assert "b=2" in stream.getvalue()


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("redis://localhost:6379/0", "redis://localhost:6379/0"),
        ("redis://user@host/0", "redis://user@host/0"),
        ("rediss://u:p@ss/w@host:1/0", "rediss://u:***@host:1/0"),
        ("unix:///run/r.sock?password=p&db=1", "unix:///run/r.sock?password=***&db=1"),
        ("took 5 tokens=7", "took 5 tokens=7"),
        ("", ""),
    ],
)
def test_redaction_masks_passwords_and_nothing_else(text, masked):
    assert redact(text) == masked


def test_values_json_does_not_know_are_written_as_text():
    stream = configured()
    structlog.get_logger("x").info("odd", what=object, path=os)
    assert "class 'object'" in lines_of(stream)[0]["what"]


def test_a_closed_stream_does_not_break_the_one_who_logs():
    stream = configured()
    stream.close()
    structlog.get_logger("x").info("nobody hears this")


def test_under_systemd_lines_start_with_their_priority_but_not_when_redirected(tmp_path):
    program = (
        "import sys, structlog; from sollol import log; log.configure('info', 'json', journal_stream=sys.argv[1]);"
        "structlog.get_logger().error('bad'); structlog.get_logger().info('good')"
    )
    out = tmp_path / "err"
    out.touch()
    found = out.stat()
    for journal, first, second in [
        (f"{found.st_dev}:{found.st_ino}", "<3>{", "<6>{"),
        (f"{found.st_dev}:{found.st_ino + 1}", "{", "{"),
        ("", "{", "{"),
    ]:
        with out.open("w") as stderr:
            subprocess.run([sys.executable, "-c", program, journal], stderr=stderr, check=True, timeout=30)
        lines = out.read_text().splitlines()
        assert (lines[0].partition('"')[0], lines[1].partition('"')[0]) == (first, second)
