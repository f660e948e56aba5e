"""Unmodified vLLM says the same under our executors as under its own: tokens, log-probabilities and grammar.

Equal to the last bit: the same batches go to the same workers' code. Each layout is compared with vLLM's own executor
in that layout, for a sum in another order is another number.
"""

from __future__ import annotations

import pytest
from vllm_models import CITIES, SMOLLM2, TINY, Layout, answers, folder, reference
from vllm_process import KUBERNETES, MARKS, RAY, engine

pytestmark = MARKS

SMOKE = TINY[1]  # tensor-parallel and pipeline-parallel at once


def marked(layouts: list[Layout]) -> list[object]:
    return [pytest.param(each, id=str(each), marks=pytest.mark.smoke if each == SMOKE else ()) for each in layouts]


@pytest.mark.parametrize("layout", marked([*SMOLLM2, *TINY]))
def test_local_workers(layout: Layout) -> None:
    with engine() as ours:
        got = answers(ours.start(folder(layout.model), KUBERNETES, **layout.arguments))
        assert ours.stop() == 0
        ours.household.nothing_left()
    assert got == reference(layout)
    assert got["choice"][0]["text"] in CITIES


@pytest.mark.ray
@pytest.mark.parametrize("layout", [pytest.param(TINY[0], id=str(TINY[0]))])
def test_ray(layout: Layout) -> None:
    with engine() as ours:
        got = answers(ours.start(folder(layout.model), RAY, **layout.arguments))
        assert ours.stop() == 0
        ours.household.nothing_left()
    assert got == reference(layout)
