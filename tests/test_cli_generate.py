"""``lightvllm generate``: several prompts in order although computed together, and a real tiny model end to end."""

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_llama

from lightvllm.cli.generate import InOrder
from lightvllm.cli.main import main
from lightvllm.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput


def output(prompt, text, *, finished=False):
    completion = CompletionOutput(0, text, [7] * len(text), finish_reason="length" if finished else None)
    made = RequestOutput(str(prompt), "", [1, 2], [completion], finished, RequestMetrics(time.monotonic()))
    made.prompt_index = prompt
    return made


def shown(titles, *outputs, as_json=False):
    """What has been written after each output."""
    sink, states = io.StringIO(), []
    show = InOrder(titles, sink.write, as_json=as_json)
    for one in outputs:
        show(one)
        states.append(sink.getvalue())
    return states


def test_one_prompt_grows():
    assert shown(["p"], output(0, "a"), output(0, "ab"), output(0, "ab c", finished=True)) == ["a", "ab", "ab c\n"]


def test_later_prompts_wait_for_their_turn():
    states = shown(
        ["first", "second", "third"],
        output(1, "B"),
        output(0, "A"),
        output(2, "C", finished=True),
        output(1, "BB"),
        output(0, "AA", finished=True),
        output(1, "BBB", finished=True),
    )
    assert states[0] == ""
    assert states[1] == states[2] == states[3] == "[1/3] first\nA"
    assert states[4] == "[1/3] first\nAA\n\n[2/3] second\nBB"
    assert states[5] == "[1/3] first\nAA\n\n[2/3] second\nBBB\n\n[3/3] third\nC\n"


def test_json_is_written_when_a_result_is_whole():
    states = shown(
        ["p", "q"], output(1, "B", finished=True), output(0, "A"), output(0, "Aä", finished=True), as_json=True
    )
    assert states[:2] == ["", ""]
    first, second = map(json.loads, states[2].splitlines())
    assert (first["index"], first["prompt"], first["text"], first["finish_reason"]) == (0, "p", "Aä", "length")
    assert (first["token_ids"], first["num_prompt_tokens"]) == ([7, 7], 2)
    assert (second["index"], second["text"]) == (1, "B")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(tiny_llama.build(tmp_path_factory.mktemp("tiny")))


def results(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


ARGUMENTS = ["--max-tokens", "5", "--threads", "1", "--kernels", "reference", "--ignore-eos"]


def test_text(tiny, capsys):
    assert main(["generate", tiny, "-p", "The quick", "-p", "One token", *ARGUMENTS]) == 0
    text = capsys.readouterr()
    assert text.out.startswith("[1/2] The quick\n")
    assert "\n\n[2/2] One token\n" in text.out
    assert "2 prompts" in text.err.splitlines()[-1]
    assert "10 tokens out" in text.err.splitlines()[-1]
    assert "tokens/s" in text.err.splitlines()[-1]
    assert "loading weights" in text.err


def test_prompts_from_everywhere_are_the_same(tiny, capsys, tmp_path, monkeypatch):
    asked = []
    (tmp_path / "p.txt").write_text("The quick\n\nOne token\n")
    (tmp_path / "p.jsonl").write_text('"The quick"\n{"prompt": "One token"}\n')
    monkeypatch.setattr(sys, "stdin", io.StringIO("The quick\nOne token\n"))
    for given in (
        ["-p", "The quick", "-p", "One token"],
        ["--prompts-file", str(tmp_path / "p.txt")],
        ["-p", "The quick", "--prompts-file", str(tmp_path / "p.jsonl")],
        ["--prompts-file", "-"],
    ):
        assert main(["generate", tiny, *given, *ARGUMENTS, "--json"]) == 0
        asked.append(results(capsys))
    assert [r["prompt"] for r in asked[0]] == ["The quick", "One token"]
    assert all(len(r["token_ids"]) == 5 for r in asked[0])
    assert asked[1] == asked[3] == asked[0]
    assert [r["token_ids"] for r in asked[2]] == [r["token_ids"] for r in [asked[0][0], *asked[0]]]


def test_chat_uses_the_template_and_the_system_message(tiny, capsys):
    from lightvllm.engine.tokenizer import Tokenizer

    assert main(["generate", tiny, "-p", "Hi", "--chat", "--system", "Be brief.", *ARGUMENTS, "--json"]) == 0
    (result,) = results(capsys)
    tokenizer = Tokenizer.from_dir(tiny)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    expected = tokenizer.encode(tokenizer.apply_chat_template(messages), add_special_tokens=False)
    assert (result["prompt"], result["num_prompt_tokens"]) == ("Hi", len(expected))


def test_sampling_options_arrive(tiny, capsys):
    def ask(*options):
        assert main(["generate", tiny, "-p", "The quick", *ARGUMENTS, "--json", *options]) == 0
        return results(capsys)[0]

    greedy = ask()
    assert ask("--temperature", "3", "--top-k", "1", "--seed", "5")["token_ids"] == greedy["token_ids"]
    assert ask("--temperature", "3", "--min-p", "1", "--seed", "5")["token_ids"] == greedy["token_ids"]
    assert ask("--temperature", "3", "--top-p", "1e-9", "--seed", "5")["token_ids"] == greedy["token_ids"]
    one, again, other = (ask("--temperature", "3", "--seed", seed)["token_ids"] for seed in ("5", "5", "6"))
    assert one == again != other
    assert ask("--max-tokens", "2")["token_ids"] == greedy["token_ids"][:2]
    stopped = ask("--stop", greedy["text"][1])
    assert (stopped["text"], stopped["finish_reason"]) == (
        greedy["text"][: greedy["text"].index(greedy["text"][1])],
        "stop",
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "no prompt is given; use -p TEXT or --prompts-file FILE"),
        (["-p", "x", "--system", "s"], "--system is given without --chat; add --chat"),
        (["-p", "x", "--prompts-file", "/no/such/file"], "cannot read the prompts"),
        (["-p", "x", "-tp", "3", "--executor", "k8s"], "tensor_parallel_size=3 cannot split this model"),
        (["-p", "x", "-pp", "2"], "executor='uniproc' runs one worker"),
        (["-p", "x", "--temperature", "-1"], "temperature=-1.0 is not allowed"),
        (["-p", "x", "--ray-address", "auto"], "--ray-address is given, but executor ray is not used"),
        (["-p", "x " * 200], "max_model_len=128"),
    ],
)
def test_what_cannot_be_done_is_one_line(tiny, options, words, capsys):
    assert main(["generate", tiny, *options, *ARGUMENTS]) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert words in line


def test_a_reader_that_leaves_ends_it(tiny):
    """Like ``lightvllm generate … | head -c 1``. It says more than the pipe holds, so it cannot be done before."""
    command = [sys.executable, "-c", "from lightvllm.cli.main import run; run()", "generate", tiny]
    command += ["-p", "The quick"] * 60 + [*ARGUMENTS, "--max-tokens", "100"]
    process = subprocess.Popen(
        command, cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, pipesize=4096
    )
    assert process.stdout is not None
    assert process.stderr is not None
    with process:
        assert process.stdout.read(1)
        process.stdout.close()
        errors = process.stderr.read().decode()
        assert process.wait(60) == 141
    assert "Traceback" not in errors
    assert "error" not in errors


@pytest.mark.demo
@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--executor", "k8s", "-pp", "2"]])
def test_the_capital_of_france(options, capsys):
    from lightvllm import hub

    if not hub.installed("smollm2-135m"):
        pytest.skip("run: lightvllm models get smollm2-135m")
    assert main(["generate", "smollm2-135m", "-p", "What is the capital of France?", "--chat", *options]) == 0
    assert capsys.readouterr().out == "The capital of France is Paris.\n"
