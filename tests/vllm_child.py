"""vLLM's ``LLM`` in this process, asked by lines of JSON on stdin: what `vllm_process.Engine` starts.

A line is ``{"do": name, "with": arguments}``; each is answered by one line, ``{"result": …}`` or
``{"error": [types, text]}``. What may be asked is the functions marked ``@action``. vLLM's own output goes to stderr.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

ACTIONS: dict[str, Callable[..., Any]] = {}
llms: list[Any] = []  # those started; the first is asked
failures: list[float] = []  # when the executor's failure callback was called, `time.monotonic`


def action(function: Callable[..., Any]) -> Callable[..., Any]:
    ACTIONS[function.__name__] = function
    return function


def executor() -> Any:
    """vLLM's executor, where the engine core runs in this process."""
    return llms[0].llm_engine.engine_core.engine_core.model_executor


@action
def start(*, backend: str | None, **arguments: Any) -> float:
    """Make one more LLM; the seconds it took. ``backend``: a name, or ``class:MODULE.NAME`` for the class itself."""
    from vllm import LLM
    from vllm.utils.import_utils import resolve_obj_by_qualname

    began = time.monotonic()
    if backend is not None and backend.startswith("class:"):
        arguments["distributed_executor_backend"] = resolve_obj_by_qualname(backend.removeprefix("class:"))
    else:
        arguments["distributed_executor_backend"] = backend
    llms.append(LLM(**arguments))
    return time.monotonic() - began


@action
def generate(prompts: list[str], llm: int = 0, choice: list[str] | None = None, **params: Any) -> list[dict[str, Any]]:
    """``choice``: the texts of which each answer is to be one."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    if choice is not None:
        params["structured_outputs"] = StructuredOutputsParams(choice=choice)
    return [_told(each) for each in llms[llm].generate(prompts, SamplingParams(**params), use_tqdm=False)]


@action
def chat(messages: list[dict[str, str]], **params: Any) -> dict[str, Any]:
    from vllm import SamplingParams

    (output,) = llms[0].chat(messages, SamplingParams(**params), use_tqdm=False)
    return _told(output)


def _told(output: Any) -> dict[str, Any]:
    (completion,) = output.outputs
    logprobs = [{str(token): each.logprob for token, each in step.items()} for step in completion.logprobs or ()]
    return {"tokens": list(completion.token_ids), "text": completion.text, "logprobs": logprobs}


@action
def rpc(method: str, args: list[Any] = [], timeout: float | None = None) -> Any:  # noqa: B006
    """``LLM.collective_rpc``. ``method``: of the worker, or ``call:NAME`` for a callable of the module vllm_calls."""
    if method.startswith("call:"):
        import vllm_calls

        return llms[0].collective_rpc(getattr(vllm_calls, method.removeprefix("call:")), timeout, tuple(args))
    return llms[0].collective_rpc(method, timeout, tuple(args))


@action
def rpc_of_bytes(mib: int) -> list[int]:
    """Send so much to each worker, and back; what came, MiB."""
    import vllm_calls

    return [len(each) >> 20 for each in llms[0].collective_rpc(vllm_calls.copied, args=(bytes(mib << 20),))]


@action
def call_llm(name: str, **arguments: Any) -> Any:
    """A method of LLM's that answers with nothing of use: the text of what it gives."""
    return repr(getattr(llms[0], name)(**arguments))


@action
def engine(name: str, **arguments: Any) -> Any:
    """A method of ``LLM.llm_engine``."""
    return getattr(llms[0].llm_engine, name)(**arguments)


@action
def engine_attribute(path: str) -> Any:
    """What ``LLM.llm_engine`` has, some dots away."""
    return functools.reduce(getattr, path.split("."), llms[0].llm_engine)


@action
def add_lora() -> Any:
    from vllm.lora.request import LoRARequest

    return llms[0].llm_engine.add_lora(LoRARequest("adapter", 1, "/nonexistent/adapter"))


@action
def executor_class() -> str:
    kind = type(executor())
    return f"{kind.__module__}.{kind.__qualname__}"


@action
def executor_call(name: str, **arguments: Any) -> Any:
    """A method of the executor's, which runs in this process."""
    return getattr(executor(), name)(**arguments)


@action
def executor_attribute(name: str) -> Any:
    return getattr(executor(), name)


@action
def watch_failure() -> None:
    executor().register_failure_callback(lambda: failures.append(time.monotonic()))


@action
def failed_at() -> list[float]:
    return failures


@action
def die_while_generating(victim: int, prompts: list[str], **params: Any) -> dict[str, Any]:
    """Kill process ``victim`` once tokens come, and go on: what is raised, and how many seconds later."""
    import signal

    from vllm import SamplingParams

    llm_engine = llms[0].llm_engine
    for i, prompt in enumerate(prompts):
        llm_engine.add_request(f"doomed-{i}", prompt, SamplingParams(**params))
    for _ in range(3):
        llm_engine.step()
    os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()
    try:
        while llm_engine.has_unfinished_requests():
            llm_engine.step()
    except Exception as error:  # noqa: BLE001  what it is, is the answer
        return {"seconds": time.monotonic() - killed, "error": _named(error), "killed": killed}
    return {"seconds": time.monotonic() - killed, "error": None, "killed": killed}


@action
def stop() -> list[str]:
    """End all engines as a user's program ends; the threads that are left."""
    for each in llms:
        each.llm_engine.engine_core.shutdown()
    llms.clear()
    return sorted(thread.name for thread in threading.enumerate() if not thread.daemon)


def _named(error: BaseException) -> tuple[list[str], str]:
    """By the names of its type and of all that this is a kind of."""
    return [each.__name__ for each in type(error).__mro__], str(error)


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = {"result": ACTIONS[asked["do"]](**asked["with"])}
        except Exception as error:  # noqa: BLE001  told to the test
            answer = {"error": _named(error)}
        print(json.dumps(answer), file=replies, flush=True)


if __name__ == "__main__":
    main()
