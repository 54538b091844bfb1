"""Where the MQTT broker is, as settings say it."""

from pathlib import Path
from urllib.parse import unquote, urlsplit

from msgspec import Struct

from sollol.config_values import ConfigError

_PORTS = {"mqtt": 1883, "mqtts": 8883}
_FORM = "mqtt://[USER[:PASSWORD]@]HOST[:PORT] or mqtts://..."


class Broker(Struct, frozen=True, kw_only=True):
    """`ca_file`: whose certificates are trusted with TLS; empty: the system's."""

    host: str
    port: int
    tls: bool = False
    user: str = ""
    password: str = ""
    ca_file: str = ""

    def __repr__(self) -> str:
        return f"Broker({self.address})"

    @property
    def address(self) -> str:
        """For logs: without user and password."""
        return f"{'mqtts' if self.tls else 'mqtt'}://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


def parse_broker(url: str) -> Broker:
    """Raises ValueError: it is no address of a broker; the message does not show it, since it may hold a password."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ValueError(f"mqtt_url is not {_FORM}") from None
    if parts.scheme not in _PORTS or not parts.hostname or parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ValueError(f"mqtt_url is not {_FORM}")
    return Broker(
        host=parts.hostname,
        port=_PORTS[parts.scheme] if port is None else port,
        tls=parts.scheme == "mqtts",
        user=unquote(parts.username or ""),
        password=unquote(parts.password or ""),
    )


def broker_of(url: str, *, password_file: str, ca_file: str) -> Broker:
    """Return the broker with the password of the file, where one is named; it wins over the URL's.

    Raises:
        ConfigError: the file cannot be read or is empty.
        ValueError: see `parse_broker`.
    """
    broker = parse_broker(url)
    password = broker.password
    if password_file:
        path = Path(password_file).expanduser()
        try:
            password = path.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"mqtt_password_file = {path}: cannot be read: {error}") from error
        if not password:
            raise ConfigError(f"mqtt_password_file = {path}: is empty")
    return Broker(
        host=broker.host, port=broker.port, tls=broker.tls, user=broker.user, password=password, ca_file=ca_file
    )


def check_broker(url: str, password_file: str) -> None:
    """For settings classes. Raises ValueError: no address of a broker, or settings that do not go together."""
    if url:
        broker = parse_broker(url)
        if password_file and not broker.user:
            raise ValueError("mqtt_password_file needs a user in mqtt_url, as in mqtt://USER@HOST")
