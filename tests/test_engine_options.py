"""``Options``: what ``LLM`` lists is what there is. That bad ones are refused is in ``test_engine_llm.py``."""

from __future__ import annotations

import inspect

import msgspec
import pytest

from lightvllm import LLM
from lightvllm.engine.options import Options
from lightvllm.errors import ConfigError


def test_llm_lists_every_option_with_its_default() -> None:
    declared = {field.name: field.default for field in msgspec.structs.fields(Options)}
    parameters = inspect.signature(LLM).parameters
    listed = {name: p.default for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    assert listed == declared | {"progress": None, "on_step": None}
    assert {name: parameters[name].annotation for name in declared} == Options.__annotations__


def test_an_unknown_option_is_refused_with_what_the_caller_takes_besides() -> None:
    with pytest.raises(ConfigError, match=r"unknown option egnine_process; did you mean engine_process.*block_size"):
        Options.check({"egnine_process": True}, beside=("engine_process",))
