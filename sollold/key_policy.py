"""Whether requests need keys where this head listens."""

from pathlib import Path

import structlog
from sollol.broker import parse_broker
from sollol.config import ConfigError, is_loopback

from sollold.config import HeadConfig

log = structlog.get_logger(__name__)


def key_mode(config: HeadConfig) -> str:
    """How `require_keys` is to be taken at this address; "auto": once there is a key."""
    reachable = not is_loopback(config.listen) and not config.insecure
    return "always" if config.require_keys == "auto" and reachable else config.require_keys


def check_keys(config: HeadConfig, path: Path) -> None:
    """Refuse to serve other machines without keys, unless a human said `insecure`; then say loudly what that means.

    Raises:
        ConfigError: requests from other machines would need keys, and there is no file of them; or would need none; or
            nobody can tell whether there is one.
    """
    mode = key_mode(config)
    try:
        exists = path.exists()
    except OSError as error:
        why = f"whether there are API keys in {path} cannot be told ({error.strerror})"
        raise ConfigError(f"{why}: let this user read its directory, or set keys_file to another") from error
    needs_none = mode == "never" or (mode == "auto" and not exists)
    if needs_none and config.mqtt_inference and config.mqtt_url:
        _warn_of_broker(config.mqtt_url)
    if is_loopback(config.listen):
        return
    if not config.insecure and (mode == "never" or not exists):
        why = 'require_keys = "never"' if mode == "never" else f"there are no API keys in {path}"
        raise ConfigError(
            f'listen = "{config.listen}" can be reached from other machines, and {why}: anyone there could use your '
            "models. Make a key with `sollol keys add NAME`, or set insecure = true if you trust that whole network"
        )
    if needs_none:
        log.warning("http_open_to_everybody", listen=config.listen, port=config.http_port, why="insecure = true")


def _warn_of_broker(url: str) -> None:
    """Others reach the models through it; who, only the broker knows."""
    broker = parse_broker(url)
    if not is_loopback(broker.host):
        log.warning(
            "mqtt_open_to_whoever_may_publish",
            broker=broker.address,
            why="requests need no API key",
            hint="make one with `sollol keys add NAME`",
        )
