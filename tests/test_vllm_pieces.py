"""Parts of vLLM's executor that need vLLM, but no engine."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
from vllm_process import MARKS

from lightvllm.adapters.vllm.settings import AdapterSettings
from lightvllm.errors import ConfigError
from lightvllm.messages import decode_value, encode_value

pytestmark = [pytest.mark.smoke, *MARKS]


@pytest.fixture
def module() -> Any:
    from lightvllm.adapters.vllm import executor

    return executor


def on_gpus(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "current_platform", SimpleNamespace(is_cuda_alike=lambda: True))


@pytest.mark.parametrize(("local", "gpus", "cpus"), [(True, 0, 1), (False, 1, 0)])
def test_a_gpu_is_all_that_is_asked_for(
    module: Any, monkeypatch: pytest.MonkeyPatch, local: bool, gpus: int, cpus: int
) -> None:
    on_gpus(module, monkeypatch)
    of = SimpleNamespace(_is_local=local, parallel_config=SimpleNamespace(world_size=2))
    placement = module._BackendExecutor._placement(of, AdapterSettings())
    assert (placement.gpus_per_worker, placement.cpus_per_worker) == (gpus, cpus)


@pytest.mark.parametrize(("method", "sent"), [("apply_model", "run"), ("execute_model", "run_pickled")])
def test_only_steps_are_held_to_what_pickle_can_do(module: Any, method: str, sent: str) -> None:
    calls: list[Any] = []
    of = SimpleNamespace(executor=SimpleNamespace(begin_rpc=lambda *call: calls.append(call)))
    argument: Any = "a step" if method in module.STEPS else lambda model: model + 1
    module._BackendExecutor._send(of, method, None, (argument,), {}, None)
    ((name, arguments, *_, told_as),) = calls
    assert (name, told_as) == (sent, method)
    if sent == "run":
        assert decode_value(encode_value(arguments))[1][0](41) == 42


@pytest.mark.parametrize(("connector", "tp", "refused"), [("ECCPUConnector", 2, True), ("ECCPUConnector", 1, False)])
def test_a_connector_that_would_not_wait_for_all_ranks(module: Any, connector: str, tp: int, refused: bool) -> None:
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(numa_bind=False, tensor_parallel_size=tp, prefill_context_parallel_size=1),
        model_config=SimpleNamespace(multimodal_config=None),
        ec_transfer_config=SimpleNamespace(ec_connector=connector),
    )
    with pytest.raises(ConfigError, match="ECCPUConnector with 2 ranks") if refused else contextlib.nullcontext():
        module._check_supported(config)


def test_a_steps_tensors_are_not_left_to_plain_pickle(module: Any) -> None:
    import torch
    from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput

    new = NewRequestData("a", [1], [], None, None, ([0],), 0, None, prompt_embeds=torch.ones(1, 8))
    step = SchedulerOutput.make_empty()
    assert not module._brings_tensors(step)
    assert not module._brings_tensors(None)  # no grammar
    step.scheduled_new_reqs = [new]
    assert module._brings_tensors(step)
    new.prompt_embeds = None
    assert not module._brings_tensors(step)
    new.mm_features = [object()]
    assert module._brings_tensors(step)


@pytest.mark.parametrize(("backend", "warned"), [("mp", True), ("ray", False)])
def test_device_ids_do_not_pass_unheard(
    module: Any, monkeypatch: pytest.MonkeyPatch, backend: str, warned: bool
) -> None:
    on_gpus(module, monkeypatch)
    said: list[str] = []
    monkeypatch.setattr(module, "logger", SimpleNamespace(warning=lambda text, *values: said.append(text % values)))
    parallel = SimpleNamespace(
        assigned_physical_gpu_ids=[2, 3],
        data_parallel_backend=backend,
        data_parallel_size=2,
        data_parallel_rank_local=1,
    )
    config = module._config_for_other_hosts(SimpleNamespace(parallel_config=parallel))
    assert config.parallel_config.assigned_physical_gpu_ids is None
    assert config.parallel_config.data_parallel_rank_local == 0
    assert parallel.assigned_physical_gpu_ids == [2, 3]
    assert bool(said) is warned
    assert not said or "GPUs [2, 3] of this host" in said[0]
