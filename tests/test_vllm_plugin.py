"""What vLLM loads of us in each of its processes, whether or not anybody uses us there. With a vLLM made up here."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from lightvllm.adapters.vllm import plugin


class EngineArgs:
    distributed_executor_backend: Any = None

    def _check_feature_supported(self, *more: Any) -> tuple[Any, ...]:
        return (self.distributed_executor_backend, *more)


def install(monkeypatch: pytest.MonkeyPatch, **contents: Any) -> None:
    made = ModuleType("vllm.engine.arg_utils")
    vars(made).update(contents)
    for name, module in {
        "vllm": ModuleType("vllm"),
        "vllm.engine": ModuleType("vllm.engine"),
        made.__name__: made,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)


def test_another_executor_and_another_check_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    own = type("EngineArgs", (EngineArgs,), dict(vars(EngineArgs)))
    install(monkeypatch, EngineArgs=own)
    plugin.register()
    patched = own._check_feature_supported
    plugin.register()
    assert own._check_feature_supported is patched is not EngineArgs._check_feature_supported
    args = own()
    for backend in (None, "mp", "somebody.elses.Executor", EngineArgs):
        args.distributed_executor_backend = backend
        assert args._check_feature_supported(1) == (backend, 1)


@pytest.mark.parametrize("contents", [{}, {"EngineArgs": object}])
def test_a_vllm_that_is_otherwise_made_goes_on(monkeypatch: pytest.MonkeyPatch, contents: dict[str, Any]) -> None:
    install(monkeypatch, **contents)
    plugin.register()
