"""What vLLM loads of us by itself: an entry point of the group ``vllm.general_plugins``.

vLLM refuses pipeline parallelism for a ``distributed_executor_backend`` that has no true attribute ``supports_pp``, and
asks that of the string that ``vllm serve`` has been given, before anything has looked up the class of that name. So the
names of our classes are replaced by the classes just before that check. Nothing else of vLLM is touched, and nothing
happens where another executor is named.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

_MARK = "_lightvllm_resolves_executors"


def register() -> None:
    """Called by vLLM in each of its processes, perhaps more than once."""
    try:
        from vllm.engine.arg_utils import EngineArgs
    except ImportError:  # another vLLM, which must not end because this package is installed beside it
        return

    check = getattr(EngineArgs, "_check_feature_supported", None)
    if check is not None and not hasattr(check, _MARK):  # a vLLM without that check needs no help
        EngineArgs._check_feature_supported = _resolving(check)


def _resolving(check: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(check)
    def check_feature_supported(engine_args: Any, *args: Any, **kwargs: Any) -> Any:
        backend = getattr(engine_args, "distributed_executor_backend", None)
        if (resolved := resolve(backend)) is not backend:
            engine_args.distributed_executor_backend = resolved
        return check(engine_args, *args, **kwargs)

    setattr(check_feature_supported, _MARK, True)
    return check_feature_supported


def resolve(backend: Any) -> Any:
    """The class for a name in ``lightvllm.adapters.vllm``; anything else as it is."""
    package = __package__ or ""
    module, _, name = backend.rpartition(".") if isinstance(backend, str) else ("", "", "")
    if module not in (package, f"{package}.executor"):
        return backend
    return getattr(importlib.import_module(module), name, backend)
