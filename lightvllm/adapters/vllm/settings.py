"""What a user of vLLM tells our executors: where the workers are, how long to wait, which variables they get.

A field comes from ``additional_config["lightvllm"]`` (vLLM's ``--additional-config '{"lightvllm": {…}}'``), else from
the variable ``LIGHTVLLM_<FIELD IN CAPITALS>``, else it has its default. Imports no vllm; the command line may use it.
"""

from __future__ import annotations

import difflib
import json
import logging
import math
import re
from collections.abc import Mapping
from typing import Any, Literal, get_type_hints

import msgspec

from lightvllm.backends.base import Strategy
from lightvllm.config import RUNNING_WORKERS, ExecutorConfig, KubernetesTransport
from lightvllm.errors import ConfigError

Executor = Literal["k8s", "ray"]
CLASSES = {"k8s": "KubernetesExecutor", "ray": "RayExecutor"}
"""What a user of vLLM calls each executor, in ``lightvllm.adapters.vllm``."""

KEY = "lightvllm"
"""Where our settings lie in vLLM's ``additional_config``."""

PREFIX = "LIGHTVLLM_"
OTHER_VARIABLES = ("LIGHTVLLM_API_KEY", "LIGHTVLLM_CACHE", "LIGHTVLLM_DEBUG", "LIGHTVLLM_HOST_IP", "LIGHTVLLM_LOG")
"""Variables of ours that are no fields: nobody has mistyped those."""

_LIKE = 0.75  # difflib's ratio from which a name passes for a mistyped one: WORKERS for K8S_WORKERS
# What Kubernetes puts into every pod for a Service that is called lightvllm-….
_SERVICE_LINK = re.compile(r"_SERVICE_HOST$|_SERVICE_PORT(_\w+)?$|_PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?$")
_VARIABLE = r"[A-Za-z_][A-Za-z0-9_]*"

logger = logging.getLogger(__name__)


class AdapterSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Our executors' settings. Times are seconds. Raises ConfigError for a value that makes no sense.

    Attributes:
        k8s_workers: addresses of ``lightvllm worker`` servers, ``"host:port"``, in the order of ranks. Neither these
            nor ``k8s_service``: worker processes are started on this machine.
        k8s_service: the headless Service of a StatefulSet whose pods run ``lightvllm worker``, found by DNS:
            ``NAME[.NAMESPACE[.svc[.DOMAIN]]][:PORT]``. Ranks go by a pod's index.
        k8s_pod_prefix: the StatefulSet's name; None takes the Service's without ``-headless``.
        k8s_gpus_per_pod: workers behind each of those addresses, or in each pod, at as many consecutive ports.
        k8s_token_file: file with the token that those servers were started with.
        k8s_tls_cert, k8s_tls_key, k8s_tls_ca: PEM files for mutual TLS with them: the driver's certificate, its key,
            and the CA that signed the servers'. Needed for addresses that are not loopback.
        k8s_transport: what carries calls: ``"grpc"``, ``"direct"``, or ``"auto"``: direct where it can be opened.
        ray_address: a running Ray cluster (``"auto"`` or ``"host:port"``); None starts a small local one.
        strategy: placement of the workers over nodes (Ray's names).
        start_timeout: until every worker must answer.
        rpc_timeout: for a control call that has no time-out of its own: loading, profiling, compiling.
        shutdown_timeout: that workers get to end by themselves.
        env: variables for the workers, whatever their own environment says.
        env_include: further variables of the driver that reach the workers: names, or beginnings as ``"PREFIX*"``.
        env_exclude: those that do not, in the same form; stronger than ``env_include``.
        show_worker_output: show what workers print on the driver's output.
    """

    k8s_workers: tuple[str, ...] = ()
    k8s_service: str | None = None
    k8s_pod_prefix: str | None = None
    k8s_gpus_per_pod: int = 1
    k8s_token_file: str | None = None
    k8s_tls_cert: str | None = None
    k8s_tls_key: str | None = None
    k8s_tls_ca: str | None = None
    k8s_transport: KubernetesTransport = "auto"
    ray_address: str | None = None
    strategy: Strategy = "PACK"
    start_timeout: float = 120.0
    rpc_timeout: float = 3600.0
    shutdown_timeout: float = 5.0
    env: dict[str, str] = {}
    env_include: tuple[str, ...] = ()
    env_exclude: tuple[str, ...] = ()
    show_worker_output: bool = True

    def __post_init__(self) -> None:
        ExecutorConfig(
            name="k8s",
            k8s_transport=self.k8s_transport,
            start_timeout=self.start_timeout,
            rpc_timeout=self.rpc_timeout,
        )
        if not (math.isfinite(self.shutdown_timeout) and self.shutdown_timeout > 0):
            raise ConfigError(f"shutdown_timeout={self.shutdown_timeout}; use a positive number of seconds")
        if self.k8s_gpus_per_pod < 1:
            raise ConfigError(f"k8s_gpus_per_pod={self.k8s_gpus_per_pod}; use 1 or more")
        for name in ("k8s_service", "k8s_pod_prefix", *_FOR_WORKERS[1:], "ray_address"):
            if getattr(self, name) == "":
                raise ConfigError(f"{name} is empty; leave it out, or use {_EXPECTED[name]}")
        if "" in self.k8s_workers:
            raise ConfigError(f"k8s_workers={list(self.k8s_workers)} holds an empty address; use 'host:port'")
        for name in self.env:
            if not re.fullmatch(_VARIABLE, name):
                raise ConfigError(f"env names {name!r}; a variable's name has letters, digits and underscores")
        for field in ("env_include", "env_exclude"):
            for pattern in getattr(self, field):
                if pattern != "*" and not re.fullmatch(_VARIABLE + r"\*?", pattern):
                    raise ConfigError(f"{field} holds {pattern!r}; use a variable's name, or PREFIX*")

    def __repr__(self) -> str:
        """Without the values of ``env``, which may be secrets."""
        shown = {name: getattr(self, name) for name in self.__struct_fields__}
        hidden = ", ".join(f"{name!r}: …" for name in self.env)
        fields = (f"{name}={'{' + hidden + '}' if name == 'env' else repr(value)}" for name, value in shown.items())
        return f"{type(self).__name__}({', '.join(fields)})"


_FOR_WORKERS = ("k8s_gpus_per_pod", "k8s_token_file", "k8s_tls_cert", "k8s_tls_key", "k8s_tls_ca")
_SECONDS = "a positive number of seconds"
_PATTERNS = "variables' names or PREFIX*"
_FILE = "a file's path"
_EXPECTED = {
    "k8s_workers": "addresses 'host:port'",
    "k8s_service": "a Service's name",
    "k8s_pod_prefix": "a StatefulSet's name",
    "k8s_gpus_per_pod": "a whole number from 1",
    "k8s_token_file": _FILE,
    "k8s_tls_cert": _FILE,
    "k8s_tls_key": _FILE,
    "k8s_tls_ca": _FILE,
    "k8s_transport": "auto, grpc or direct",
    "ray_address": "'auto' or 'host:port'",
    "strategy": "PACK, SPREAD, STRICT_PACK or STRICT_SPREAD",
    "start_timeout": _SECONDS,
    "rpc_timeout": _SECONDS,
    "shutdown_timeout": _SECONDS,
    "env": "variables and their values",
    "env_include": _PATTERNS,
    "env_exclude": _PATTERNS,
    "show_worker_output": "true or false",
}
_IN_CONFIG = {"env": "as an object of strings"}  # how it is written there, where its type alone does not say so
_IN_VARIABLE = {"env": """as '{"A": "1"}' or 'A=1,B=2'"""}
_HINTS = get_type_hints(AdapterSettings)
_SWITCH = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def variable_of(field: str) -> str:
    """The environment variable that sets a field of ``AdapterSettings``."""
    return PREFIX + field.upper()


def load_settings(
    additional_config: object, environ: Mapping[str, str], executor: Executor | None = None
) -> AdapterSettings:
    """The settings that vLLM's configuration and the environment hold.

    A variable that is set to nothing counts as not set. A variable that looks like a field's mistyped name is warned of
    by ``logging``.

    Args:
        additional_config: vLLM's own; an object that is no mapping belongs to somebody else and is not looked at.
        environ: the environment, ``os.environ``.
        executor: whose settings they are; those of the other one are refused. None takes them all, to show them.

    Raises:
        ConfigError: an unknown key, a wrong type or value, the other executor's setting, one that needs
            ``k8s_workers`` or ``k8s_service`` without them, or both of these; names where it stands.
    """
    variables = {
        field: (variable, environ[variable])
        for field in AdapterSettings.__struct_fields__
        if environ.get(variable := variable_of(field), "").strip()
    }
    given, values = variables | _of_config(additional_config), {}
    for field, (source, value) in given.items():
        owner = field.partition("_")[0]
        if executor and owner in CLASSES and owner != executor:
            raise ConfigError(
                f"{source} is given, which is for {CLASSES[owner]}, but vLLM uses {CLASSES[executor]}; leave it out, "
                f"or use --distributed-executor-backend lightvllm.adapters.vllm.{CLASSES[owner]}"
            )
        values[field] = _read(field, source, value)
    _warn_of_near_misses(environ)
    settings = AdapterSettings(**values)
    if settings.k8s_workers and settings.k8s_service is not None:
        raise ConfigError(f"{given['k8s_workers'][0]} and {given['k8s_service'][0]} are both given; keep one")
    if settings.k8s_pod_prefix is not None and settings.k8s_service is None:
        raise ConfigError(f"{given['k8s_pod_prefix'][0]} is for k8s_service, which is not given; leave it out")
    for field in _FOR_WORKERS:
        running = settings.k8s_workers or settings.k8s_service is not None
        if not running and getattr(settings, field) != getattr(AdapterSettings(), field):
            raise ConfigError(
                f"{given[field][0]} is for {RUNNING_WORKERS}; name the workers in {variable_of('k8s_workers')} or "
                f"{variable_of('k8s_service')}, or leave it out"
            )
    return settings


def _of_config(additional_config: object) -> dict[str, tuple[str, Any]]:
    """For each field that is there, where it stands and its value."""
    ours = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
    if ours is None:
        return {}
    place = f"additional_config[{KEY!r}]"
    if not isinstance(ours, Mapping):
        raise ConfigError(f"{place} is of type {type(ours).__name__}; expected an object with our settings")
    fields = AdapterSettings.__struct_fields__
    if unknown := [key for key in ours if key not in fields]:
        close = difflib.get_close_matches(str(unknown[0]), fields, n=1)
        raise ConfigError(
            f"{place} holds {unknown[0]!r}, which is unknown; use "
            + (close[0] if close else f"one of {', '.join(fields)}")
        )
    return {field: (f"{place}[{field!r}]", value) for field, value in ours.items()}


def _read(field: str, source: str, value: Any) -> Any:
    """The value in the field's own type. Raises ConfigError; one that may hold a secret is not shown."""
    written = source.startswith(PREFIX)
    try:
        converted = msgspec.convert(_parse(field, value) if written else value, _HINTS[field], strict=not written)
        AdapterSettings(**{field: converted})
    except (ValueError, ConfigError):  # msgspec's ValidationError is a ValueError
        how = (_IN_VARIABLE if written else _IN_CONFIG).get(field, "")
        shown = source if field == "env" else f"{source}={value!r}"
        raise ConfigError(f"{shown}: expected {_EXPECTED[field]} {how}".rstrip()) from None
    return converted


def _parse(field: str, text: str) -> Any:
    """A variable's text in the shape of the field's type. Raises ValueError."""
    text = text.strip()
    if field == "env":
        if text.startswith("{"):
            return msgspec.convert(json.loads(text), dict[str, str])  # strict: no number for a string
        pairs = [part.partition("=") for part in text.split(",") if part.strip()]
        if not all(equals for _, equals, _ in pairs):
            raise ValueError(field)
        return {name.strip(): value for name, _, value in pairs}
    if _HINTS[field] == tuple[str, ...]:
        return [part.strip() for part in text.split(",") if part.strip()]
    if _HINTS[field] is bool:
        return _SWITCH.get(text.lower(), text)
    return text


def _warn_of_near_misses(environ: Mapping[str, str]) -> None:
    fields = {field.upper(): variable_of(field) for field in AdapterSettings.__struct_fields__}
    for name in environ:
        if not name.startswith(PREFIX) or name in OTHER_VARIABLES or name in fields.values():
            continue
        close = difflib.get_close_matches(name.removeprefix(PREFIX), fields, n=1, cutoff=_LIKE)
        if close and not _SERVICE_LINK.search(name):
            logger.warning("the variable %s sets nothing; did you mean %s?", name, fields[close[0]])


def workers_of_engine(
    workers: tuple[str, ...],
    world_size: int,
    dp_rank: int,
    dp_rank_local: int | None,
    dp_size: int,
    dp_size_local: int,
    gpus_per_pod: int = 1,
) -> tuple[str, ...]:
    """Those of ``workers`` that one of vLLM's data-parallel engines is to use: each needs a group of its own.

    One list serves all engines, if it has workers for all of them; one list for each host, if it has workers for those
    of the host. vLLM hides the sizes from the engines of dense models (``dp_size`` is 1 there, whatever ``dp_rank``);
    such an engine takes the list to be for all engines as long as its rank fits in, else for those of its host.

    Args:
        workers: ``k8s_workers``; empty where worker processes are started here.
        world_size: workers of one engine.
        dp_rank: the engine's number, ``ParallelConfig.data_parallel_index``.
        dp_rank_local: its number on its host, None where vLLM has set none.
        dp_size, dp_size_local: engines in all, and on this host.
        gpus_per_pod: workers behind each address.

    Raises:
        ConfigError: the list's length fits no number of engines, or an address would belong to two engines.
    """
    if not workers:
        return ()
    count = len(workers) * gpus_per_pod
    dense = dp_size == 1
    local_index = dp_rank if dp_rank_local is None else dp_rank_local
    if dense and not dp_rank and not local_index:
        index, fits = 0, count >= world_size
    elif dense:
        engines = count // world_size
        index = dp_rank if dp_rank < engines else local_index
        fits = count % world_size == 0 and index < engines
    elif count == dp_size * world_size:
        index, fits = dp_rank, True
    else:
        index, fits = local_index, count == dp_size_local * world_size
    if not fits:
        raise ConfigError(_wrong_count(len(workers), world_size, dp_rank, dp_size, dp_size_local, gpus_per_pod))
    if world_size % gpus_per_pod and (index or dp_size > 1):
        raise ConfigError(
            f"k8s_gpus_per_pod={gpus_per_pod} does not divide the {world_size} workers of one data-parallel engine, so "
            "that two engines would share an address; start fewer workers for each address"
        )
    addresses = -(-world_size // gpus_per_pod)
    return workers[index * addresses : (index + 1) * addresses]


def first_pod_of_engine(world_size: int, dp_rank: int, gpus_per_pod: int) -> int:
    """With ``k8s_service``: the index of the first pod of a data-parallel engine; its pods follow those of the engine
    before. A ``world_size`` that does not fill its pods is refused by the backend."""
    return dp_rank * world_size // gpus_per_pod


def _wrong_count(
    addresses: int, world_size: int, dp_rank: int, dp_size: int, dp_size_local: int, gpus_per_pod: int
) -> str:
    have = f"k8s_workers names {addresses} address{'es' * (addresses != 1)}"
    if gpus_per_pod > 1:
        have += f" with {gpus_per_pod} workers each"
    if dp_size == 1 and not dp_rank:
        return f"{have}, this layout needs {world_size} workers; start more with: lightvllm worker"
    if dp_size == 1:
        return (
            f"{have}, but data-parallel engine {dp_rank} needs {world_size} of its own; name {world_size} for every "
            "engine, of all hosts or of this one"
        )
    wanted = f"{dp_size * world_size} workers for all {dp_size} data-parallel engines"
    if dp_size_local not in (0, dp_size):
        wanted += f", or {dp_size_local * world_size} for the {dp_size_local} on this host"
    return f"{have}; with {world_size} for each engine, name {wanted}"
