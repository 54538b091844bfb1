"""`sollold`: argv and the environment end here."""

import os
import sys
from pathlib import Path

import sollol  # noqa: F401 - before grpc: switches its fork handlers off
from sollol import lifecycle, log
from sollol.certified import let_grpc_tell_of_handshakes
from sollol.config import load, load_or_exit
from sollol.identity import Role
from sollol.live import Live
from sollol.notices import Notices
from sollol.own_address import serve_there

from sollold.config import LIVE, HeadConfig

DEFAULT_FILE = Path("/etc/sollol/head.toml")


def main() -> None:
    environ = dict(os.environ)
    config = load_or_exit(HeadConfig, name="head", argv=sys.argv[1:], environ=environ, default_file=DEFAULT_FILE).value

    def reread() -> HeadConfig:
        return load(HeadConfig, name="head", argv=sys.argv[1:], environ=environ, default_file=DEFAULT_FILE).value

    def set_up_log(config: HeadConfig) -> None:
        log.configure(config.log_level, config.log_format, journal_stream=environ.get("JOURNAL_STREAM", ""))

    set_up_log(config)
    live = Live(config, reread=reread, changeable=LIVE)
    live.subscribe(set_up_log)
    let_grpc_tell_of_handshakes(config.tls_dir, Role.HEAD, os.environ)
    # After --help and --check-config: grpc and aiohttp are slow to load.
    from sollold.app import serve  # noqa: PLC0415

    sys.exit(
        lifecycle.run(
            lambda stop: serve_there(config.listen, stop, lambda: serve(live, environ, stop)),
            exit_with_parent=config.exit_with_parent,
            reload=live.reload,
            notices=Notices.to_systemd(environ, os.getpid()),
        )
    )


if __name__ == "__main__":
    main()
