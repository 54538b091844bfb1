from pathlib import Path

import pytest
from msgspec.structs import fields
from sollol.config import ConfigError, check_listen, is_loopback, load, load_or_exit
from sollol.errors import SURFACES

from agent.config import AgentConfig
from sollold.config import HeadConfig
from sollold.options import ModelOptions

NO_FILE = Path("/nonexistent/agent.toml")


def agent(*argv: str, environ: dict[str, str] | None = None, default_file: Path = NO_FILE):
    return load(AgentConfig, name="agent", argv=argv, environ=environ or {}, default_file=default_file)


def refusal(*argv: str, environ: dict[str, str] | None = None, default_file: Path = NO_FILE) -> str:
    with pytest.raises(ConfigError) as caught:
        agent(*argv, environ=environ, default_file=default_file)
    assert SURFACES[caught.value.refusal.reason].exit_code == 2
    return caught.value.refusal.message


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("kind", [AgentConfig, HeadConfig])
def test_without_any_source_every_setting_has_its_default(kind):
    name = "agent" if kind is AgentConfig else "head"
    loaded = load(kind, name=name, argv=[], environ={"HOME": "/root"}, default_file=NO_FILE)
    assert loaded.value == kind()
    assert loaded.origins == {info.name: "default" for info in fields(kind)}


def test_flags_win_over_environment_over_file_over_defaults(tmp_path):
    file = written(tmp_path / "agent.toml", "port = 1111\nthreads = 11\nheartbeat_s = 3\n")
    environ = {"SOLLOL_AGENT_PORT": "2222", "SOLLOL_AGENT_THREADS": "22"}
    loaded = agent("--port", "3333", environ=environ, default_file=file)
    assert (loaded.value.port, loaded.value.threads, loaded.value.heartbeat_s) == (3333, 22, 3.0)
    assert loaded.value.lease_s == AgentConfig().lease_s
    assert loaded.origins["port"] == "flag --port"
    assert loaded.origins["threads"] == "environment SOLLOL_AGENT_THREADS"
    assert loaded.origins["heartbeat_s"] == f"file {file} line 3"
    assert loaded.origins["lease_s"] == "default"


def test_a_named_file_replaces_the_default_file(tmp_path):
    default = written(tmp_path / "default.toml", "port = 1111\nthreads = 3\n")
    named = written(tmp_path / "named.toml", "port = 2222\n")
    value = agent("--config", str(named), default_file=default).value
    assert (value.port, value.threads) == (2222, 0)


@pytest.mark.parametrize("argv", [("--port", "7000"), ("--port=7000",)])
def test_a_flag_takes_its_value_as_the_next_word_or_after_an_equals_sign(argv):
    assert agent(*argv).value.port == 7000


def test_a_bool_flag_needs_no_value_and_can_be_negated():
    assert agent("--insecure").value.insecure is True
    assert agent("--no-insecure", environ={"SOLLOL_AGENT_INSECURE": "true"}).value.insecure is False
    assert agent("--insecure=false").value.insecure is False


def test_lists_are_repeated_or_separated_by_commas():
    assert agent("--model-dirs", "/a,/b", "--model-dirs", "/c").value.model_dirs == ("/a", "/b", "/c")
    assert agent(environ={"SOLLOL_AGENT_MODEL_DIRS": "/a, /b"}).value.model_dirs == ("/a", "/b")
    assert agent("--model-dirs", "").value.model_dirs == ()


def test_tables_are_repeated_key_value_pairs():
    value = agent("--labels", "rack=a", "--labels", "gpu_node=", "--caps", "CPU=1000,CUDA0=5").value
    assert value.labels == {"rack": "a", "gpu_node": ""}
    assert value.caps == {"CPU": 1000, "CUDA0": 5}


def test_a_table_in_the_file_may_be_a_section(tmp_path):
    file = written(tmp_path / "agent.toml", "port = 7000\n[labels]\nrack = 'a'\n")
    loaded = agent(default_file=file)
    assert loaded.value.labels == {"rack": "a"}
    assert loaded.origins["labels"] == f"file {file} line 2"


def test_an_unknown_setting_names_the_closest_one_and_where_it_stands(tmp_path):
    file = written(tmp_path / "agent.toml", "port = 7000\nlease = 3\n")
    assert refusal(default_file=file) == f'file {file} line 2: unknown setting "lease"; the closest one is "lease_s"'
    assert refusal("--prot", "1") == 'flag --prot: unknown setting "prot"; the closest one is "port"'
    assert refusal("--ollama_dri=1").endswith('the closest one is "ollama-dir"')
    assert refusal(environ={"SOLLOL_AGENT_REDIS": "x"}).endswith('the closest one is "SOLLOL_AGENT_REDIS_URL"')


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('port = "7000"', 'port must be int from 1 to 65535, got "7000"'),
        ("port = true", "port must be int from 1 to 65535, got true"),
        ("port = 0", "got 0"),
        ("port = 65536", "got 65536"),
        ("heartbeat_s = 0", "heartbeat_s must be number above 0, got 0"),
        ("heartbeat_s = nan", "number above 0"),
        ("heartbeat_s = inf", "number above 0"),
        ("threads = -1", "int of 0 or more, got -1"),
        ("insecure = 1", "insecure must be true|false, got 1"),
        ('model_dirs = "x"', "model_dirs must be list of text"),
        ("model_dirs = [1]", "model_dirs must be list of text, got [1]"),
        ('caps = { CPU = "8" }', "caps must be table of int of 0 or more"),
        ('log_level = "loud"', "log_level must be debug|info|warning|error"),
        ("port = 1979-05-27", "port must be int"),
        ('node_id = ""', "node_id must be text, not empty"),
    ],
)
def test_a_wrong_value_in_the_file_is_refused_with_what_was_expected_and_got(tmp_path, text, complaint):
    file = written(tmp_path / "agent.toml", f"# first line\n{text}\n")
    message = refusal(default_file=file)
    assert message.startswith(f"file {file} line 2: ")
    assert complaint in message


@pytest.mark.parametrize(
    "argv",
    [
        ("--port", "seven"),
        ("--port", "7000.5"),
        ("--port", ""),
        ("--heartbeat-s", "nan"),
        ("--heartbeat-s", "-1"),
        ("--insecure=perhaps",),
        ("--caps", "CPU"),
        ("--caps", "CPU=lots"),
    ],
)
def test_a_wrong_value_of_a_flag_is_refused_by_name(argv):
    flag = argv[0].partition("=")[0]
    assert refusal(*argv).startswith(f"flag {flag}: {flag[2:].replace('-', '_')} ")


@pytest.mark.parametrize("argv", [("--port",), ("--port", "--insecure"), ("serve",), ("-p", "1"), ("--no-port",)])
def test_a_malformed_command_line_is_refused(argv):
    assert refusal(*argv)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(b"port = ", "not TOML"), (b"\xff\xfe", "not UTF-8"), (b"port = 1\nport = 2", "not TOML")],
)
def test_a_broken_file_is_refused_by_name(tmp_path, content, complaint):
    file = tmp_path / "agent.toml"
    file.write_bytes(content)
    assert refusal("--config", str(file)).startswith(f"file {file}: {complaint}")


def test_a_named_file_that_is_missing_is_refused():
    assert "cannot be read: No such file" in refusal("--config", "/nonexistent.toml")


def test_listening_off_loopback_needs_a_clear_word():
    assert "insecure = true" in refusal("--listen", "0.0.0.0")
    assert agent("--listen", "0.0.0.0", "--insecure").value.listen == "0.0.0.0"


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("[::1]", True), ("localhost", True)]
    + [(host, False) for host in ("0.0.0.0", "::", "192.168.1.20", "example.org", "", "127.0.0.1.example.org")],
)
def test_only_addresses_of_this_machine_are_loopback(host, loopback):
    assert is_loopback(host) is loopback
    if not loopback:
        with pytest.raises(ConfigError):
            check_listen(host, insecure=False)


def test_check_config_says_ok_and_leaves_with_0(capsys):
    with pytest.raises(SystemExit) as left:
        agent("--check-config", "--port", "7000")
    assert left.value.code == 0
    assert capsys.readouterr().out == "ok\n"


def test_check_config_says_what_is_wrong_and_leaves_with_2(capsys):
    with pytest.raises(SystemExit) as left:
        load_or_exit(
            AgentConfig, name="agent", argv=["--check-config", "--port", "x"], environ={}, default_file=NO_FILE
        )
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("sollol-agent: flag --port: port must be int")


def test_print_config_shows_values_and_origins_and_masks_passwords(capsys):
    with pytest.raises(SystemExit):
        agent("--print-config", "--redis-url", "redis://me:s3cr/et@host:6379/0")
    out = capsys.readouterr().out
    assert 'redis_url = "redis://me:***@host:6379/0"  # flag --redis-url' in out
    assert "port = 7462  # default" in out
    assert "s3cr" not in out


def test_print_config_can_be_read_back(capsys, tmp_path):
    argv = ("--labels", "a=b", "--caps", "CPU=5", "--model-dirs", "/a,/b c", "--lease-s", "9.5")
    with pytest.raises(SystemExit):
        agent("--print-config", *argv)
    file = written(tmp_path / "agent.toml", capsys.readouterr().out)
    assert agent(default_file=file).value == agent(*argv).value


def test_a_password_is_masked_in_error_messages_too():
    message = refusal("--log-level", "redis://:hunter2@host/0")
    assert "hunter2" not in message


@pytest.mark.parametrize(("kind", "name"), [(AgentConfig, "agent"), (HeadConfig, "head")])
def test_help_describes_every_setting(kind, name, capsys):
    with pytest.raises(SystemExit) as left:
        load(kind, name=name, argv=["--help", "--nonsense-comes-too-late"][:1], environ={}, default_file=NO_FILE)
    assert left.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    for info in fields(kind):
        at = next(
            n
            for n, line in enumerate(lines)
            if info.name.replace("_", "-") in line and line.startswith(("  --", "  ["))
        )
        assert len(lines[at + 1].strip()) > 10, f"{info.name} has no description"


def test_version_names_the_program(capsys):
    with pytest.raises(SystemExit):
        agent("--version")
    assert capsys.readouterr().out.startswith("sollol-agent ")


HEAD_TABLES = """\
parallel = 2

[models.default]
pools = 2

[models."llama3.1:70b"]
max_nodes = 3
require = ["gpu_node"]
"""


def head(tmp_path, text, *argv, environ=None):
    file = written(tmp_path / "head.toml", text)
    return load(HeadConfig, name="head", argv=argv, environ=environ or {}, default_file=file)


def head_refusal(tmp_path, text, *argv, environ=None):
    with pytest.raises(ConfigError) as caught:
        head(tmp_path, text, *argv, environ=environ)
    return caught.value.refusal.message.replace(f"file {tmp_path}/head.toml", "file")


def test_tables_of_options_are_read_by_name(tmp_path):
    loaded = head(tmp_path, HEAD_TABLES)

    assert list(loaded.value.models) == ["default", "llama3.1:70b"]
    assert loaded.value.models["default"].pools == 2
    assert loaded.value.models["llama3.1:70b"].require == ("gpu_node",)
    assert loaded.value.models["llama3.1:70b"].pools is None
    assert loaded.origins["models"] == f"file {tmp_path}/head.toml line 3"


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("pool = 3", 'line 9, [models."llama3.1:70b"]: unknown setting "pool"; the closest one is "pools"'),
        ("pools = 0", 'line 9, [models."llama3.1:70b"]: pools must be int from 1 to 64, got 0'),
        ("pools = 65", "got 65"),
        ('pools = "2"', 'got "2"'),
        ("strategy = 'best'", "strategy must be pack|spread"),
        ("allow_reduced_context = 1", "allow_reduced_context must be true|false, got 1"),
        ("prefer = 'x'", 'prefer must be list of text, got "x" (default [])'),
        ("min_memory_bytes = -1", "min_memory_bytes must be int of 0 or more, got -1"),
    ],
)
def test_a_wrong_option_is_refused_like_a_setting_with_its_line_and_table(tmp_path, line, complaint):
    assert complaint in head_refusal(tmp_path, f"{HEAD_TABLES}{line}\n")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("models = 3", "line 1: models are tables such as"),
        ("[models]\npools = 3", "line 1: models are tables such as"),
        ("models.x.pols = 3", 'file line 1, [models."x"]: unknown setting "pols"'),
        ("models = { x = { pools = 0 } }", 'file line 1, [models."x"]: pools must be'),
        ('[models."../x"]\npools = 3', "[models.\"../x\"]: the model name '../x' contains '..'"),
        ("[models.x]\nrequire = ['=a']", "[models.\"x\"]: label '=a' has no name"),
        (
            "[models.default]\nmax_nodes = 2\n[models.x]\nbackends_per_pool = 3",
            '[models."x"]: backends_per_pool is 3; use 0 to 2, since max_nodes is 2',
        ),
    ],
)
def test_what_every_request_for_a_model_would_be_refused_for_is_refused_in_the_file(tmp_path, text, complaint):
    assert complaint in head_refusal(tmp_path, text)


def test_tables_of_options_come_from_a_file_only(tmp_path):
    assert "flag --models: models are tables" in head_refusal(tmp_path, "", "--models", "x=1")
    assert "environment SOLLOL_HEAD_MODELS" in head_refusal(tmp_path, "", environ={"SOLLOL_HEAD_MODELS": "x=1"})


def test_printed_tables_of_options_are_read_back_as_they_were(tmp_path, capsys):
    with pytest.raises(SystemExit):
        head(tmp_path, HEAD_TABLES, "--print-config")
    printed = capsys.readouterr().out

    assert 'models = { "default" = { "pools" = 2 }' in printed
    assert head(tmp_path, printed).value == head(tmp_path, HEAD_TABLES).value


def test_help_shows_every_option(tmp_path, capsys):
    with pytest.raises(SystemExit):
        head(tmp_path, "", "--help")

    shown = capsys.readouterr().out
    assert '[models."NAME"], in the file only' in shown
    for option in fields(ModelOptions):
        assert f"\n        {option.name} (" in shown


TCP = ("--coordinator-listen", "tcp")


def test_engines_listen_on_ports_where_only_this_machine_or_a_trusted_network_or_a_key_lets_others_in():
    assert agent(*TCP).value.coordinator_ports() == range(18_080, 18_144)
    agent(*TCP, "--listen", "0.0.0.0", "--insecure")
    message = refusal(*TCP, "--listen", "0.0.0.0")
    assert "lets anyone there use the engines: name a coordinator_key_file, or set insecure = true" in message
    # With a key it is only what keeps the agent itself off that address that is left.
    keyed = ("--listen", "0.0.0.0", "--coordinator-key-file", "/etc/key")
    assert refusal(*TCP, *keyed) == refusal(*keyed)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--coordinator-listen", "udp"), "coordinator_listen must be unix|tcp"),
        (("--coordinator-port", "32705"), "coordinator_port must be int from 1024 to 32704, got"),
        ((*TCP, "--coordinator-port", "7600"), "coordinator_port is 7600, and 7600 to 7663 overlap with rpc_ports"),
        ((*TCP, "--coordinator-port", "7437"), "7437 to 7500 overlap with rpc_ports"),
        (("--rpc-ports", "7500-7500"), "rpc_ports is '7500-7500', not first and last port such as 7500-7699"),
    ],
)
def test_ports_for_engines_that_cannot_be_are_refused(words, complaint):
    message = refusal(*words)
    assert complaint in message


def test_ports_that_no_engine_listens_on_overlap_with_nothing():
    assert agent("--coordinator-port", "7600").value.coordinator_listen == "unix"


@pytest.mark.parametrize("text", ["0123456789abcdef", "# for the tools\n\n  0123456789abcdef  \n"])
def test_the_engines_key_is_the_one_line_of_its_file_that_is_no_comment(tmp_path, text):
    file = written(tmp_path / "key", text)
    assert agent("--coordinator-key-file", str(file)).value.coordinator_key() == "0123456789abcdef"
    assert AgentConfig().coordinator_key() == ""


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "short", "two-keys-1\ntwo-keys-2\n", "with spaces in it", "a,b,c,d,e,f", "é" * 10]
)
def test_a_file_without_one_usable_key_is_refused_and_its_content_not_shown(tmp_path, text):
    file = written(tmp_path / "key", text)
    with pytest.raises(ConfigError) as caught:
        agent("--coordinator-key-file", str(file)).value.coordinator_key()
    assert str(file) in caught.value.refusal.message
    assert "two-keys" not in caught.value.refusal.message


def test_a_key_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        agent("--coordinator-key-file", str(tmp_path / "none")).value.coordinator_key()


def test_a_lease_that_one_late_heartbeat_would_end_is_refused():
    assert AgentConfig(heartbeat_s=4.0, lease_s=8.0).lease_s == 8.0
    with pytest.raises(ValueError, match=r"lease_s is 7\.5 with heartbeat_s = 4"):
        AgentConfig(heartbeat_s=4.0, lease_s=7.5)
