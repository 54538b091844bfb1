"""`sollol-agent`: argv and the environment end here.

With `--end-engines` it serves nobody: it ends what an agent has left running, waits until that is gone, and leaves.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import sollol  # noqa: F401 - before grpc: switches its fork handlers off
from sollol import lifecycle, log
from sollol.certified import let_grpc_tell_of_handshakes
from sollol.config import Loaded, load, load_or_exit
from sollol.identity import Role
from sollol.live import Live
from sollol.notices import Notices
from sollol.own_address import serve_there

from agent.config import LIVE, AgentConfig

END_ENGINES = "--end-engines"
DEFAULT_FILE = Path("/etc/sollol/agent.toml")


def main() -> None:
    environ = dict(os.environ)
    words = [word for word in sys.argv[1:] if word != END_ENGINES]

    def settings(read: Callable[..., Loaded[AgentConfig]]) -> AgentConfig:
        return read(AgentConfig, name="agent", argv=words, environ=environ, default_file=DEFAULT_FILE).value

    def set_up_log(config: AgentConfig) -> None:
        log.configure(config.log_level, config.log_format, journal_stream=environ.get("JOURNAL_STREAM", ""))

    config = settings(load_or_exit)
    set_up_log(config)
    if END_ENGINES in sys.argv[1:]:
        from agent.ending import end_engines  # noqa: PLC0415 - as below

        sys.exit(lifecycle.run(lambda _: end_engines(config, environ)))
    live = Live(config, reread=lambda: settings(load), changeable=LIVE)
    live.subscribe(set_up_log)
    let_grpc_tell_of_handshakes(config.tls_dir, Role.AGENT, os.environ)
    from agent.app import serve  # noqa: PLC0415 - after --help and --check-config: grpc is slow to load

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
