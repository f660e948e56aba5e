"""The environment of an actor, and what it says of a worker that cannot be had. Without Ray."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import psutil
import pytest
from waiting import LIMIT

from lightvllm.backends.ray.host import BEGUN, WorkerHost, apply_env
from lightvllm.errors import ConfigError
from lightvllm.messages import Deferred, decode_reply, encode_call


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """``os.environ`` and ``sys.path`` are put back afterwards."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(sys, "path", sys.path.copy())
    return monkeypatch


def test_what_is_there_is_kept_and_what_is_new_is_set(environ: pytest.MonkeyPatch) -> None:
    environ.setitem(os.environ, "HAD", "own")
    environ.setitem(os.environ, "TOO", "own")
    apply_env({"HAD": "given", "NEW": "given", "TOO": "given"}, {"TOO": "explicit"})
    assert (os.environ["HAD"], os.environ["NEW"], os.environ["TOO"]) == ("own", "given", "explicit")


@pytest.mark.parametrize(
    ("at_start", "given", "expected"),
    [({}, {}, None), ({}, {"OMP_NUM_THREADS": "2"}, "2"), ({"OMP_NUM_THREADS": "8"}, {"OMP_NUM_THREADS": "2"}, "8")],
)
def test_rays_guess_of_omp_num_threads_gives_way(
    environ: pytest.MonkeyPatch, at_start: dict[str, str], given: dict[str, str], expected: str | None
) -> None:
    environ.setattr(psutil.Process, "environ", lambda _: at_start)
    environ.setitem(os.environ, "OMP_NUM_THREADS", at_start.get("OMP_NUM_THREADS", "1"))
    apply_env(given, {})
    assert os.environ.get("OMP_NUM_THREADS") == expected


def test_pythonpath_is_applied_to_the_running_interpreter(environ: pytest.MonkeyPatch, tmp_path: Path) -> None:
    apply_env({"PYTHONPATH": os.pathsep.join([str(tmp_path), sys.path[-1]])}, {})
    assert sys.path.count(str(tmp_path)) == 1
    assert len(sys.path) == len(set(sys.path))


def test_an_explicit_pythonpath_comes_first(environ: pytest.MonkeyPatch, tmp_path: Path) -> None:
    last = sys.path[-1]
    apply_env({"PYTHONPATH": "/nowhere"}, {"PYTHONPATH": os.pathsep.join([str(tmp_path), "", last])})
    assert sys.path[:2] == [str(tmp_path), last]
    assert sys.path[-1] == "/nowhere"
    assert sys.path.count(last) == 1


def test_an_explicit_number_of_threads_is_no_guess_of_rays(environ: pytest.MonkeyPatch) -> None:
    environ.setitem(os.environ, "OMP_NUM_THREADS", "1")
    apply_env({"OMP_NUM_THREADS": "2"}, {"OMP_NUM_THREADS": "3"})
    assert os.environ["OMP_NUM_THREADS"] == "3"


def test_a_class_that_cannot_be_had_is_an_answer(environ: pytest.MonkeyPatch) -> None:
    answer = WorkerHost().start("no_such_module:Worker", {}, {})
    assert isinstance(answer, bytes)
    with pytest.raises(ConfigError, match="no_such_module"):
        decode_reply("__init__", answer)


def test_what_is_only_begun_is_collected_in_any_order_and_finished_in_its_own() -> None:
    finished: list[int] = []
    go = threading.Event()

    class Late:
        def later(self, number: int) -> Deferred:
            def finish() -> int:
                assert go.wait(LIMIT)
                finished.append(number)
                return number

            return Deferred(finish)

        def now(self) -> str:
            return "now"

    host = WorkerHost()
    host._worker = Late()
    for number in range(3):
        assert host.call(number, *encode_call("later", (number,), None)) == BEGUN
    assert decode_reply("now", host.call(3, *encode_call("now", (), None))) == "now"
    assert finished == []
    go.set()
    assert [decode_reply("later", host.collect(number)) for number in (2, 0, 1)] == [2, 0, 1]
    assert finished == [0, 1, 2]
    host._late.end()  # an actor's ends with its process
    host._late.join(LIMIT)


def test_a_call_before_start_is_an_error_and_no_crash() -> None:
    method, payload = encode_call("echo", (1,), None)
    with pytest.raises(Exception, match="has no attribute 'echo'"):
        decode_reply(method, WorkerHost().call(0, method, payload))
