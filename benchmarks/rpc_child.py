"""The process of one contender of ``rpc.py``: it starts its workers, then runs a burst of calls whenever it is told to.

    python rpc_child.py '{"kind": "floor", "carrier": "unix", "world_size": 2, ...}'

On standard input one JSON object per line, the payload's bytes and the arguments of ``run_burst``; on standard output
one per line in answer: first that the contender is ready and which processes its workers are, then the times of each
burst, or an error that ends it. At the end of standard input it ends its workers and itself. What the contender prints
goes to standard error.

Runs in vLLM's environment, too, and so imports the standard library only; each kind of contender is a module
``rpc_<kind>`` with a context manager ``open_contender(spec)``.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NoReturn

Call = Callable[[], Any]
CALL_SECONDS = 60.0
"""Time-out of any one call."""

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Contender:
    """What a kind's ``open_contender`` gives.

    Attributes:
        prepare: makes, for a payload, the function that sends it to every worker, waits for all replies and
            returns them.
        workers: process ids of the workers; empty where they are threads of this process.
        about: the version of what is measured, where this process knows it best.
    """

    prepare: Callable[[bytes], Call]
    workers: list[int] = field(default_factory=list)
    about: str = ""


Opener = Callable[[dict[str, Any]], AbstractContextManager[Contender]]


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread of process ``parent`` that started it is gone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it has gone already
        os._exit(1)


def run_burst(call: Call, seconds: float, least: int, most: int) -> list[int]:
    """Call for ``seconds``, but at least ``least`` and at most ``most`` times; each call's time, ns."""
    clock = time.perf_counter_ns
    times: list[int] = []
    end = clock() + int(seconds * 1e9)
    while len(times) < least or (clock() < end and len(times) < most):
        begun = clock()
        call()
        times.append(clock() - begun)
    return times


def serve(spec: dict[str, Any], say: Callable[[dict[str, Any]], None]) -> None:
    opener: Opener = importlib.import_module(f"rpc_{spec['kind']}").open_contender
    expected = [None] * spec["world_size"]
    payload, call = None, None
    with opener(spec) as contender:
        gc.collect()
        gc.freeze()  # what has been imported is not gone through again: in torch's case that takes half a second
        say({"ready": True, "workers": contender.workers, "about": contender.about})
        for line in sys.stdin:
            burst = json.loads(line)
            size = burst.pop("payload")
            if call is None or payload is None or len(payload) != size:
                payload = os.urandom(size)
                call = contender.prepare(payload)
                if (replies := call()) != expected:
                    raise RuntimeError(f"the workers replied {replies!r}; expected {expected!r}")
            say({"times": run_burst(call, **burst)})


def _terminated(*_: object) -> NoReturn:
    raise SystemExit(128 + signal.SIGTERM)


def run_child(serve: Callable[[dict[str, Any], Callable[[dict[str, Any]], None]], None] = serve) -> None:
    """Run ``serve(spec, say)`` with the specification on the command line; its errors are told to the parent."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    signal.signal(signal.SIGTERM, _terminated)

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    try:
        spec = json.loads(sys.argv[1])
        if "parent" in spec:
            die_with_parent(spec["parent"])
        serve(spec, say)
    except BrokenPipeError:
        raise SystemExit(1) from None  # the parent has gone
    except Exception as error:  # noqa: BLE001  told to the parent
        traceback.print_exc()
        say({"error": f"{type(error).__name__}: {error}"})
        raise SystemExit(1) from None


if __name__ == "__main__":
    run_child()
