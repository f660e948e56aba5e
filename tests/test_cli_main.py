"""The command as a process: exit statuses, one line for an error, signals, and what importing it costs."""

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lightvllm.cli.main import main
from lightvllm.version import __version__

COMMAND = [sys.executable, "-c", "from lightvllm.cli.main import run; run()"]
HEAVY = ("torch", "ray", "grpc", "transformers", "numpy", "kubernetes", "gguf")


def lightvllm(*arguments, **kwargs):
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=120, check=False, **kwargs)


def test_version():
    ran = lightvllm("--version")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, f"lightvllm {__version__}\n", "")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["generate", "--help"], ["router", "--help"]])
def test_help_imports_nothing_heavy(arguments):
    code = f"""
import atexit, sys
from lightvllm.cli.main import main
status = main({arguments!r})
print(sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)
sys.exit(status)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (ran.returncode, ran.stderr.strip()) == (0, "[]")


def test_every_command_is_there():
    shown = lightvllm("--help").stdout
    for command in ("generate", "parity", "doctor", "models", "router", "worker", "certs", "kernels"):
        assert f" {command} " in shown


def test_an_error_is_one_line(capsys):
    assert main(["models", "get", "no-such-model"]) == 1
    errors = capsys.readouterr().err.strip().splitlines()
    assert errors[-1] == "error: model 'no-such-model' is not known; known: smollm2-135m"
    assert "Traceback" not in "".join(errors)


@pytest.mark.parametrize(
    "arguments", [["--debug", "models", "path", "no-such-model"], ["models", "path", "no-such-model", "--debug"]]
)
def test_debug_before_and_after_the_command(arguments, capsys):
    assert main(arguments) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: model 'no-such-model' is not known")
    assert "Traceback (most recent call last)" in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "m", "--no-such-option"], "No such option: --no-such-option; run: lightvllm generate --help"),
        (["generate"], "Missing argument 'MODEL'; run: lightvllm generate --help"),
        (["generte"], "No such command 'generte'. Did you mean 'generate'?; run: lightvllm --help"),
        (["generate", "m", "--max-tokens", "0"], "Invalid value for '--max-tokens'"),
        (["generate", "m", "--executor", "slurm"], "'slurm' is not one of"),
        (["generate", "m", "--kv-cache-memory", "much"], "'much' is no size; write it like 1GiB"),
    ],
)
def test_wrong_usage_is_one_line_and_two(arguments, words, capsys):
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert words in line


def test_no_arguments_show_the_help(capsys):
    assert main([]) == 2
    assert "Usage: lightvllm" in capsys.readouterr().out


def test_a_defect_is_one_line_too(monkeypatch, capsys):
    def broken(name):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("lightvllm.hub.model_dir", broken)
    assert main(["models", "path", "smollm2-135m"]) == 1
    assert capsys.readouterr().err == "error: internal error: ZeroDivisionError: oops; run with --debug for details\n"
    assert main(["models", "path", "smollm2-135m", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_in_order(number, status, tmp_path):
    """A download that waits for another one's lock is a wait that needs no engine."""
    lock = tmp_path / "models/.smollm2-135m.lock"
    lock.parent.mkdir()
    with lock.open("w") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        process = subprocess.Popen(
            [*COMMAND, "models", "get", "smollm2-135m"],
            env=os.environ | {"LIGHTVLLM_CACHE": str(tmp_path)},
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        with process:
            assert "waiting for another process" in process.stderr.readline()
            process.send_signal(number)
            rest = process.stderr.read()
            assert process.wait(10) == status
    assert "Traceback" not in rest


@pytest.mark.parametrize("arguments", [["--version"], ["models", "list"], ["models", "rm", "smollm2-135m"]])
def test_nobody_reads(arguments, tmp_path):
    """Like ``lightvllm … | true``."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ran = subprocess.run(
            [*COMMAND, *arguments],
            env=os.environ | {"LIGHTVLLM_CACHE": str(tmp_path)},
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            check=False,
        )
    finally:
        os.close(writer)
    assert ran.returncode == 128 + signal.SIGPIPE
    assert "Traceback" not in ran.stderr
    assert "error" not in ran.stderr.lower()


def test_the_console_script_is_this():
    import tomllib

    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"lightvllm": "lightvllm.cli.main:run"}


def test_a_second_signal_does_not_cut_the_end_short_and_a_third_does():
    code = """
import os, signal, sys
from lightvllm.cli.main import _signals
with _signals():
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        print("first", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("second", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("third", flush=True)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert ran.stdout.split() == ["first", "second"]
    assert "still shutting down; once more ends it by force" in ran.stderr
    assert ran.returncode == 130
