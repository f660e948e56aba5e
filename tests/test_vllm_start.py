"""Starts of vLLM with our executor: those that must be refused, with one clear line, and several at once."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from k8s_servers import worker_command, write_token
from vllm_models import GREEDY, PROMPTS, TINY, folder, reference
from vllm_process import EAGER, KUBERNETES, MARKS, Engine, VllmError, engine
from vllm_remote import ENDED, remote_workers

pytestmark = MARKS

TWO = TINY[0].arguments


@pytest.fixture(scope="module")
def refusing() -> Iterator[Engine]:
    """A process of a driver, to which every attempt is the first: a refused start must leave nothing behind."""
    with engine(VLLM_ENABLE_V1_MULTIPROCESSING="0") as one:
        yield one


def refusal(refusing: Engine, backend: str = KUBERNETES, **arguments: Any) -> VllmError:
    """How vLLM's start fails, which says so on one line and leaves no process."""
    before = {each.pid for each in refusing.household.processes()} | {refusing.process.pid}
    with pytest.raises(VllmError) as caught:
        refusing.ask("start", model=str(folder("tiny")), backend=backend, **{**EAGER, **arguments})
    refusing.household.only(before)
    assert "\n" not in caught.value.message, caught.value.message
    return caught.value


def of_ours(**settings: Any) -> dict[str, Any]:
    return {"additional_config": {"lightvllm": settings}}


def unused_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.mark.smoke
def test_nobody_listens(refusing: Engine, tmp_path: Path) -> None:
    address, limit = f"127.0.0.1:{unused_port()}", 3.0
    began = time.monotonic()
    error = refusal(
        refusing,
        **of_ours(k8s_workers=[address], k8s_token_file=write_token(tmp_path), start_timeout=limit),
    )
    assert time.monotonic() - began < limit + 20  # vLLM's own preparations are in it
    assert "PlacementError" in error.kinds
    assert address in error.message


@pytest.mark.smoke
def test_a_wrong_token(refusing: Engine, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with worker_command("--listen", "127.0.0.1:0", "--token-file", write_token(tmp_path)) as worker:
        address = worker.address()
        error = refusal(
            refusing,
            **of_ours(k8s_workers=[address], k8s_token_file=write_token(tmp_path / "mine"), start_timeout=30),
        )
        assert "token" in error.message
        assert address in error.message
        assert worker.end() == ENDED


@pytest.mark.smoke
def test_another_version_of_vllm(refusing: Engine, tmp_path: Path) -> None:
    """The worker's environment says that its vLLM is older; nothing of vLLM has been started by then."""
    old = tmp_path / "old"
    (old / "vllm-0.31.0.dist-info").mkdir(parents=True)
    (old / "vllm-0.31.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.31.0\n")
    with remote_workers(tmp_path / "group", 1, PYTHONPATH=str(old)) as remote:
        error = refusal(refusing, **of_ours(**remote.settings, start_timeout=60))
        assert re.search(r"runs vllm 0\.31\.0, the driver 0\.32\.0", error.message), error.message
        assert "rank 0" in error.message


@pytest.mark.smoke
def test_one_rank_cannot_load_its_weights(refusing: Engine) -> None:
    error = refusal(refusing, worker_cls="vllm_executors.Unwilling", **TWO)
    assert "rank 1" in error.message
    assert "no weights for rank 1 today" in error.message


def test_a_worker_class_that_is_not_there(refusing: Engine) -> None:
    error = refusal(refusing, worker_cls="vllm_executors.Missing", **TWO)
    assert "Missing" in error.message


def test_a_misspelt_setting(refusing: Engine) -> None:
    error = refusal(refusing, **of_ours(k8s_worker=["127.0.0.1:1"]))
    assert "ConfigError" in error.kinds
    assert "k8s_workers" in error.message


def test_what_is_no_executor(refusing: Engine) -> None:
    with pytest.raises(VllmError, match="Executor"):
        refusing.ask("start", model=str(folder("tiny")), backend="class:vllm_executors.NoExecutor", **EAGER)


def test_after_all_refusals_it_starts(refusing: Engine) -> None:
    refusing.start(folder("tiny"), KUBERNETES, **TWO)
    assert refusing.ask("generate", prompts=PROMPTS, **GREEDY) == reference(TINY[0])["together"]
    assert refusing.stop() == 0
    refusing.household.nothing_left()


@pytest.mark.smoke
def test_two_engines_at_once_while_the_usual_ports_are_taken() -> None:
    """Both by the class, each with an engine core of its own, and with a rendezvous of its own."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with engine(MASTER_PORT=port, VLLM_PORT=port) as both:
            for _ in range(2):
                both.start(folder("tiny"), "class:lightvllm.adapters.vllm.KubernetesExecutor", **TWO)
            expected = reference(TINY[0])["together"]
            for llm in (0, 1, 0):
                assert both.ask("generate", llm=llm, prompts=PROMPTS, **GREEDY) == expected
            assert both.stop() == 0
            both.household.nothing_left()
