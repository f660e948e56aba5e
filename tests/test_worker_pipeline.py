"""Pipelines of real worker processes, under every transport: one process's tokens, and no hang when something fails."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import tiny_llama
from stage_channels import TRANSPORTS
from worker_group import GREEDY, Driver, LocalWorker, ProcessWorkers

pytest.importorskip("grpc", reason="the k8s extra is not installed")

import grpc

from lightvllm.config import CacheConfig, DeviceConfig, EngineConfig, ModelConfig, ParallelConfig
from lightvllm.errors import LightvllmError, WorkerError
from lightvllm.messages import NewSequence, ScheduledSequence, StepInput, Tensor
from lightvllm.worker import Worker

PROMPTS = [[5, 60, 7, 300, 9], [11], list(range(40, 63)), [330, 0, 329, 328]]

every_transport = pytest.mark.parametrize("name", TRANSPORTS)


def config(model: Path, tp: int, pp: int, dtype: str = "auto", **layout: Any) -> EngineConfig:
    fields = {"collective_timeout": 60.0} | layout
    return EngineConfig(
        model=ModelConfig.from_dir(model, dtype=dtype),
        parallel=ParallelConfig(tensor_parallel_size=tp, pipeline_parallel_size=pp, **fields),
        cache=CacheConfig(block_size=4),
        device=DeviceConfig(device="cpu", threads=1, kernels="reference"),
        return_logits=True,
    )


def prefill(step: int, tokens: list[int]) -> StepInput:
    return StepInput(
        step=step,
        new=[NewSequence(step, tokens, len(tokens), 0, GREEDY, [])],
        scheduled=[ScheduledSequence(step, 0, len(tokens), [], list(range(-(-len(tokens) // 4))))],
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.build(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    return Driver(LocalWorker(), config(model, 1, 1)).generate(PROMPTS, 12, chunk=6)


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessWorkers]:
    with ProcessWorkers(4) as workers:
        yield workers


@pytest.mark.slow
@every_transport
@pytest.mark.parametrize(("tp", "pp"), [(1, 2), (1, 3), (2, 2)])
def test_a_pipeline_gives_the_tokens_of_one_process(
    model: Path, expected: list[list[int]], processes: ProcessWorkers, name: str, tp: int, pp: int, tmp_path: Path
) -> None:
    directory = {"pp_shared_dir": str(tmp_path)} if name == "shared" else {}
    group = Driver(processes, config(model, tp, pp, pp_transport=name, **directory))
    assert group.generate(PROMPTS, 12, chunk=6) == expected
    assert [info.pp_transport for info in group.infos] == [name] * (tp * pp)
    assert len(list(tmp_path.iterdir())) == (tp * (pp - 1) if name == "shared" else 0)
    processes.call(group.ranks, "close_stage_transport")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_stages_on_several_hosts_are_connected_by_mutual_tls(
    model: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The workers believe so; the hosts are loopback addresses."""
    monkeypatch.setenv("LIGHTVLLM_HOST_IP", "127.0.0.3")
    described = config(model, 1, 3, pp_transport="grpc")
    with ProcessWorkers(3) as workers:
        group = Driver(workers, described, local=False)
        assert group.generate(PROMPTS, 12, chunk=6) == expected
        listening = [
            connection.laddr
            for process in workers.processes
            for connection in psutil.Process(process.pid).net_connections()
            if connection.status == psutil.CONN_LISTEN
        ]
        assert [address.ip.removeprefix("::ffff:") for address in listening] == ["127.0.0.3"] * 2
        for address in listening:
            with grpc.insecure_channel(f"127.0.0.3:{address.port}") as channel, pytest.raises(grpc.RpcError):
                channel.unary_unary("/lightvllm.worker.v1.LLMWorker/PushTensors")(b"", timeout=2)
        workers.call(group.ranks, "close_stage_transport")


@pytest.mark.slow
@every_transport
def test_a_group_goes_on_after_a_failed_step(
    model: Path, expected: list[list[int]], processes: ProcessWorkers, name: str
) -> None:
    """A step fails in the first stage alone: the second is told, and after a reset nothing of it is left."""
    group = Driver(processes, config(model, 1, 2, pp_transport=name))
    good, bad = prefill(1, PROMPTS[0]), msgspec.structs.replace(prefill(1, PROMPTS[0]), new=[])
    began = time.monotonic()
    with pytest.raises(WorkerError, match="which this worker does not know"):
        processes.call([0], "execute_model", bad)
    with pytest.raises(WorkerError, match=r"rank 1 failed .* step 1: the step has failed at the previous stage"):
        processes.call([1], "execute_model", good)
    assert time.monotonic() - began < 30
    processes.call([0], "execute_model", prefill(2, PROMPTS[1]))  # what the second stage never takes
    processes.call(group.ranks, "reset_sequences")
    group._step = 100
    assert group.generate(PROMPTS, 12, chunk=6) == expected


@pytest.mark.slow
@every_transport
def test_a_killed_stage_fails_the_next_ones_step_long_before_the_time_out(model: Path, name: str) -> None:
    with ProcessWorkers(2) as workers:  # each answer within 120 s
        Driver(workers, config(model, 1, 2, pp_transport=name, collective_timeout=1000.0))
        workers.processes[0].kill()
        workers.processes[0].join(10)
        with pytest.raises(WorkerError, match=r"step 1: receiving from the previous stage \(rank 0, .*\) failed"):
            workers.call([1], "execute_model", prefill(1, PROMPTS[0]))


@pytest.mark.slow
@every_transport
def test_a_killed_stage_fails_the_previous_ones_step(model: Path, name: str) -> None:
    with ProcessWorkers(2) as workers:  # each answer within 120 s
        Driver(workers, config(model, 1, 2, pp_transport=name, collective_timeout=1000.0))
        workers.processes[1].kill()
        workers.processes[1].join(10)

        def run_steps() -> None:  # the first ones may still find room
            for step in range(1, 10):
                workers.call([0], "execute_model", prefill(step, PROMPTS[0]))

        with pytest.raises(WorkerError, match=r"sending to the next stage \(rank 1, .*\) failed"):
            run_steps()


@pytest.mark.slow
def test_files_of_killed_workers_are_removed_at_the_next_start(model: Path, tmp_path: Path) -> None:
    described = config(model, 1, 3, pp_transport="shared", pp_shared_dir=str(tmp_path))
    with ProcessWorkers(3) as workers:
        Driver(workers, described)
        assert len(list(tmp_path.iterdir())) == 2
        for process in workers.processes:
            process.kill()
    assert len(list(tmp_path.iterdir())) == 2
    with ProcessWorkers(3) as workers:
        group = Driver(workers, described)
        assert len(list(tmp_path.iterdir())) == 2
        workers.call(group.ranks, "close_stage_transport")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------- the pipeline by hand


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stages_by_hand_say_what_the_pipeline_says(model: Path, processes: ProcessWorkers, dtype: str) -> None:
    group = Driver(processes, config(model, 1, 3, dtype))
    steps = [prefill(1, PROMPTS[2]), StepInput(step=2, scheduled=[ScheduledSequence(1, 23, 1, [17], [])])]
    steps.append(StepInput(step=3, finished=[1]))
    normal = [processes.call(group.ranks, "execute_model", step)[-1] for step in steps]
    processes.call(group.ranks, "reset_sequences")
    for step, expected in zip(steps, normal, strict=True):
        hidden: list[Tensor] = []
        for rank in group.ranks:
            ((output, hidden),) = processes.call([rank], "execute_stage", step, hidden)
            assert (output is None) == (rank < 2)
            assert [(one.dtype, one.shape[1]) for one in hidden] == (
                [(dtype, 32)] if rank < 2 and step.scheduled else []
            )
        assert msgspec.structs.replace(output, model_seconds=0.0) == msgspec.structs.replace(
            expected, model_seconds=0.0
        )


@pytest.mark.slow
def test_a_stage_refuses_hidden_states_that_do_not_fit(model: Path, processes: ProcessWorkers) -> None:
    group = Driver(processes, config(model, 1, 2))
    step = prefill(1, [5, 6])
    ((_, (hidden,)),) = processes.call([0], "execute_stage", step, [])
    wrong = [
        ([], "the hidden states that came are none; expected torch.float32"),
        ([hidden, hidden], "came are torch.float32"),
        (
            [Tensor("float32", [1, 32], bytes(128))],
            r"came are torch.float32 \[1, 32\]; expected torch.float32 \[2, 32\]",
        ),
        ([Tensor("bfloat16", [2, 32], bytes(128))], "came are torch.bfloat16"),
        ([Tensor("float32", [2, 32], bytes(100))], "100 bytes"),
        ([Tensor("complex64", [2, 32], bytes(512))], "'complex64'"),
        ([Tensor("float32", [-2, -32], bytes(256))], "none negative"),
    ]
    for tensors, message in wrong:
        with pytest.raises(WorkerError, match=message):
            processes.call([1], "execute_stage", step, tensors)
        processes.call([1], "reset_sequences")
    with pytest.raises(WorkerError, match="1 tensors came for the first stage; expected none"):
        processes.call([0], "execute_stage", prefill(2, [5]), [hidden])
    processes.call([0], "reset_sequences")
    processes.call([1], "execute_stage", step, [hidden])
    assert list(group.ranks) == [0, 1]


def test_one_stage_by_hand_is_the_whole_step(model: Path) -> None:
    workers = LocalWorker()
    Driver(workers, config(model, 1, 1))
    step = prefill(1, PROMPTS[0])
    expected = workers.worker.execute_model(step)
    workers.worker.reset_sequences()
    output, hidden = workers.worker.execute_stage(step, [])
    assert hidden == []
    assert expected is not None
    assert output is not None
    assert (output.token_ids, output.logits) == (expected.token_ids, expected.logits)


def test_the_calls_of_a_pipeline_in_the_wrong_order(model: Path) -> None:
    worker = Worker()
    with pytest.raises(LightvllmError, match="call init_worker, with several pipeline stages, first"):
        worker.open_stage_transport()
    with pytest.raises(LightvllmError, match="call init_worker, with several pipeline stages, first"):
        worker.connect_stage_transport("")
    worker.close_stage_transport()
