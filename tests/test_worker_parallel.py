"""Every layout of real worker processes says what one process says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny_llama
from worker_group import Driver, LocalWorker, ProcessWorkers

from lightvllm.config import CacheConfig, DeviceConfig, EngineConfig, ModelConfig, ParallelConfig
from lightvllm.errors import ConfigError, WorkerError
from lightvllm.messages import NewSequence, ScheduledSequence, StepInput
from lightvllm.sampling_params import SamplingParams

PROMPTS = [[5, 60, 7, 300, 9], [11], list(range(40, 63)), [330, 0, 329, 328]]


def config(model: Path, tp: int, pp: int, **model_fields: str) -> EngineConfig:
    return EngineConfig(
        model=ModelConfig.from_dir(model, **model_fields),  # type: ignore[arg-type]
        parallel=ParallelConfig(tensor_parallel_size=tp, pipeline_parallel_size=pp, collective_timeout=60),
        cache=CacheConfig(block_size=4),
        device=DeviceConfig(device="cpu", threads=1, kernels="reference"),
        return_logits=True,
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "plain": tiny_llama.build(folder / "plain"),
        "tied_biased": tiny_llama.build(
            folder / "tied_biased", seed=1, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
        ),
    }


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessWorkers]:
    with ProcessWorkers(4) as workers:
        yield workers


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "tied_biased"])
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (4, 1), (1, 2), (1, 3), (2, 2)])
def test_a_layout_gives_the_tokens_of_one_process(
    models: dict[str, Path], processes: ProcessWorkers, kind: str, tp: int, pp: int
) -> None:
    expected = Driver(LocalWorker(), config(models[kind], 1, 1))
    group = Driver(processes, config(models[kind], tp, pp))
    assert group.generate(PROMPTS, 12, chunk=6) == expected.generate(PROMPTS, 12, chunk=6)
    first = {
        "new": [NewSequence(7, PROMPTS[2], len(PROMPTS[2]), 0, SamplingParams(), [])],
        "scheduled": [ScheduledSequence(7, 0, len(PROMPTS[2]), [], list(range(6)))],
    }
    ours, theirs = (driver.step(**first).logits for driver in (group, expected))
    assert ours is not None
    assert theirs is not None
    np.testing.assert_allclose(ours.numpy(), theirs.numpy(), atol=1e-4)
    assert [info.rank for info in group.infos] == list(group.ranks)


@pytest.mark.slow
def test_generated_weights_are_the_same_model_in_every_layout(
    models: dict[str, Path], processes: ProcessWorkers
) -> None:
    """The dummy format hashes names and places, so a shard of it is a shard of the whole."""
    one = Driver(LocalWorker(), config(models["plain"], 1, 1, load_format="dummy"))
    four = Driver(processes, config(models["plain"], 2, 2, load_format="dummy"))
    step = {
        "new": [NewSequence(1, PROMPTS[2], len(PROMPTS[2]), 0, SamplingParams(), [])],
        "scheduled": [ScheduledSequence(1, 0, len(PROMPTS[2]), [], list(range(6)))],
    }
    ours, theirs = (driver.step(**step).logits for driver in (four, one))
    assert ours is not None
    assert theirs is not None
    np.testing.assert_allclose(ours.numpy(), theirs.numpy(), atol=1e-5)
    assert theirs.numpy().std() > 1e-3


@pytest.mark.slow
def test_an_error_of_one_rank_surfaces_and_the_group_can_be_formed_again(
    models: dict[str, Path], processes: ProcessWorkers
) -> None:
    group = Driver(processes, config(models["plain"], 2, 1))
    with pytest.raises(WorkerError, match="which this worker does not know"):
        group.step(scheduled=[ScheduledSequence(99, 0, 1, [], [0])])
    again = Driver(processes, config(models["plain"], 1, 2))
    assert again.generate(PROMPTS, 4) == Driver(LocalWorker(), config(models["plain"], 1, 1)).generate(PROMPTS, 4)


@pytest.mark.slow
def test_a_model_folder_that_is_gone_is_a_config_error_of_the_worker(
    models: dict[str, Path], processes: ProcessWorkers, tmp_path: Path
) -> None:
    folder = tiny_llama.build(tmp_path / "model")
    described = config(folder, 2, 1)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="lacks"):
        Driver(processes, described)


@pytest.mark.slow
def test_a_rank_that_dies_fails_its_peers_step_at_once(models: dict[str, Path]) -> None:
    """Not after the collectives' time-out of 60 seconds: a broken connection is noticed."""
    with ProcessWorkers(2, timeout=20) as workers:
        Driver(workers, config(models["plain"], 2, 1))
        workers.processes[1].kill()
        workers.processes[1].join(10)
        step = StepInput(
            step=1,
            new=[NewSequence(1, [5, 6], 2, 0, SamplingParams(), [])],
            scheduled=[ScheduledSequence(1, 0, 2, [], [0])],
        )
        with pytest.raises(WorkerError, match="the sum over the tensor ranks failed, because another worker"):
            workers.call([0], "execute_model", step)
