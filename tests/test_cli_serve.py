"""``lightvllm serve`` as its user meets it: options, a file of them, errors in one line, nothing left at the end."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import fields
from pathlib import Path

import httpx2 as httpx
import psutil
import pytest
import tiny_llama
import typer
from server_process import ServerProcess, started
from waiting import gone, wait_until

from lightvllm import logs
from lightvllm.cli import serve_options
from lightvllm.cli.main import app, main
from lightvllm.cli.options import EngineOptions
from lightvllm.cli.serve_options import ListenOptions, ServerOptions
from lightvllm.errors import ConfigError
from lightvllm.server.listen import ListenSettings
from lightvllm.server.settings import ServerSettings

QUIET = {"LIGHTVLLM_API_KEY": ""}
LONG = 100_000  # tokens of context, for an answer that lasts
EXECUTORS = [
    pytest.param((), id="uniproc"),
    pytest.param(("--executor", "k8s", "-tp", "2"), id="k8s", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_llama.build(tmp_path_factory.mktemp("tiny"), max_position_embeddings=LONG)


def serve(model: Path | str, *options: str, **env: str) -> AbstractContextManager[ServerProcess]:
    code = "from lightvllm.cli.main import run; run()"
    command = [sys.executable, "-c", code, "serve", str(model), "--max-model-len", "64", *options]
    return started(command, os.environ | QUIET | {"OMP_NUM_THREADS": "1"} | env)


# ------------------------------------------------------------------------------------------------------- options


def test_defaults_are_the_settings():
    listen = ListenOptions(max_header_bytes=ListenSettings().max_header_bytes)  # else read by its parser
    assert listen.settings() == ListenSettings()
    assert {field.name for field in fields(ListenOptions)} == set(ListenSettings.model_fields)
    options = ServerOptions(max_request_bytes=ServerSettings().max_request_bytes)  # else read by its parser
    assert options.settings("m", None) == ServerSettings(served_model_names=("m",))
    read_otherwise = {"served_model_names": "served_model_name", "api_keys": "api_key", "request_timeout": "timeout"}
    names = {read_otherwise.get(name, name) for name in ServerSettings.model_fields}
    assert {field.name for field in fields(ServerOptions)} == names | {"api_key_file"}


def test_every_option_is_in_the_docs_with_its_default():
    page = (Path(__file__).parent.parent / "docs/serving.md").read_text()
    rows = [row.split("|")[1:3] for row in page.split("## Settings")[1].split("\n## ")[0].splitlines() if "`--" in row]
    told = {name: default.strip(" `") for names, default in rows for name in re.findall(r"`(--?[a-z-]+)`", names)}
    engine = {field.name for field in fields(EngineOptions)}
    for parameter in typer.main.get_command(app).commands["serve"].params:  # type: ignore[attr-defined]
        if parameter.name in engine | {"model", "help"}:
            continue
        name, default = parameter.opts[0], getattr(parameter.default, "value", parameter.default)
        assert {*parameter.opts, *parameter.secondary_opts} <= told.keys()
        if isinstance(default, bool):
            assert told[name] == ("on" if default else "off"), name
        elif isinstance(default, str | int | float) and default != "":
            assert told[name] == (f"{default:g}" if isinstance(default, float) else str(default)), name
        else:
            assert told[name] in ("", "none", "all", "MODEL as given", "the model's", "by the chat template"), name


def test_choices_are_the_logs():
    assert tuple(serve_options.LogFormat) == logs.LOG_FORMATS
    assert tuple(serve_options.LogLevel) == logs.LOG_LEVELS


def test_keys_come_from_everywhere(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# ours\n  #old\nfile-1\n\n  file-2 \n")
    file.chmod(0o600)

    def keys(environment: str | None = None, **options: object) -> list[str]:
        settings = ServerOptions(max_request_bytes=1, **options).settings("m", environment)  # type: ignore[arg-type]
        return [key.get_secret_value() for key in settings.api_keys]

    assert keys() == []
    assert keys("env-1 env-2") == ["env-1", "env-2"]
    assert keys("env-1", api_key=["a"], api_key_file=file) == ["a", "file-1", "file-2"]
    file.write_text("# none yet\n")
    with pytest.raises(ConfigError, match="holds no key; put one on each line"):
        keys(api_key_file=file)
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="open to others"):
        keys(api_key_file=file)


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (["--host", "0.0.0.0"], 1, "0.0.0.0:8000 can be reached from other machines"),
        (["--host", "nowhere.invalid"], 1, "is no address of this machine"),
        (["--port", "70000"], 2, "--port"),
        (["--ssl-certfile", "x.pem"], 1, "TLS needs both"),
        (["--ssl-certfile", "x.pem", "--ssl-keyfile", "y.pem"], 1, "cannot read the TLS key y.pem"),
        (["--rate-limit", "many"], 1, "write it like 60/minute"),
        (["--api-key", "a b"], 1, "API key 1 of 1 cannot be sent"),
        (["--api-key-file", "/nowhere"], 1, "cannot read the API key file /nowhere"),
        (["--chat-template", "/nowhere"], 1, "cannot read --chat-template /nowhere"),
        (["--chat-template", "BROKEN"], 1, "chat template is broken"),
        (["--tool-call-parser", "nonsense"], 1, "tool_call_parser='nonsense' is not known; use auto"),
        (["--otlp-traces-endpoint", "nowhere"], 1, "nowhere"),
        (["--max-request-bytes", "much"], 2, "'much' is no size"),
        (["--root-path", "llm"], 1, "root_path='llm' must begin with a slash"),
        (["--allow-credentials", "--allowed-origins", "*"], 1, "allow_credentials needs origins by name"),
        (["--ray-address", "auto"], 1, "--ray-address is given, but executor ray is not used"),
        (["--config", "/nowhere.yaml"], 1, "cannot read --config /nowhere.yaml"),
        (["--no-such-option"], 2, "No such option"),
    ],
)
def test_wrong_options_are_one_line(options, status, words, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("LIGHTVLLM_API_KEY", "")
    (tmp_path / "BROKEN").write_text("{% if %}")
    options = [str(tmp_path / "BROKEN") if option == "BROKEN" else option for option in options]
    assert main(["serve", "no-such-model", *options]) == status
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert words in line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prot: 1", "'prot' is no option of lightvllm serve"),
        ("[1]", "must hold a mapping"),
        ("a: [", "is no YAML"),
        ("port: {a: 1}", "port is given {'a': 1}; expected one value"),
        ("port: [1, 2]", "expected one value"),
        ("port: x", "Invalid value for '--port'"),
        ("config: x", "'config' is no option"),
    ],
)
def test_wrong_files_of_options(text, words, tmp_path, capsys):
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    assert main(["serve", "m", "--config", str(path)]) in (1, 2)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line


def test_the_port_is_taken_before_anything_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", "no-such-model", "--port", str(port)]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line == (
        f"error: cannot listen on 127.0.0.1:{port}: Address already in use; use another --port, or 0 for a free one"
    )


# ----------------------------------------------------------------------------------------------- with a real model


@pytest.fixture(scope="module")
def server(model, tmp_path_factory) -> Iterator[ServerProcess]:
    config = tmp_path_factory.mktemp("config") / "serve.yaml"
    config.write_text(
        "port: 0\nmax-num-seqs: 4\nserved_model_name: [tiny, small]\nlog-format: json\nrate-limit: 1000/minute\n"
        "max_request_bytes: 2000000\ndocs: true\nmax-model-len: 100\nmax-num-batched-tokens: 256\n"
    )
    with serve(model, "--config", str(config), "--max-model-len", "64", LIGHTVLLM_API_KEY="env-key") as server:
        server.ready()
        yield server


def test_it_says_where_and_when(server, model):
    first, ready = (line.strip() for line in server.out[:2])
    assert first == f"listening on {server.url}; loading {model}"
    assert ready.startswith(f"ready: tiny on {server.url} (uniproc, tensor parallel 1, pipeline parallel 1, ")


def test_it_serves_as_the_file_the_line_and_the_environment_say(server):
    assert httpx.get(f"{server.url}/health?deep=1").json() == {"status": "ready", "reason": None, "dead_ranks": []}
    assert httpx.get(f"{server.url}/version").status_code == 401
    key = {"Authorization": "Bearer env-key"}
    assert httpx.get(f"{server.url}/version", headers=key).status_code == 200
    metrics = httpx.get(f"{server.url}/metrics", headers=key).text
    assert 'max_model_len="64"' in metrics, "the command line wins"
    assert "env-key" not in server.text


def test_its_log_is_json(server):
    httpx.get(f"{server.url}/nowhere", headers={"X-Request-Id": "here-i-am"})
    line = wait_until(lambda: server.seen(r'(?m)^\{.*"here-i-am".*\}$'), "the line of the request")
    assert json.loads(line)["request_id"] == "here-i-am"


def test_a_model_that_is_not_there():
    with serve("no-such-model", "--port", "0") as server:
        assert server.wait() == 1
        assert server.err[-1].startswith("error: no-such-model: no such model folder; expected ")
        assert "Traceback" not in server.text


def everything(server: ServerProcess) -> list[int]:
    return [server.process.pid, *(child.pid for child in server.children())]


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("moment", ["loading", "ready"])
def test_ctrl_c_leaves_nothing(executor, moment, model):
    """As a terminal sends it: to all processes at once."""
    with serve(model, "--port", "0", *executor) as server:
        if moment == "ready":
            server.ready()
        else:
            wait_until(server.children, "something has been started")
        pids = everything(server)
        os.killpg(server.process.pid, signal.SIGINT)
        assert server.wait(30) == 130
        wait_until(lambda: all(gone(pid) for pid in pids), "no process is left", limit=10)
    assert "Traceback" not in server.text
    assert "\nerror:" not in server.text


@pytest.mark.parametrize("executor", EXECUTORS)
def test_ctrl_c_during_a_stream_tells_the_client_and_leaves_nothing(executor, model):
    options = ["--port", "0", "--served-model-name", "tiny", "--num-kv-blocks", "7000", "--max-model-len", str(LONG)]
    body = {"model": "tiny", "prompt": "Paris", "max_tokens": 90_000, "ignore_eos": True, "stream": True}
    with serve(model, *options, *executor) as server:
        address = server.ready()
        pids = everything(server)
        with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as answer:
            events = (line for line in answer.iter_lines() if line)
            assert '"choices"' in next(events)
            os.killpg(server.process.pid, signal.SIGINT)
            wait_until(lambda: server.seen("finishing 1 requests, for at most 30 s"), "it waits for the stream")
            assert httpx.get(f"{address}/health").json()["status"] == "stopping"
            os.killpg(server.process.pid, signal.SIGINT)
            *_, last = events
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert server.wait(30) == 130
        wait_until(lambda: all(gone(pid) for pid in pids), "no process is left", limit=10)
    assert "Traceback" not in server.text


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_server_that_is_killed_takes_all_with_it(executor, model):
    with serve(model, "--port", "0", *executor) as server:
        server.ready()
        pids = everything(server)
        assert len(pids) > 1
        server.process.kill()
        wait_until(lambda: all(gone(pid) for pid in pids), "no process is left", limit=15)


def test_a_worker_that_is_killed_is_told_and_the_server_stays(model):
    with serve(model, "--port", "0", "--executor", "k8s", "-tp", "2") as server:
        address = server.ready()
        workers = [child for child in server.children() if "lightvllm.backends.k8s.server" in " ".join(child.cmdline())]
        pids = everything(server)
        workers[-1].send_signal(signal.SIGKILL)
        health = wait_until(
            lambda: (answer := httpx.get(f"{address}/health")).status_code == 503 and answer.json(),
            "health says no",
            limit=5,
        )
        assert (health["status"], len(health["dead_ranks"])) == ("failed", 1)
        assert "SIGKILL" in health["reason"]
        assert httpx.get(f"{address}/live").status_code == 503
        server.signal(signal.SIGTERM)
        assert server.wait(30) == 143
        wait_until(lambda: all(gone(pid) for pid in pids), "no process is left", limit=10)


def test_two_servers_at_once(model):
    with serve(model, "--port", "0") as one, serve(model, "--port", "0") as other:
        assert one.ready() != other.ready()
        assert all(httpx.get(f"{each.url}/health").status_code == 200 for each in (one, other))
        theirs = {child.pid for each in (one, other) for child in psutil.Process(each.process.pid).children()}
        assert len(theirs) >= 2
