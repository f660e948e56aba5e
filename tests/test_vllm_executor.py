"""What vLLM and its users ask of an executor, of ours: one engine, whose executor is here to be asked directly.

The engine's executor is a subclass that a user could write, given to ``LLM`` as a class. The tests run in the order in
which they stand: the last one kills a worker.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm_models import GREEDY, PROMPTS, TINY, folder, reference
from vllm_process import MARKS, Engine, VllmError, engine
from waiting import wait_until

pytestmark = [pytest.mark.smoke, *MARKS]

LAYOUT = TINY[0]
TOLD_WITHIN = 2.0
"""Seconds from a worker's death until everybody knows."""


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traces")


@pytest.fixture(scope="module")
def here(traces: Path) -> Iterator[Engine]:
    """An engine whose core runs in its own process, not in a child of it."""
    profiler = {"profiler": "torch", "torch_profiler_dir": str(traces)}
    with engine(VLLM_ENABLE_V1_MULTIPROCESSING="0") as one:
        yield one.start(
            folder(LAYOUT.model), "class:vllm_executors.Counting", profiler_config=profiler, **LAYOUT.arguments
        )


def same_as_ever(here: Engine) -> bool:
    return here.ask("generate", prompts=PROMPTS, **GREEDY) == reference(LAYOUT)["together"]


def test_a_users_subclass_is_used(here: Engine) -> None:
    assert here.ask("executor_class") == "vllm_executors.Counting"
    before = here.ask("executor_attribute", name="calls")
    assert same_as_ever(here)
    after = here.ask("executor_attribute", name="calls")[len(before) :]
    assert after.count("execute_model") >= GREEDY["max_tokens"]
    assert after.count("sample_tokens") >= GREEDY["max_tokens"]


def test_a_callable_gets_vllms_own_worker(here: Engine) -> None:
    told = here.workers()
    assert [each["rank"] for each in told] == [0, 1]
    assert [each["local_rank"] for each in told] == [0, 1]
    assert [each["driver"] for each in told] == [True, False]
    assert {each["class"] for each in told} == {"WorkerWrapperBase"}
    assert len({each["pid"] for each in told} | {here.process.pid}) == 3
    assert here.ask("rpc", method="call:add", args=[2, 3]) == [[0, 5], [1, 5]]


def test_a_method_by_name(here: Engine) -> None:
    tasks = here.ask("rpc", method="get_supported_tasks")
    assert len(tasks) == 2
    assert "generate" in tasks[0]


def test_a_timeout_is_a_timeout_error_and_later_replies_are_not_mixed_up(here: Engine) -> None:
    began = time.monotonic()
    with pytest.raises(VllmError, match=r"rank 0, 1 within 0.3 s") as caught:
        here.ask("rpc", method="call:doze", args=[1.5], timeout=0.3)
    assert time.monotonic() - began < 1.3
    assert "TimeoutError" in caught.value.kinds
    assert here.ask("rpc", method="call:add", args=[20, 3]) == [[0, 23], [1, 23]]


def test_one_ranks_exception_is_told_with_its_text_and_the_next_call_is_answered(here: Engine) -> None:
    with pytest.raises(VllmError, match=r"rank 1 failed .*ValueError: rank 1 will not"):
        here.ask("rpc", method="call:fail_on", args=[1])
    assert here.ask("rpc", method="call:add", args=[1, 1]) == [[0, 2], [1, 2]]
    with pytest.raises(VllmError, match=r"AttributeError: .* has no attribute 'no_such_method'"):
        here.ask("rpc", method="no_such_method")
    assert here.ask("rpc", method="call:add", args=[1, 2]) == [[0, 3], [1, 3]]
    assert here.ask("executor_attribute", name="is_failed") is False


def test_health(here: Engine) -> None:
    assert here.ask("executor_call", name="check_health") is None


def test_lora_reaches_vllms_own_refusal(here: Engine) -> None:
    with pytest.raises(VllmError, match="LoRA is not enabled"):
        here.ask("add_lora")
    assert same_as_ever(here)


def test_sleep_and_wake_up_reach_the_workers(here: Engine) -> None:
    before = len(here.ask("executor_attribute", name="calls"))
    here.ask("call_llm", name="sleep", level=1)
    assert here.ask("executor_attribute", name="is_sleeping") is True
    here.ask("call_llm", name="wake_up")
    assert here.ask("executor_attribute", name="is_sleeping") is False
    assert {"sleep", "wake_up"} <= set(here.ask("executor_attribute", name="calls")[before:])
    assert same_as_ever(here)


def test_profile(here: Engine, traces: Path) -> None:
    here.ask("call_llm", name="start_profile")
    here.ask("generate", prompts=PROMPTS[:1], max_tokens=2)
    here.ask("call_llm", name="stop_profile")
    assert len(list(traces.glob("*.pt.trace.json*"))) == 2, "one trace of each rank"


def test_save_sharded_state(here: Engine, tmp_path: Path) -> None:
    here.ask("executor_call", name="save_sharded_state", path=str(tmp_path))
    assert sorted(path.name.split("-part")[0] for path in tmp_path.iterdir()) == ["model-rank-0", "model-rank-1"]


def test_resets(here: Engine) -> None:
    assert here.ask("engine", name="reset_prefix_cache") is True
    here.ask("engine", name="reset_mm_cache")
    assert same_as_ever(here)


def test_a_killed_worker(here: Engine) -> None:
    """The callback fires, the step in flight and all later calls fail at once, and the end leaves nothing."""
    here.ask("watch_failure")
    victim = here.workers()[1]["pid"]
    told = here.ask(
        "die_while_generating", victim=victim, prompts=PROMPTS, temperature=0.0, max_tokens=400, ignore_eos=True
    )
    assert told["seconds"] < TOLD_WITHIN
    kinds, text = told["error"]
    assert "WorkerDied" in kinds
    assert "rank 1" in text
    assert "SIGKILL" in text
    # The futures fail first, and the callback is called right after, in another thread.
    (failed,) = wait_until(lambda: here.ask("failed_at"), "the failure callback is called")
    assert failed - told["killed"] < TOLD_WITHIN
    assert here.ask("executor_attribute", name="is_failed") is True
    for name, arguments in [("check_health", {}), ("collective_rpc", {"method": "check_health"})]:
        with pytest.raises(VllmError, match="rank 1"):
            here.ask("executor_call", name=name, **arguments)
    here.ask("watch_failure")
    assert len(here.ask("failed_at")) == 2, "who asks after the failure is called at once"
    here.ask("executor_call", name="shutdown")
    here.ask("executor_call", name="shutdown")
    assert here.stop() == 0
    here.household.nothing_left()
