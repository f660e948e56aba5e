"""What a user of vLLM sees of failures in workers, and of calls that are larger than most."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from vllm_models import TINY, folder
from vllm_process import KUBERNETES, MARKS, Engine, VllmError, engine

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
