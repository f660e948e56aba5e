"""Asynchronous scheduling under our executors: the next step is sent before the last one's tokens are known.

vLLM forces it off on CPUs; a platform plugin of the tests puts it back (`vllm_async_platform`).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import vllm_async_platform
from vllm_models import SMOLLM2, TINY, Layout, answers, folder, reference
from vllm_process import KUBERNETES, MARKS, engine

pytestmark = MARKS


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """With which vLLM has the plugin, in all its processes."""
    return {"PYTHONPATH": os.pathsep.join([vllm_async_platform.install(tmp_path / "plugin"), os.environ["PYTHONPATH"]])}


@pytest.mark.parametrize(
    ("layout", "backend"),
    [
        pytest.param(TINY[0], KUBERNETES, marks=pytest.mark.smoke),
        (TINY[0], "mp"),
        (SMOLLM2[1], KUBERNETES),
    ],
    ids=str,
)
def test_the_same_answers_with_it_and_without(layout: Layout, backend: str, env: dict[str, str]) -> None:
    with engine(VLLM_ENABLE_V1_MULTIPROCESSING="0", **env) as one:
        one.start(folder(layout.model), backend, async_scheduling=True, **layout.arguments)
        assert one.ask("engine_attribute", path="vllm_config.scheduler_config.async_scheduling") is True
        assert one.ask("engine_attribute", path="engine_core.engine_core.batch_queue_size") >= 2
        assert one.ask("rpc", method="call:samples_later") == [True] * (layout.tp * layout.pp)
        told = answers(one, grammar=layout.pp == 1)
        assert told == {question: reference(layout)[question] for question in told}
        assert one.stop() == 0
