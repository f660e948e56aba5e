"""What a request may be; the prompts and parameters that are refused are in test_engine_engine.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
from fake_engine import engine
from fake_executor import scrambled

from lightvllm.errors import ConfigError


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"priority": 1.0}, "priority=1.0; use an integer from -2147483647 to 2147483647, lower goes first"),
        ({"priority": True}, "priority=True; use an integer"),
        ({"priority": 2**31}, "priority=2147483648; use an integer"),
        ({"priority": None}, "priority=None; use an integer"),
        ({"timeout": 0}, "timeout=0; use a positive number of seconds, or None"),
        ({"timeout": -1.0}, "timeout=-1.0; use a positive number"),
        ({"timeout": math.inf}, "timeout=inf; use a positive number"),
        ({"timeout": math.nan}, "timeout=nan; use a positive number"),
        ({"timeout": "1"}, "timeout='1'; use a positive number"),
        ({"timeout": True}, "timeout=True; use a positive number"),
        ({"stream": "final"}, "stream='final'; use True, False or 'delta'"),
        ({"stream": 1}, "stream=1; use True, False or 'delta'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], text: str) -> None:
    e, _ = engine(scrambled(200))
    with pytest.raises(ConfigError, match=text):
        e.add_request("a", [5], **options)
    assert not e.has_unfinished_requests()
    assert e.step() == []


def test_the_ends_of_the_range_are_taken() -> None:
    e, _ = engine(scrambled(200))
    for name, priority in (("a", 2**31 - 1), ("b", -(2**31) + 1)):
        e.add_request(name, [5], priority=priority, timeout=1e9)
    assert [seq.request_id for seq in e.scheduler.waiting] == ["b", "a"]
