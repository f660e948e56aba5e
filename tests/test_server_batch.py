"""``run_batch``: every request is answered once, whatever happens in between."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the server extra is not installed")

import tiny_llama
from waiting import LIMIT, gone, wait_until

from lightvllm.cli.main import main
from lightvllm.engine.async_llm import AsyncLLM
from lightvllm.errors import ConfigError, LightvllmError
from lightvllm.server.batch import Batch
from lightvllm.server.batch_files import Answers
from lightvllm.server.settings import ServerSettings

SETTINGS = ServerSettings(served_model_names=("tiny",))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.build(tmp_path_factory.mktemp("model"), max_position_embeddings=512)


def completion(prompt: str, **body: Any) -> dict[str, Any]:
    return {"method": "POST", "url": "/v1/completions", "body": {"prompt": prompt, "max_tokens": 6, **body}}


def chat(text: str, **body: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"method": "POST", "url": "/v1/chat/completions", "body": {"messages": messages, "max_tokens": 6, **body}}


def write(path: Path, requests: dict[str, Any] | list[tuple[str, Any]]) -> Path:
    pairs = requests.items() if isinstance(requests, dict) else requests
    path.write_text("".join(json.dumps({"custom_id": name, **request}) + "\n" for name, request in pairs))
    return path


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The answers by custom_id; each exactly once."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    answers = {line["custom_id"]: line for line in lines}
    assert len(answers) == len(lines)
    assert len({line["id"] for line in lines}) == len(lines)
    return answers


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "in.jsonl"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def run(folder: Path, source: Path, target: Path, *, concurrency: int = 8, **options: Any) -> Any:
    async def main() -> Any:
        engine = await AsyncLLM.create(folder, engine_process=False, num_kv_blocks=256, **options)
        try:
            with Batch(source, target, "tiny") as batch:
                seen: list[int] = []
                await batch.run(
                    engine, SETTINGS, max_concurrency=concurrency, on_progress=lambda counts: seen.append(counts.done)
                )
                assert seen == list(range(1, len(seen) + 1))
                return batch.counts
        finally:
            await engine.shutdown()

    return asyncio.run(main())


def test_answers_are_what_the_server_would_say(folder: Path, source: Path, target: Path) -> None:
    write(
        source,
        {
            "text": completion("Paris", temperature=0, model="tiny"),
            "again": completion("Paris", temperature=0),
            "talk": chat("Paris?", temperature=0, logprobs=True, max_tokens=3),
            "two": completion("Rome", n=2, seed=1),
        },
    )
    counts = run(folder, source, target)
    assert (counts.total, counts.before, counts.done, counts.failed) == (4, 0, 4, 0)
    answers = read(target)
    assert set(answers) == {"text", "again", "talk", "two"}
    for answer in answers.values():
        assert answer["error"] is None
        assert answer["response"]["status_code"] == 200
        assert answer["response"]["request_id"] == answer["id"]
    text = answers["text"]["response"]["body"]
    assert text["object"] == "text_completion"
    assert text["model"] == "tiny"
    assert text["choices"][0]["text"] == answers["again"]["response"]["body"]["choices"][0]["text"] != ""
    assert len(answers["two"]["response"]["body"]["choices"]) == 2
    talk = answers["talk"]["response"]["body"]
    assert talk["object"] == "chat.completion"
    assert len(talk["choices"][0]["logprobs"]["content"]) == talk["usage"]["completion_tokens"]
    assert counts.tokens == sum(answer["response"]["body"]["usage"]["completion_tokens"] for answer in answers.values())


def test_a_wrong_request_has_its_error_and_the_others_their_answers(folder: Path, source: Path, target: Path) -> None:
    requests = {
        "right": completion("Paris"),
        "field": completion("Paris", temperature="warm"),
        "range": completion("Paris", top_p=7),
        "long": completion("Paris " * 2000),
        "model": completion("Paris", model="gpt-4"),
        "stream": chat("hi", stream=True),
        "url": {**completion("Paris"), "url": "/v1/images"},
        "method": {**completion("Paris"), "method": "GET"},
        "no body": {"method": "POST", "url": "/v1/completions"},
        "body": {"method": "POST", "url": "/v1/completions", "body": [1]},
        "nothing": {},
        "embedding": {"method": "POST", "url": "/v1/embeddings", "body": {"input": "x"}},
        "grammar": completion("x", response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": 5}}),
    }
    counts = run(folder, write(source, requests), target)
    assert (counts.done, counts.failed) == (len(requests), len(requests) - 1)
    answers = read(target)
    for name, answer in answers.items():
        response = answer["response"]
        expected = {"right": 200, "model": 404, "url": 404, "method": 405, "nothing": 405}.get(name, 400)
        assert response["status_code"] == expected, (name, response)
        if name != "right":
            assert set(response["body"]["error"]) == {"message", "type", "param", "code"}
    assert "max_tokens" not in answers["field"]["response"]["body"]["error"]["message"]
    assert answers["field"]["response"]["body"]["error"]["param"] == "temperature"


def test_only_what_is_open_is_done(folder: Path, source: Path, target: Path) -> None:
    requests = {f"r{number}": completion(f"Paris {number}") for number in range(10)}
    run(folder, write(source, requests), target)
    before = target.read_text().splitlines(keepends=True)
    target.write_text("".join(before[:4]) + before[4][:30])  # a process was killed here
    counts = run(folder, source, target)
    assert (counts.total, counts.before, counts.done) == (10, 4, 6)
    assert set(read(target)) == set(requests)
    assert target.read_text().startswith("".join(before[:4]))


def test_requests_may_be_added(folder: Path, source: Path, target: Path) -> None:
    run(folder, write(source, {"a": completion("Paris")}), target)
    counts = run(folder, write(source, {"b": completion("Rome"), "a": completion("Paris")}), target)
    assert (counts.before, counts.done) == (1, 1)
    assert set(read(target)) == {"a", "b"}


@pytest.mark.parametrize("change", ["body", "url", "gone", "model"])
def test_a_changed_input_is_noticed(folder: Path, source: Path, target: Path, change: str) -> None:
    requests = {"a": completion("Paris"), "b": completion("Rome")}
    run(folder, write(source, requests), target)
    if change == "body":
        requests["b"] = completion("Oslo")
    elif change == "url":
        requests["b"]["url"] = "/v1/chat/completions"
    elif change == "gone":
        del requests["b"]
    write(source, requests)
    answers = target.read_bytes()
    with pytest.raises(ConfigError, match=r"has an answer to '.' that is to another request"):
        Batch(source, target, "other" if change == "model" else "tiny")
    assert target.read_bytes() == answers
    with Batch(source, target, "other", overwrite=True) as batch:
        assert batch.counts.before == 0
    assert target.read_bytes() == b""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no requests"),
        ("\n\n", "has no requests"),
        ('{"custom_id": "a"}\n{"custom_id": "b"}\n{"custom_id": "a"}\n', "custom_id 'a' twice"),
        ('{"custom_id": "a"}\n{"custom_id": \n', "line 2 is no request"),
        ('{"custom_id": 5}\n', "line 1 is no request: .*custom_id"),
        ('{"method": "POST"}\n', "line 1 is no request: .*custom_id"),
        ('{"custom_id": ""}\n', "line 1: custom_id is empty"),
        ("[]\n", "line 1 is no request"),
        ("\udcff\n", "line 1 is no request"),
    ],
)
def test_an_input_that_is_none(source: Path, target: Path, text: str, said: str) -> None:
    source.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=said):
        Batch(source, target, "tiny")
    assert not target.exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hello\n", "line 1 is no answer of a batch"),
        ('{"id": "batch_req_1", "custom_id": "a"}\n', "not from lightvllm run-batch"),
        ('{"id": "batch_req_%s", "custom_id": "a"}\n' % ("0" * 24) * 2, "two answers to 'a'"),
        ('{"id": "batch_req_%s", "custom_id": "zz"}\n' % ("0" * 24), "an answer to 'zz' that is to another request"),
    ],
)
def test_an_output_that_is_something_else_stays_as_it_is(source: Path, target: Path, text: str, said: str) -> None:
    write(source, {"a": completion("Paris")})
    target.write_text(text)
    with pytest.raises(ConfigError, match=said):
        Batch(source, target, "tiny")
    assert target.read_text() == text


def test_files_that_cannot_be_used(source: Path, target: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        Batch(source, target, "tiny")
    write(source, {"a": completion("Paris")})
    with pytest.raises(ConfigError, match="both input and output"):
        Batch(source, source, "tiny")
    with pytest.raises(ConfigError, match="cannot write"):
        Batch(source, tmp_path / "no" / "out.jsonl", "tiny")
    with Answers(target), pytest.raises(ConfigError, match="being written by another process"):
        Batch(source, target, "tiny")


def test_a_byte_order_mark_and_no_last_newline_are_no_fault(source: Path, target: Path) -> None:
    source.write_bytes(b"\xef\xbb\xbf" + b'{"custom_id": "a"}\r\n\r\n{"custom_id": "b"}')
    with Batch(source, target, "tiny") as batch:
        assert [entry.custom_id for _, entry in batch.open_entries()] == ["a", "b"]


def test_answers_are_on_disk_in_time_and_at_the_end(
    folder: Path, source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    fsync = os.fsync

    def noted(fd: int) -> None:
        if os.path.sameopenfile(fd, watched.fileno()):
            sizes.append(os.fstat(fd).st_size)
        fsync(fd)

    write(source, {f"r{number}": completion("Paris", max_tokens=30, ignore_eos=True) for number in range(30)})

    async def main() -> None:
        engine = await AsyncLLM.create(folder, engine_process=False, num_kv_blocks=256, max_num_seqs=1)
        try:
            with Batch(source, target, "tiny") as batch:
                await batch.run(engine, SETTINGS, max_concurrency=2, sync_seconds=0.01)
        finally:
            await engine.shutdown()

    with target.open("ab") as watched:
        monkeypatch.setattr(os, "fsync", noted)
        asyncio.run(main())
    assert len(sizes) >= 3
    assert sizes == sorted(set(sizes))  # each time there was something to write
    assert sizes[-1] == target.stat().st_size


def test_more_at_a_time_than_the_engine_takes_wait(folder: Path, source: Path, target: Path) -> None:
    write(source, {f"r{number}": completion("Paris", max_tokens=2) for number in range(6)})
    counts = run(folder, source, target, max_num_seqs=1, max_num_waiting=0, concurrency=3)
    assert (counts.done, counts.failed) == (6, 0)


def test_a_failed_engine_ends_the_batch_and_leaves_the_rest_open(folder: Path, source: Path, target: Path) -> None:
    requests = {f"r{number}": completion(f"Paris {number}", max_tokens=40, ignore_eos=True) for number in range(30)}
    write(source, requests)

    async def main() -> None:
        engine = await AsyncLLM.create(folder, engine_process=False, num_kv_blocks=256, max_num_seqs=2)
        ending: list[asyncio.Task[None]] = []
        with Batch(source, target, "tiny") as batch:
            with pytest.raises(LightvllmError):
                await batch.run(
                    engine,
                    SETTINGS,
                    max_concurrency=4,
                    on_progress=lambda counts: ending.append(asyncio.ensure_future(engine.shutdown())),
                )
            assert 0 < batch.counts.done < 30
            assert batch.counts.failed == 0
        await asyncio.gather(*ending)

    asyncio.run(main())
    assert all(answer["response"]["status_code"] == 200 for answer in read(target).values())
    run(folder, source, target)
    assert set(read(target)) == set(requests)


# ------------------------------------------------------------------------------------------------ the command


class Command:
    """``lightvllm run-batch`` as a child process."""

    def __init__(self, folder: Path, source: Path, target: Path, *options: str) -> None:
        code = "from lightvllm.cli.main import run; run()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "run-batch", str(source), str(target), "-m", str(folder), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def end(self) -> tuple[int, str]:
        _, said = self.process.communicate(timeout=LIMIT)
        return self.process.returncode, said


@pytest.fixture
def many(source: Path) -> dict[str, Any]:
    requests = {f"r{number}": completion(f"Paris {number}", max_tokens=60, ignore_eos=True) for number in range(120)}
    write(source, requests)
    return requests


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.fixture
def few_at_a_time() -> list[str]:
    return ["--max-num-seqs", "2", "--num-kv-blocks", "64", "--threads", "1"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_broken_off_in_the_middle_and_resumed(
    folder: Path,
    source: Path,
    target: Path,
    many: dict[str, Any],
    few_at_a_time: list[str],
    number: signal.Signals,
) -> None:
    import psutil

    with Command(folder, source, target, *few_at_a_time) as command:
        wait_until(lambda: num_lines(target) >= 5 or command.process.poll() is not None, "some answers")
        children = psutil.Process(command.process.pid).children(recursive=True)
        os.kill(command.process.pid, number)
        status, said = command.end()
    wait_until(lambda: all(gone(child.pid) for child in children), "the engine's process to end")
    answered = num_lines(target)
    assert 5 <= answered < len(many)
    if number == signal.SIGKILL:
        assert status == -number
    else:
        assert status == 128 + number
        assert f"{answered} of 120 are answered" in said
        assert "the same command goes on" in said
        assert "Traceback" not in said
    with Command(folder, source, target) as command:
        status, said = command.end()
    assert status == 0, said
    assert f"{answered} of 120 are answered already" in said
    assert "120 of 120 are answered (" in said
    assert set(read(target)) == set(many)


def test_a_mistake_is_found_before_a_model_is_loaded(source: Path, target: Path) -> None:
    write(source, [("a", completion("x")), ("a", completion("y"))])
    with Command(Path("no-such-model"), source, target) as command:
        status, said = command.end()
    assert status == 1
    assert "custom_id 'a' twice" in said
    assert said.count("\n") == 1


def test_options_are_checked_before_a_model_is_loaded(
    source: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(source, {"a": completion("x")})
    for options, wrong in (
        (["--tool-call-parser", "morse"], "tool_call_parser='morse' is not known"),
        (["--chat-template", str(target)], "cannot read --chat-template"),
        (["--served-model-name", ""], "--served-model-name is empty"),
        (["--ray-address", "auto"], "--ray-address is given"),
    ):
        assert main(["run-batch", str(source), str(target), "-m", "no-such-model", *options]) == 1
        assert wrong in capsys.readouterr().err
    assert not target.exists()


def test_a_batch_that_is_done_needs_no_model(folder: Path, source: Path, target: Path) -> None:
    write(source, {"a": completion("Paris")})
    with Command(folder, source, target, "--served-model-name", "tiny") as command:
        assert command.end()[0] == 0
    with Command(Path("no-such-model"), source, target, "--served-model-name", "tiny") as command:
        assert command.end() == (0, "1 of 1 are answered already\n")


@pytest.fixture
def counts() -> Any:
    from lightvllm.server.batch import Counts

    return Counts(total=10, before=2, done=3, failed=1)


def test_lines_without_a_terminal(counts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightvllm.cli import run_batch

    told: list[str] = []
    show = run_batch._lines(told.append)
    show(counts)
    assert told == []
    monkeypatch.setattr(run_batch, "_LINE_SECONDS", 0.0)
    show(counts)
    assert told == ["5 of 10, 1 with an error\n"]
