"""A real Mosquitto for tests, in a process of its own, and its command line clients."""

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.waiting import wait_until

_PROBE = "probe"
USER, PASSWORD = "sollol", "p@ss:word/1"
_PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))


def program(name: str) -> str:
    found = shutil.which(name, path=_PATH)
    assert found, f"no {name}: run `make test`, or install the packages mosquitto and mosquitto-clients"
    return found


class Mosquitto:
    """One broker on loopback that keeps nothing on disk.

    With `password` it takes no anonymous client; with a `tls_port` it listens there too, as `localhost`, with a
    certificate that nobody but `certificate` vouches for.
    """

    def __init__(self, directory: Path, port: int, *, password: bool = False, tls_port: int = 0) -> None:
        self.port = port
        self.url = f"mqtt://127.0.0.1:{port}"
        self.heard: list[Heard] = []
        self._access = ("-u", USER, "-P", PASSWORD) if password else ()
        self._config = directory / f"mosquitto-{port}.conf"
        self._log = self._config.with_suffix(".log")
        lines = [
            f"listener {port} 127.0.0.1",
            "persistence false",
            "log_type all",
            "user root",
            f"allow_anonymous {str(not password).lower()}",
        ]
        if password:
            passwords = self._config.with_suffix(".passwords")
            subprocess.run(
                [program("mosquitto_passwd"), "-c", "-b", str(passwords), USER, PASSWORD],
                check=True,
                capture_output=True,
            )
            lines.append(f"password_file {passwords}")
        self.certificate = self._config.with_suffix(".pem")
        if tls_port:
            _write_certificate(self.certificate)
            lines += [f"listener {tls_port} 127.0.0.1", f"certfile {self.certificate}", f"keyfile {self.certificate}"]
        self._config.write_text("\n".join(lines) + "\n")
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen([program("mosquitto"), "-c", str(self._config)], stdout=log, stderr=log)
        await wait_until(self._listens, within_s=10, what="Mosquitto listens")

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def _listens(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self._log.read_text()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
            return True
        return False

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def close(self) -> None:
        for heard in self.heard:
            heard.close()
        self.stop()

    def client(self, name: str, *words: str) -> list[str]:
        """The command line of `mosquitto_pub` or `mosquitto_sub` with MQTT 5."""
        return [program(name), "-V", "5", "-h", "127.0.0.1", "-p", str(self.port), *self._access, *words]

    async def publish(self, topic: str, payload: str = "", *words: str) -> None:
        message = ("-m", payload) if payload else ("-n",)
        process = await asyncio.create_subprocess_exec(
            *self.client("mosquitto_pub", "-q", "1", "-t", topic, *message, *words)
        )
        assert await asyncio.wait_for(process.wait(), 10) == 0

    async def listen(self, *topics: str) -> "Heard":
        """A subscriber; what is retained comes first."""
        heard = Heard(self, topics, self._config.with_suffix(f".heard-{len(self.heard)}"))
        self.heard.append(heard)
        await heard.begin()
        return heard


def _write_certificate(path: Path) -> None:
    """A key and its self-signed certificate for `localhost`."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    private = key.private_bytes(serialization.Encoding.PEM, *form)
    path.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))


class Heard:
    """What one `mosquitto_sub` was sent: (retained, topic, payload) in order."""

    def __init__(self, broker: Mosquitto, topics: tuple[str, ...], output: Path) -> None:
        self._broker, self._output = broker, output
        words = [word for topic in (*topics, _PROBE) for word in ("-t", topic)]
        with output.open("wb") as out:
            self._process = subprocess.Popen(
                broker.client("mosquitto_sub", "-q", "1", "-F", "%r\t%t\t%p", *words), stdout=out
            )

    async def begin(self) -> None:
        while not self.on(_PROBE):
            await self._broker.publish(_PROBE, "are you there?")

    @property
    def messages(self) -> list[tuple[bool, str, str]]:
        rows = [line.split("\t", 2) for line in self._output.read_text().split("\n")[:-1]]
        return [(row[0] == "1", row[1], row[2]) for row in rows]

    def on(self, topic: str) -> list[str]:
        """The payloads of one topic."""
        return [payload for _, found, payload in self.messages if found == topic]

    def last(self, topic: str) -> str | None:
        return next(reversed(self.on(topic)), None)

    async def says(self, topic: str, payload: str, *, within_s: float = 5) -> None:
        """Wait until that is the newest word on the topic."""
        try:
            await wait_until(lambda: self.last(topic) == payload, within_s=within_s, what=f"{topic} says {payload}")
        except AssertionError as error:
            raise AssertionError(f"{error}; heard {self.messages}") from None

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture
def new_broker(tmp_path: Path, ports: Callable[[], int]) -> Iterator[Callable[..., Mosquitto]]:
    """Makes brokers that are not started yet."""
    made: list[Mosquitto] = []

    def make(**options: int) -> Mosquitto:
        made.append(Mosquitto(tmp_path, ports(), **options))
        return made[-1]

    yield make
    for broker in made:
        broker.close()


@pytest.fixture
async def broker(new_broker: Callable[..., Mosquitto]) -> Mosquitto:
    """An anonymous one that runs."""
    found = new_broker()
    await found.start()
    return found
