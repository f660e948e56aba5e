"""vLLM's options, from a command line or from Ray Serve's ``engine_kwargs``, as fields and arguments of a spec."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lightvllm.errors import ConfigError
from lightvllm.operator.convert.tracked import Kind

Report = Callable[[Kind, str], None]

SHORT = {"-tp": "--tensor-parallel-size", "-pp": "--pipeline-parallel-size", "-dp": "--data-parallel-size"}
PARALLEL = {"--tensor-parallel-size": "tensorParallelSize", "--pipeline-parallel-size": "pipelineParallelSize"}
_SIZES = {"--max-model-len": "maxModelLen", "--max-num-seqs": "maxNumSeqs", "--block-size": "blockSize"}
_REPLACED = {
    "--distributed-executor-backend": "lightvllm's executor takes its place",
    "--host": "the API listens on all addresses of the leader's pod",
    "--worker-use-ray": "there is no Ray",
    "--engine-use-ray": "there is no Ray",
    "--ray-workers-use-nsight": "there is no Ray",
}
_LOST = {
    "--api-key": "a key does not belong into a manifest: put it into a Secret and name that with --api-key-secret",
    "--ssl-keyfile": "put certificate and key into a Secret and name that in spec.tls",
    "--ssl-certfile": "put certificate and key into a Secret and name that in spec.tls",
    "--nnodes": "the plan knows its own pods",
    "--node-rank": "the plan knows its own pods",
    "--master-addr": "the plan knows its own pods",
    "--master-port": "the plan knows its own pods",
    "--headless": "the plan has one server per replica",
    "--shutdown-timeout": "say it in spec.drain.timeoutSeconds",
}
VALUED = frozenset({*PARALLEL, *_SIZES, "--data-parallel-size", "--port", "--model", "--served-model-name"}) | (
    frozenset({*_REPLACED, *_LOST}) - {"--headless", "--worker-use-ray", "--engine-use-ray", "--ray-workers-use-nsight"}
)
"""Options that are known to take a value."""
KNOWN_FLAGS = frozenset({*_REPLACED, *_LOST}) - VALUED
MODEL_VALUED = frozenset(
    {"--dtype", "--gpu-memory-utilization", "--quantization", "--tokenizer", "--seed", "--revision"}
)
"""Of those that are passed on, some that take a value, so that a model may follow them."""


@dataclass(frozen=True)
class Variable:
    """A variable's value, and whom to tell what becomes of it."""

    value: str
    report: Report


@dataclass
class Wanted:
    """What one vLLM server was asked to be.

    Attributes:
        model: what is loaded; None until it is found.
        served: what requests call it.
        fields: of the spec, by their names.
        args: for ``engine.args``.
        env: variables that win over those of the pods.
        name: added to the object's name where one document becomes several; None for none.
    """

    model: str | None = None
    served: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    args: list[str] = field(default_factory=list)
    env: dict[str, Variable] = field(default_factory=dict)
    name: str | None = None

    @property
    def tensor(self) -> int:
        return int(self.fields.get("tensorParallelSize", 1))

    @property
    def pipeline(self) -> int:
        return int(self.fields.get("pipelineParallelSize", 1))


def apply(wanted: Wanted, flag: str, values: list[str], report: Report, where: str) -> None:
    """Put the option ``flag`` with ``values`` into ``wanted``, or say what becomes of it.

    Raises:
        ConfigError: a size is no number; ``where`` is how it calls the place.
    """
    value = values[0] if values else ""
    if flag in PARALLEL:
        if not value.isdecimal() or int(value) < 1:
            raise ConfigError(f"{where}: {flag.strip('-')} is {value!r}, expected a whole number from 1")
        wanted.fields[PARALLEL[flag]] = int(value)
    elif flag in _SIZES and value.isdecimal() and int(value) > 0:
        wanted.fields[_SIZES[flag]] = int(value)
    elif flag == "--model":
        wanted.model = value
    elif flag == "--served-model-name":
        wanted.served = value
        if len(values) > 1:
            report("lost", f"{flag}: the first of {len(values)} names is kept; a model has one")
    elif flag in _REPLACED:
        report("replaced", f"{flag}: {_REPLACED[flag]}")
    elif flag in _LOST:
        report("lost", f"{flag}: {_LOST[flag]}")
    elif flag == "--port":
        if value != "8000":
            report("lost", f"{flag}: the API is at port 8000")
    elif flag == "--device" and value == "auto":
        report("replaced", f"{flag}: vLLM finds the device by itself")
    elif flag.startswith("--data-parallel"):
        if flag != "--data-parallel-size" or value != "1":
            report("lost", f"{flag}: use spec.replicas for more servers of one model")
    elif flag.startswith("--") and len(values) == 1:
        wanted.args.append(f"{flag}={value}")
    else:
        wanted.args += [flag, *values]


def apply_keyword(wanted: Wanted, name: str, value: Any, report: Report, where: str) -> None:
    """The same for a keyword argument of vLLM's ``EngineArgs``, ``tensor_parallel_size: 2``."""
    flag = "--" + name.replace("_", "-")
    if value is None:
        return
    if isinstance(value, bool):
        if flag in KNOWN_FLAGS or value:
            apply(wanted, flag, [], report, where)
        else:
            apply(wanted, f"--no-{flag[2:]}", [], report, where)
    elif isinstance(value, dict):
        apply(wanted, flag, [json.dumps(value, ensure_ascii=False)], report, where)
    elif isinstance(value, list):
        apply(wanted, flag, [each if isinstance(each, str) else json.dumps(each) for each in value], report, where)
    else:
        apply(wanted, flag, [str(value)], report, where)
