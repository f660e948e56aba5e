"""``lightvllm parity``: its exit status and its files."""

import json
import sys

import pytest
import tiny_llama

from lightvllm.cli.main import main


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(tiny_llama.build(tmp_path_factory.mktemp("tiny")))


ARGUMENTS = ["--executors", "uniproc", "--max-tokens", "3", "--threads", "1", "--kernels", "reference"]


def test_parity(tiny, tmp_path, capsys):
    json_file, html_file, prompts = tmp_path / "r.json", tmp_path / "r.html", tmp_path / "p.txt"
    prompts.write_text("The quick\nOne token\n")
    files = ["--prompts", str(prompts), "--json", str(json_file), "--html", str(html_file)]
    assert main(["parity", tiny, *ARGUMENTS, *files, "--repeat", "2"]) == 0
    shown = capsys.readouterr()
    assert "gave the same 6 tokens as transformers" in shown.out
    assert "asking the reference: prompt 2 of 2" in shown.err
    report = json.loads(json_file.read_text())
    assert report["identical"] is True
    assert [(r["executor"], r["repeat"], r["threads"]) for r in report["runs"]] == [
        ("uniproc", 1, 1),
        ("uniproc", 2, 1),
    ]
    assert report["dtype"] == "float32"
    assert "gave the same 6 tokens as transformers" in html_file.read_text()


def test_a_mismatch_is_status_1(tiny, tmp_path, capsys, monkeypatch):
    """transformers is made to read another model."""
    from lightvllm.parity import run

    other = tiny_llama.build(tmp_path / "other", seed=1)
    ask = run.ask_transformers
    monkeypatch.setattr(run, "ask_transformers", lambda folder, *rest: ask(other, *rest))
    (tmp_path / "p.txt").write_text("The quick\n")
    assert main(["parity", tiny, *ARGUMENTS, "--prompts", str(tmp_path / "p.txt")]) == 1
    shown = capsys.readouterr()
    assert "the tokens of transformers and uniproc 1x1 differ at prompt 1, step 1: token " in shown.out
    assert "Not the same: 1 difference between the run (uniproc)." in shown.out
    assert "error" not in shown.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--layouts", "one"], "layout 'one' is not TPxPP"),
        (["--executors", "slurm"], "executors slurm are unknown; use uniproc, ray, k8s"),
        (["--reference", "oracle"], "reference='oracle' is unknown"),
        (["--json", "/no/such/folder/r.json"], "/no/such/folder/r.json: its folder does not exist"),
        (["--k8s-workers", "a:1"], "--k8s-workers is given, but executor k8s is not used"),
        (["--prompts", "/no/such/file"], "cannot read the prompts"),
        ([], "prompt 8 has 469 tokens, with max_tokens=3 more than max_model_len=128; give shorter prompts"),
        (["--max-model-len", "500"], "max_model_len=500 does not fit the model; use 1 to 128"),
    ],
)
def test_what_cannot_be_done_is_one_line(tiny, options, words, capsys):
    assert main(["parity", tiny, *ARGUMENTS, *options]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert words in line


def test_a_missing_extra_is_said_before_anything_is_run(tiny, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["parity", tiny, "--executors", "uniproc,ray"]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "pip install 'lightvllm[ray]'" in line
