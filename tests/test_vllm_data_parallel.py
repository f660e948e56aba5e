"""Two data-parallel engines behind one server: each has a group of workers of its own."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("openai", reason="the test extra is not installed")

from vllm_models import PROMPTS, SMOLLM2, folder, reference
from vllm_process import END_LIMIT, KUBERNETES, MARKS
from vllm_server import Server, options, server
from waiting import wait_until

pytestmark = MARKS

LAYOUT = SMOLLM2[0]


@pytest.fixture
def served() -> Iterator[Server]:
    with server(folder(LAYOUT.model), KUBERNETES, *options(LAYOUT.arguments), "--data-parallel-size", "2") as one:
        one.ready()
        yield one


def test_each_engine_has_its_own_worker_and_says_the_same(served: Server) -> None:
    titles = [" ".join(process.cmdline()) for process in served.household.processes()]
    assert len([title for title in titles if "VLLM::Worker" in title]) == 2, titles
    expected = [each["text"] for each in reference(LAYOUT)["together"]]

    with ThreadPoolExecutor(len(PROMPTS)) as clients:
        assert [text for (text,) in clients.map(lambda prompt: served.complete([prompt]), PROMPTS)] == expected
    served.process.terminate()
    wait_until(lambda: served.process.poll() is not None, "the server ends", END_LIMIT)
    served.household.nothing_left()
