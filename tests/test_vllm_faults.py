"""What a user of vLLM sees of failures in workers, and of calls that are larger than most."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from vllm_models import TINY, folder
from vllm_process import KUBERNETES, MARKS, Engine, VllmError, engine
from vllm_server import options, server

pytestmark = MARKS


@pytest.fixture(scope="module")
def here() -> Iterator[Engine]:
    with engine(VLLM_ENABLE_V1_MULTIPROCESSING="0") as one:
        yield one.start(folder("tiny"), KUBERNETES, **TINY[0].arguments)


def test_a_call_of_more_than_a_servers_usual_limit(here: Engine) -> None:
    """A step that brings a long video is one, and would end the engine."""
    assert here.ask("rpc_of_bytes", mib=300) == [300, 300]


def test_an_exceptions_traceback_is_logged_where_it_happened(here: Engine) -> None:
    with pytest.raises(VllmError, match="rank 1 will not"):
        here.ask("rpc", method="call:fail_on", args=[1])
    log = here.household.log()
    assert "rank 1 failed in fail_on" in log
    assert 'raise ValueError(f"rank {rank} will not")' in log


def test_an_engine_whose_server_was_killed_ends() -> None:
    """vLLM's engine core does not look after the process that has started it."""
    with server(folder("tiny"), KUBERNETES, *options(TINY[0].arguments | {"max_model_len": 256})) as served:
        served.ready()
        os.kill(served.process.pid, signal.SIGKILL)
        served.process.wait()
        served.household.nothing_left()
        assert "the process that started this engine is gone" in served.household.log()
