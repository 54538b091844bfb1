"""Coordinators that listen on a port beside their socket: one each, the lowest free one, and a key when there is one."""

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import aiohttp
import pytest
from msgspec.structs import replace
from sollol.errors import Reason, SollolError
from sollol.report import Instance

from agent.supervisor.endpoints import Endpoint, Endpoints, TcpSite
from agent.supervisor.health import ask, health
from agent.supervisor.owner import Limits
from agent.supervisor.standstill import Standstill
from agent.supervisor.supervisor import Supervisor
from tests.fakes.fake_engine import fake_engine
from tests.supervised import plan_of, settled, started, supervising

SOCKET = Path("/run/sollol/x.sock")
REAL = Limits(start_timeout_s=30, stop_grace_s=20)
KEY = "a-key-for-tools"


def site_at(first: int, count: int = 4, **more: str) -> TcpSite:
    return TcpSite(**({"listen": "127.0.0.1", "host": "127.0.0.1"} | more), ports=range(first, first + count))


@contextmanager
def listening(port: int, host: str = "127.0.0.1") -> Iterator[None]:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind((host, port))
        taken.listen(1)
        yield


@pytest.fixture
def first(ports: Callable[[], int]) -> int:
    """The first of several free ports in a row."""
    run = [ports()]
    while len(run) < 4:
        port = ports()
        run = [*run, port] if port == run[-1] + 1 else [port]
    return run[0]


def test_without_tcp_a_coordinator_is_reached_on_its_socket() -> None:
    endpoint = Endpoints(None).claim("p", SOCKET)

    assert (endpoint.url, endpoint.port) == (f"unix:{SOCKET}", 0)


def test_pools_get_the_lowest_free_ports_and_give_them_back(first: int) -> None:
    endpoints = Endpoints(site_at(first))
    claimed = [endpoints.claim(pool_id, SOCKET).port for pool_id in ("a", "b", "c")]
    endpoints.give_back("b")
    endpoints.give_back("b")
    endpoints.give_back("unknown")

    assert claimed == [first, first + 1, first + 2]
    assert [endpoints.claim(pool_id, SOCKET).port for pool_id in ("d", "e")] == [first + 1, first + 3]


def test_a_port_that_is_held_is_passed_over_until_it_is_given_back(first: int) -> None:
    """As of a coordinator that an earlier agent started."""
    endpoints = Endpoints(site_at(first))
    endpoints.hold("p", Endpoint(url="", listen="127.0.0.1", port=first))
    assert endpoints.claim("q", SOCKET).port == first + 1
    endpoints.give_back("p")
    assert endpoints.claim("r", SOCKET).port == first


@pytest.mark.parametrize("listen", ["127.0.0.1", "0.0.0.0"])
def test_a_port_that_somebody_listens_on_is_passed_over(first: int, listen: str) -> None:
    with listening(first):
        assert Endpoints(site_at(first, listen=listen)).claim("a", SOCKET).port == first + 1


def test_when_no_port_is_free_the_refusal_names_the_range_and_the_setting(first: int) -> None:
    endpoints = Endpoints(site_at(first, count=2))
    with ExitStack() as stack:
        stack.enter_context(listening(first))
        endpoints.claim("a", SOCKET)
        with pytest.raises(SollolError) as refused:
            endpoints.claim("b", SOCKET)

    refusal = refused.value.refusal
    assert refusal.reason is Reason.PORT_TAKEN
    assert f"none of the ports {first} to {first + 1} is free on 127.0.0.1" in refusal.message
    assert "coordinator_port" in refusal.message
    assert refusal.numbers == {"first_port": first, "last_port": first + 1}


def test_the_url_is_where_others_reach_it(first: int) -> None:
    assert Endpoints(site_at(first, listen="0.0.0.0", host="192.168.1.20")).claim("p", SOCKET).url == (
        f"http://192.168.1.20:{first}"
    )
    assert Endpoints(site_at(first, listen="::1", host="::1")).claim("p", SOCKET).url == f"http://[::1]:{first}"


async def test_a_start_that_is_refused_keeps_no_port(tmp_path: Path, first: int) -> None:
    async with supervising(tmp_path, fake_engine(), tcp=site_at(first)) as supervisor:
        with pytest.raises(SollolError):
            await supervisor.start("p", replace(plan_of("m"), parallel=0))

        assert supervisor._endpoints.claim("q", SOCKET).port == first


@pytest.mark.engine
async def test_two_pools_of_a_node_serve_on_two_ports_and_on_their_sockets(
    tmp_path: Path, engine_binary: Path, reciting_model: Path, first: int
) -> None:
    async with supervising(
        tmp_path, (str(engine_binary),), resolve=lambda _: reciting_model, limits=REAL, tcp=site_at(first)
    ) as supervisor:
        pools = await asyncio.gather(*(started(supervisor, pool_id, plan_of(pool_id)) for pool_id in ("a", "b")))

        assert {pool.endpoint for pool in pools} == {f"http://127.0.0.1:{first}", f"http://127.0.0.1:{first + 1}"}
        for pool in pools:
            status, models = await get(f"{pool.endpoint}/v1/models")
            assert (status, models["data"][0]["id"]) == (200, pool.model)
            assert await health(supervisor.socket_of(pool.instance_id)) == 200
        await supervisor.stop("a")
        again = await started(supervisor, "c", plan_of("c"))
        assert again.endpoint == pools[0].endpoint, "the lowest free one again"


async def get(url: str, key: str = "") -> tuple[int, dict]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with aiohttp.ClientSession() as session, session.get(url, headers=headers) as response:
        return response.status, await response.json()


@pytest.fixture
async def keyed(tmp_path: Path, engine_binary: Path, reciting_model: Path, first: int):
    """A supervisor and its one coordinator, which asks for a key."""
    async with supervising(
        tmp_path,
        (str(engine_binary),),
        resolve=lambda _: reciting_model,
        limits=REAL,
        tcp=replace(site_at(first), key=KEY),
    ) as supervisor:
        yield supervisor, await started(supervisor, "p", plan_of("m", context_per_slot=4096))


@pytest.mark.engine
async def test_a_key_is_asked_of_everybody_and_ours_opens_the_socket(keyed: tuple[Supervisor, Instance]) -> None:
    supervisor, pool = keyed
    path = supervisor.socket_of("p")

    assert (await get(f"{pool.endpoint}/v1/models", "another-key"))[0] == 401
    assert (await get(f"{pool.endpoint}/slots"))[0] == 401
    assert (await get(f"{pool.endpoint}/v1/models", KEY))[0] == 200
    unkeyed, ours = await ask(path, "/slots"), await ask(path, "/slots", KEY)
    assert unkeyed is not None
    assert unkeyed.status == 401
    assert ours is not None
    assert ours.status == 200
    argv = Path(f"/proc/{pool.pid}/cmdline").read_bytes()
    assert KEY.encode() not in argv, "anybody can read a command line"


@pytest.mark.engine
async def test_what_watches_an_engine_knows_its_key(keyed: tuple[Supervisor, Instance]) -> None:
    supervisor, pool = keyed
    plan, path = plan_of("m"), supervisor.socket_of("p")
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {KEY}"}) as session:
        body = {"prompt": "x", "n_predict": 3500, "stream": True, "ignore_eos": True}
        async with session.post(f"{pool.endpoint}/completion", json=body) as response:
            assert await response.content.readline()
            watches = {
                key: Standstill(pool.pid, plan, path, streams=lambda: 1, every_s=0.1, key=key) for key in (KEY, "")
            }
            told = {key: await watch._generates() for key, watch in watches.items()}

    assert told == {KEY: True, "": None}, "without the key it cannot say"


@pytest.mark.engine
async def test_a_port_that_is_taken_between_the_look_and_the_start_is_told_as_that(
    tmp_path: Path, engine_binary: Path, reciting_model: Path, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.supervisor.ports._is_free", lambda _host, _port: True)
    async with supervising(
        tmp_path, (str(engine_binary),), resolve=lambda _: reciting_model, limits=REAL, tcp=site_at(first)
    ) as supervisor:
        with listening(first):
            await supervisor.start("p", plan_of("m"))
            failed = await settled(supervisor, "p")

    assert failed.refusal is not None
    assert failed.refusal.reason is Reason.PORT_TAKEN
