"""SIGHUP, as `systemctl reload` sends it: the daemons go on with what has changed in their files."""

import shutil
import tempfile
from pathlib import Path

import pytest
from sollol.channels import open_channel
from sollol.client import Client
from sollol.errors import SollolError
from sollol.report import PlacementWish
from sollol.v1 import agent_pb2, agent_pb2_grpc

from tests.daemon import agent_flags, daemon, write_engine
from tests.waiting import wait_until

WISH = PlacementWish(model="tiny-reciter")


@pytest.fixture
def home():
    with tempfile.TemporaryDirectory(prefix="sr") as directory:
        yield Path(directory)


def line_of(lines, event):
    return next(line for line in lines if line["event"] == event)


async def report_of(port):
    async with open_channel(f"127.0.0.1:{port}") as channel:
        stub = agent_pb2_grpc.AgentServiceStub(channel)
        return (await stub.GetReport(agent_pb2.GetReportRequest())).report


async def test_an_agent_goes_on_with_other_labels_caps_and_model_directories(ports, home, reciting_model):
    settings, port = home / "agent.toml", ports()
    settings.write_text("")
    flags = agent_flags(home, port=port, engine=write_engine(home / "engine"), model=reciting_model)
    at = flags.index("--model-dirs")
    del flags[at : at + 2]  # a flag would win over the file; the default is ~/models
    (home / "more").mkdir()
    shutil.copy(reciting_model, home / "more" / "another.gguf")

    async with daemon("agent", home, "--config", str(settings), *flags) as agent:
        await agent.says("agent_ready")
        before = await report_of(port)
        settings.write_text(
            'labels = { rack = "3" }\ncaps = { CPU = 123456789 }\nmodel_dirs = ["~/models", "~/more"]\nhost = "127.0.0.2"\n'
        )
        lines = await agent.reload()

        async def followed():
            report = await report_of(port)
            return report if len(report.models) == 2 and report.labels else None

        report = await wait_until(followed, within_s=10, what="a report by the new settings, long before the next scan")
        assert (len(before.models), dict(before.labels)) == (1, {})
        assert dict(report.labels) == {"rack": "3"}
        assert report.devices[0].cap_bytes == 123456789
        assert report.host == "127.0.0.1", "what needs a restart waits for one"
        assert sorted(line_of(lines, "settings_reloaded")["changed"]) == ["caps", "labels", "model_dirs"]
        assert agent.events().count("agent_ready") == 1
        await agent.says("settings_need_restart")
        assert await agent.end() == 0


async def test_a_head_places_by_other_options_and_refuses_wrong_ones(ports, home, reciting_model):
    settings, port, grpc_port = home / "head.toml", ports(), ports()
    settings.write_text("")
    agent_words = agent_flags(home, port=port, engine=write_engine(home / "engine"), model=reciting_model)
    head_words = ["--config", str(settings), "--http-port", str(ports()), "--grpc-port", str(grpc_port)]

    async with (
        daemon("agent", home, *agent_words) as agent,
        daemon("sollold", home, *head_words, "--redis-url", "") as head,
    ):
        await agent.says("agent_ready")
        await head.says("head_ready")
        async with Client(f"127.0.0.1:{grpc_port}") as client:
            settings.write_text(
                f'agents = ["127.0.0.1:{port}"]\n[models.default]\ncontext_per_slot = 96\nparallel = 1\n'
            )
            await head.reload()

            async def placed():
                try:
                    return (await client.place(WISH)).plan
                except SollolError:
                    return None  # the agent is not watched yet

            plan = await wait_until(placed, within_s=10, what="a plan on the agent that was added")
            assert (plan.context_per_slot, plan.parallel) == (96, 1)

            settings.write_text("parralel = 1\n")
            refused = line_of(await head.reload(), "reload_refused")
            assert "parallel" in refused["message"], "the closest name is said"
            assert (await client.place(WISH)).plan.context_per_slot == 96

            settings.write_text(f'log_level = "debug"\nmax_body_bytes = 99\nagents = ["127.0.0.1:{port}"]\n')
            await head.reload()
            await head.says("settings_need_restart")
            assert (await client.place(WISH)).plan.parallel == 4
        assert await head.end() == 0
