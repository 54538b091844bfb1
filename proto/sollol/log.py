"""One line per fact on stderr: coloured text on a terminal, JSON otherwise; libraries' own logs take the same way.

Use it as `log = structlog.get_logger(__name__)` and `log.info("coordinator_ready", model=..., took_s=...)`. What is
bound with `structlog.contextvars` (request_id, pool_id, node_id) joins every line of that task.
"""

import logging
import os
import sys
from collections.abc import Mapping
from typing import Any, Literal, TextIO

import msgspec
import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from sollol.redaction import redact

Level = Literal["debug", "info", "warning", "error"]
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
# journald reads this prefix; without it every line has priority 6 and `journalctl -p err` finds nothing.
_PRIORITIES = {"critical": 2, "error": 3, "warning": 4, "info": 6, "debug": 7}
_SECRET_KEYS = frozenset({"password", "secret", "token", "api_key", "authorization", "key"})


class _Lines:
    """Writes finished lines; a reader of our stderr that has gone away must not take the daemon with it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def msg(self, line: str) -> None:
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except (OSError, ValueError):  # a closed pipe or stream: there is no other place to say so
            return

    debug = info = warning = error = critical = exception = msg


class _LinesHandler(logging.Handler):
    def __init__(self, lines: _Lines) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.msg(self.format(record))


def configure(
    level: str = "info",
    log_format: str = "auto",
    *,
    journal_stream: str = "",
    stream: TextIO | None = None,
) -> None:
    """Set up logging for this process; calling it again replaces the former set-up.

    Args:
        level: "debug", "info", "warning" or "error". Libraries log from "warning" on, or from "debug" with "debug".
        log_format: "console", "json", or "auto": console on a terminal.
        journal_stream: `$JOURNAL_STREAM`: lines get a priority prefix when stderr is that stream.
        stream: stderr unless a test says otherwise.
    """
    out = stream if stream is not None else sys.stderr
    number = _LEVELS[level]
    console = log_format == "console" or (log_format == "auto" and out.isatty())
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="%H:%M:%S" if console else "iso", utc=not console),
        _mask_secrets,
    ]
    renderers = _renderers(console=console, colors=out.isatty(), journal=_is_journal(out, journal_stream))
    lines = _Lines(out)
    structlog.configure(
        processors=[*shared, *renderers],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=lambda *_names: lines,
        cache_logger_on_first_use=False,
    )
    handler = _LinesHandler(lines)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder(), _logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderers],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(number if number == logging.DEBUG else max(number, logging.WARNING))
    logging.captureWarnings(True)


def _renderers(*, console: bool, colors: bool, journal: bool) -> list[Processor]:
    if console:
        # plain_traceback: the richer ones print local variables, and with them whatever secret they hold.
        text = structlog.dev.ConsoleRenderer(
            colors=colors, exception_formatter=structlog.dev.plain_traceback, pad_event_to=24
        )
        return [_mask_line(text, journal=journal)]
    return [structlog.processors.format_exc_info, _mask_line(_json_line, journal=journal)]


def _json_line(_logger: WrappedLogger, _method: str, event: EventDict) -> str:
    ordered = {
        "timestamp": event.pop("timestamp", ""),
        "level": event.pop("level", ""),
        "event": event.pop("event", ""),
        **event,
    }
    try:
        return msgspec.json.encode(ordered, enc_hook=str).decode()
    except (UnicodeEncodeError, OverflowError):  # a file's name that is no UTF-8; a number beyond 64 bits
        return msgspec.json.encode(_encodable(ordered)).decode()


def _encodable(content: object) -> object:
    """`content` as it can be written whatever it is: no log call may end a daemon."""
    if content is None or isinstance(content, bool | float):
        return content
    if isinstance(content, Mapping):
        return {str(_encodable(key)): _encodable(value) for key, value in content.items()}
    if isinstance(content, list | tuple | set | frozenset):
        return [_encodable(item) for item in content]
    return str(content).encode(errors="backslashreplace").decode()


def _mask_line(render: Any, *, journal: bool) -> Processor:
    def masked(logger: WrappedLogger, method: str, event: EventDict) -> str:
        level = str(event.get("level", "info"))
        line = redact(render(logger, method, event))
        if not journal:
            return line
        prefix = f"<{_PRIORITIES.get(level, 6)}>"
        return "\n".join(prefix + part for part in line.splitlines())

    return masked


def _mask_secrets(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    for key in _SECRET_KEYS & event.keys():
        event[key] = "***"
    return event


def _logger_name(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    record = event.get("_record")
    if isinstance(record, logging.LogRecord):
        event["logger"] = record.name
    return event


def _is_journal(stream: TextIO, journal_stream: str) -> bool:
    """Whether `stream` is the very one systemd connected to the journal (`device:inode`), not a redirection of it."""
    if not journal_stream:
        return False
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):  # no file behind it
        return False
    return journal_stream == f"{found.st_dev}:{found.st_ino}"
