"""`sollold`: argv and the environment end here."""

import os
import sys
from pathlib import Path

import sollol  # noqa: F401 - before grpc: switches its fork handlers off
from sollol import lifecycle, log
from sollol.config import load_or_exit

from sollold.config import HeadConfig

DEFAULT_FILE = Path("/etc/sollol/head.toml")


def main() -> None:
    config = load_or_exit(
        HeadConfig, name="head", argv=sys.argv[1:], environ=os.environ, default_file=DEFAULT_FILE
    ).value
    log.configure(config.log_level, config.log_format, journal_stream=os.environ.get("JOURNAL_STREAM", ""))
    # After --help and --check-config: grpc and aiohttp are slow to load.
    from sollold.app import serve  # noqa: PLC0415
    from sollold.key_file import keys_path  # noqa: PLC0415

    sys.exit(
        lifecycle.run(
            lambda stop: serve(config, keys_path(config.keys_file, os.environ), stop),
            exit_with_parent=config.exit_with_parent,
            notify_socket=os.environ.get("NOTIFY_SOCKET", ""),
        )
    )


if __name__ == "__main__":
    main()
