"""``lightvllm models``, with the tiny wheel and an index of its own."""

import pytest
import tiny_gguf

from lightvllm.cli.main import main


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    tiny_gguf.publish(tmp_path, monkeypatch)
    return tmp_path / "cache/models/tiny"


def test_get_path_list_and_remove(tiny, capsys):
    assert main(["models", "path", "tiny"]) == 1
    assert capsys.readouterr().err == "error: model tiny is not there yet; run: lightvllm models get tiny\n"
    assert main(["models", "get", "tiny"]) == 0
    first = capsys.readouterr()
    assert first.out == f"{tiny}\n"
    assert "downloading tiny-model==1.0" in first.err
    assert "converting to float32" in first.err
    assert main(["models", "get", "tiny"]) == 0
    second = capsys.readouterr()
    assert second.out == f"{tiny}\n"
    assert "downloading" not in second.err
    assert main(["models", "path", "tiny"]) == 0
    assert capsys.readouterr().out == f"{tiny}\n"
    assert main(["models", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines if "tiny" in line] == [["tiny", "yes"]]
    assert [line.split()[1] for line in lines if "smollm2-135m" in line] == ["no"]
    assert main(["models", "rm", "tiny"]) == 0
    assert capsys.readouterr().out == "tiny: removed\n"
    assert not tiny.exists()
    assert main(["models", "rm", "tiny"]) == 0
    assert capsys.readouterr().out == "tiny: was not here\n"
