"""The rules of the hand-over, over every transport: nothing but the step's own tensor, no wait without an end."""

from __future__ import annotations

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from stage_channels import CPU, TRANSPORTS, connected, open_ends
from waiting import wait_until

pytest.importorskip("grpc", reason="the k8s extra is not installed")

import lightvllm.transfer
from lightvllm.config import EngineConfig, ModelConfig, ParallelConfig
from lightvllm.errors import ConfigError, LightvllmError
from lightvllm.messages import StageCredentials, WorkerInit
from lightvllm.transfer.credentials import make_credentials
from lightvllm.transfer.stage import Batch, Header, Mailbox, StageConnector, StageTransport
from lightvllm.transfer.tensors import DTYPES, torch_dtype

every_transport = pytest.mark.parametrize("name", TRANSPORTS)


def some(dtype: str, *shape: int) -> torch.Tensor:
    """Every bit pattern may come, NaNs included; a bool has two."""
    raw = torch.randint(0, 256, (*shape, torch_dtype(dtype).itemsize), dtype=torch.uint8)
    return raw[..., 0] > 127 if dtype == "bool" else raw.view(torch_dtype(dtype)).reshape(shape)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(
            one.contiguous().reshape(-1).view(torch.uint8), other.contiguous().reshape(-1).view(torch.uint8)
        )
    )


@every_transport
def test_every_dtype_crosses_bit_for_bit(name: str, tmp_path: Path) -> None:
    wide = some("bfloat16", 6, 8)
    cases = [some(dtype, 3, 5) for dtype in DTYPES]
    cases += [some("bfloat16", 0, 576), some("float32", 1), some("float32"), wide.t(), wide[::2, 1:5]]
    with connected(name, tmp_path) as (first, second):
        for tag, x in enumerate(cases):
            first.send(x, tag)
            received = second.receive(x.shape, x.dtype, tag)
            assert same_bits(received, x)
            if received.numel():
                received.reshape(-1).view(torch.uint8)[0] ^= 1  # it may be written to
        assert list(tmp_path.glob("*/0*")) == []


@every_transport
def test_large_tensors_cross_whole(name: str, tmp_path: Path) -> None:
    x = some("float32", 1027, 3333)  # no multiple of a piece
    with connected(name, tmp_path) as (first, second), ThreadPoolExecutor(1) as pool:
        sending = pool.submit(lambda: [first.send(x, tag) for tag in range(3)])
        for tag in range(3):
            assert same_bits(second.receive(x.shape, x.dtype, tag), x)
        sending.result(timeout=30)


@every_transport
def test_what_is_received_outlives_the_transport(name: str, tmp_path: Path) -> None:
    x = some("float32", 300, 1000)
    with connected(name, tmp_path) as (first, second):
        first.send(x, 1)
        received = second.receive(x.shape, x.dtype, 1)
    assert same_bits(received, x)


@every_transport
def test_a_tensor_that_is_not_the_steps_own_is_an_error(name: str, tmp_path: Path) -> None:
    x = torch.ones(2, 4)
    with connected(name, tmp_path) as (first, second):
        first.send(x, 1)
        with pytest.raises(LightvllmError, match=r"step 7: .*rank 0.* sent the hidden states of step 1$"):
            second.receive((2, 4), torch.float32, 7)
        first.send(x, 2)
        with pytest.raises(LightvllmError, match=r"step 2: .* sent float32 \[2, 4\]; expected float32 \[3, 4\]"):
            second.receive((3, 4), torch.float32, 2)
        first.send(x, 3)
        with pytest.raises(LightvllmError, match=r"step 3: .* sent float32 \[2, 4\]; expected bfloat16 \[2, 4\]"):
            second.receive((2, 4), torch.bfloat16, 3)


@every_transport
def test_after_a_reset_nothing_old_is_taken(name: str, tmp_path: Path) -> None:
    stale, fresh = torch.zeros(4), torch.ones(4)
    with connected(name, tmp_path) as (first, second):
        first.send(stale, 5)  # the second stage has failed before it took this
        first.send(stale, 6)
        first.reset()
        second.reset()
        with ThreadPoolExecutor(1) as pool:  # a channel that holds two may be full until the next step
            sending = pool.submit(first.send, fresh, 5)
            assert second.receive((4,), torch.float32, 5).tolist() == [1, 1, 1, 1]
            sending.result(timeout=30)


@every_transport
def test_ranks_that_were_not_reset_alike_are_told_so(name: str, tmp_path: Path) -> None:
    with connected(name, tmp_path, timeout=0.3) as (first, second):
        first.reset()
        first.send(torch.ones(1), 1)
        with pytest.raises(LightvllmError, match="has been reset 1 times, this worker 0 times; reset all ranks alike"):
            second.receive((1,), torch.float32, 1)
        second.reset()
        second.reset()
        first.send(torch.ones(1), 2)
        with pytest.raises(LightvllmError, match=r"\(1 batches came from before the last reset\)"):
            second.receive((1,), torch.float32, 2)


@every_transport
def test_a_step_that_failed_before_fails_here_at_once(name: str, tmp_path: Path) -> None:
    with connected(name, tmp_path) as (first, second):
        first.send_failure(4)
        with pytest.raises(LightvllmError, match=r"step 4: the step has failed at the previous stage \(rank 0, .*"):
            second.receive((1,), torch.float32, 4)
        first.send(torch.ones(1), 5)
        assert second.receive((1,), torch.float32, 5).tolist() == [1]


@every_transport
def test_waiting_for_a_tensor_ends_by_its_time_out_and_can_be_repeated(name: str, tmp_path: Path) -> None:
    with connected(name, tmp_path, timeout=0.3) as (first, second):
        began = time.monotonic()
        with pytest.raises(
            LightvllmError,
            match=rf"step 1: no hidden states came from the previous stage \(rank 0, pp_transport={name}\) within 0\.3",
        ):
            second.receive((1,), torch.float32, 1)
        assert 0.25 < time.monotonic() - began < 10
        first.send(torch.ones(1), 1)
        assert second.receive((1,), torch.float32, 1).tolist() == [1]


@every_transport
def test_a_sender_is_held_back_only_by_a_receiver_that_takes_nothing(name: str, tmp_path: Path) -> None:
    x = some("float32", 512, 1024)  # 2 MiB: more than sockets hold
    outlet, inlet = open_ends(name, tmp_path, capacity=2, timeout=5.0)
    first = StageTransport(name, CPU, 0.5, outlet=outlet, next_rank=1)
    try:
        first.send(x, 1)
        first.send(x, 2)  # the channel holds as many batches as there are stages, and does not wait

        def send_on() -> None:
            for tag in range(3, 60):
                first.send(x, tag)

        with pytest.raises(LightvllmError, match=r"next stage \(rank 1, .* has not taken what was sent before"):
            send_on()
        assert first._sent <= 2 + 2 + 16  # behind the two there are the receiver's mailbox and what is on the way
    finally:
        outlet.close()
        inlet.close()


@every_transport
def test_what_comes_is_there_before_it_is_asked_for(name: str, tmp_path: Path) -> None:
    """Receiving goes on while a step computes: the sender is done although nobody takes."""
    x = some("float32", 512, 1024)
    with connected(name, tmp_path, capacity=2) as (first, second):
        first.send(x, 1)
        first.send(x, 2)
        outlet: Any = first._outlet
        if name == "grpc":
            wait_until(lambda: not outlet._items, "everything is on its way")
        elif name == "torch":
            for works, _ in outlet._sending:
                for work in works:
                    work.wait()
        assert same_bits(second.receive(x.shape, x.dtype, 1), x)
        assert same_bits(second.receive(x.shape, x.dtype, 2), x)


@every_transport
def test_the_end_of_the_previous_stage_ends_the_wait(name: str, tmp_path: Path) -> None:
    with connected(name, tmp_path) as (first, second), ThreadPoolExecutor(1) as pool:
        first.send(torch.ones(1), 1)
        waiting = pool.submit(lambda: [second.receive((1,), torch.float32, tag) for tag in (1, 2)])
        wait_until(lambda: second._taken == 1, "the first batch is taken")
        first.close()
        with pytest.raises(LightvllmError, match=r"step 2: receiving from the previous stage .* failed: .*"):
            waiting.result(timeout=20)


@every_transport
def test_sending_to_a_stage_that_has_closed_is_an_error(name: str, tmp_path: Path) -> None:
    with connected(name, tmp_path) as (first, second):
        second.close()

        def failure() -> LightvllmError | None:
            try:
                first.send(torch.ones(4), 1)
            except LightvllmError as error:
                return error
            return None

        error = wait_until(failure, "the sender notices", limit=20)  # the news may be on its way
        assert "sending to the next stage (rank 1" in str(error)


@every_transport
def test_closing_ends_a_wait_of_this_worker(name: str, tmp_path: Path) -> None:
    with connected(name, tmp_path) as (_, second), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(second.receive, (1,), torch.float32, 1)
        wait_until(waiting.running, "it runs")
        second.close()
        with pytest.raises(LightvllmError, match="closed its stage transport"):
            waiting.result(timeout=20)


@every_transport
def test_closing_leaves_no_thread_socket_or_file(name: str, tmp_path: Path) -> None:
    process = psutil.Process()

    def held() -> tuple[set[int | None], int]:
        return {thread.ident for thread in threading.enumerate()}, len(process.net_connections())

    (tmp_path / "warm").mkdir()
    with connected(name, tmp_path / "warm"):
        pass  # what a library keeps for good is there now
    wait_until(lambda: not any("lightvllm" in t.name for t in threading.enumerate()), "its threads have ended")
    threads, sockets = held()
    with connected(name, tmp_path) as (first, second):
        first.send(torch.ones(3), 1)
        second.receive((3,), torch.float32, 1)
    del first, second
    wait_until(lambda: held()[0] <= threads, "the threads have ended")
    wait_until(lambda: held()[1] <= sockets, "the sockets are closed")
    assert [path for path in tmp_path.rglob("*") if path.name != "warm"] == []


@every_transport
def test_an_idle_channel_neither_times_out_nor_uses_the_processor(name: str, tmp_path: Path) -> None:
    """Idle for longer than the time-out. gloo's own thread looks a hundred times a second."""
    with connected(name, tmp_path, timeout=0.5) as (first, second):
        first.send(torch.ones(1), 1)
        second.receive((1,), torch.float32, 1)
        before = time.process_time()
        threading.Event().wait(2.0)
        assert time.process_time() - before < (0.2 if name == "torch" else 0.05)
        first.send(torch.ones(1), 2)
        assert second.receive((1,), torch.float32, 2).tolist() == [1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["grpc", "shared"])
def test_tensors_of_a_gpu_cross_while_it_computes(name: str, tmp_path: Path) -> None:
    """Both stages on one device; NCCL would need two. What is sent is complete, what is received usable at once."""
    device = torch.device("cuda", 0)
    outlet, inlet = open_ends(name, tmp_path, capacity=2)
    first = StageTransport(name, device, 30.0, outlet=outlet, next_rank=1)
    second = StageTransport(name, device, 30.0, inlet=inlet, previous_rank=0)
    try:
        for tag in range(8):
            x = torch.randn(2048, 2048, device=device)
            y = ((x @ x) / 2048).to(torch.bfloat16).t()
            first.send(y, tag)
            received = second.receive(y.shape, y.dtype, tag)
            assert received.device == device
            assert torch.equal(received.float() * 2, y.float() * 2)
    finally:
        first.close()
        second.close()


def test_a_lost_batch_is_noticed() -> None:
    mailbox = Mailbox(3)
    for sequence in (1, 3):
        mailbox.put(Batch(Header(0, sequence, sequence, "float32", (1,)), torch.ones(1)))

    class Box:
        take = mailbox.take
        close = mailbox.close

    stage = StageTransport("test", CPU, 1.0, inlet=Box(), previous_rank=0)
    stage.receive((1,), torch.float32, 1)
    with pytest.raises(LightvllmError, match=r"batch 3 came .* after batch 1; one was lost"):
        stage.receive((1,), torch.float32, 3)


def test_a_mailbox_gives_what_has_come_before_it_says_that_nothing_more_comes() -> None:
    mailbox = Mailbox(2)
    batch = Batch(Header(0, 1, 1), None)
    mailbox.put(batch)
    mailbox.end("it has died")
    mailbox.end("another reason")
    assert mailbox.take(0) is batch
    with pytest.raises(LightvllmError, match="it has died"):
        mailbox.take(0)


def test_a_full_mailbox_makes_its_receiver_wait_until_it_is_closed() -> None:
    mailbox = Mailbox(1)
    batch = Batch(Header(0, 1, 1), None)
    assert mailbox.put(batch)
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(mailbox.put, batch)
        assert mailbox.take(time.monotonic() + 5) is batch
        assert second.result(timeout=5)
        third = pool.submit(mailbox.put, batch)
        mailbox.close()
        assert third.result(timeout=5) is False


def test_ends_that_are_not_there() -> None:
    alone = StageTransport("test", CPU, 1.0)
    with pytest.raises(LightvllmError, match="there is no next stage"):
        alone.send(torch.ones(1), 1)
    with pytest.raises(LightvllmError, match="there is no previous stage"):
        alone.receive((1,), torch.float32, 1)
    alone.close()


# ------------------------------------------------------------------------------------------------- the choice


def init(local: bool = True, **layout: Any) -> WorkerInit:
    model = ModelConfig(
        path="/nowhere",
        architecture="LlamaForCausalLM",
        dtype="float32",
        max_model_len=64,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    config = EngineConfig(model=model, parallel=ParallelConfig(pipeline_parallel_size=2, **layout))
    return WorkerInit(
        rank=1,
        local_rank=0,
        local_world_size=2 if local else 1,
        device_index=0,
        world_size=2,
        config=config,
        stage_credentials=StageCredentials(group="0" * 16, token="secret"),
    )


def test_a_directory_that_all_hosts_share_must_be_named() -> None:
    with pytest.raises(ConfigError, match=r"needs a directory that all hosts share.*--pp-shared-dir"):
        StageConnector(init(local=False, pp_transport="shared"), CPU)


def test_a_listener_for_other_hosts_needs_certificates() -> None:
    connector = StageConnector(init(local=False, pp_transport="grpc"), CPU)
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1 needs certificates"):
        connector.open("192.0.2.1")


def test_a_connector_closes_what_it_has_opened(tmp_path: Path) -> None:
    connector = StageConnector(init(pp_transport="shared", pp_shared_dir=str(tmp_path)), CPU)
    assert Path(connector.open("127.0.0.1")).parent == tmp_path
    assert len(list(tmp_path.iterdir())) == 1
    connector.close()
    connector.close()
    assert list(tmp_path.iterdir()) == []


def test_a_missing_grpc_is_an_error_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "lightvllm.transfer.push", raising=False)
    monkeypatch.delattr(lightvllm.transfer, "push", raising=False)
    monkeypatch.setitem(sys.modules, "grpc", None)
    with pytest.raises(ConfigError, match=r"--pp-transport grpc needs the package 'grpcio'.*lightvllm\[k8s\]"):
        StageConnector(init(pp_transport="grpc"), CPU)


def test_credentials_are_made_for_stages_alone_and_are_not_shown() -> None:
    assert make_credentials(ParallelConfig(tensor_parallel_size=2), local=True) == [None, None]
    one, other = make_credentials(ParallelConfig(pipeline_parallel_size=2), local=True)
    assert one is not None
    assert one == other
    assert one.cert == b""
    assert one.token not in repr(one)
    assert one.token != make_credentials(ParallelConfig(pipeline_parallel_size=2), local=True)[0].token  # type: ignore[union-attr]
    ranks = make_credentials(ParallelConfig(pipeline_parallel_size=2, pp_transport="grpc"), local=False)
    assert len({rank.key for rank in ranks if rank}) == 2
    assert len({rank.ca for rank in ranks if rank}) == 1
    assert all("PRIVATE" not in repr(rank) and "hidden" in repr(rank) for rank in ranks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pp_transport": "pigeon"}, "pp_transport='pigeon' is unknown; use one of torch, grpc, shared"),
        ({"pp_shared_dir": "/x"}, "pp_shared_dir is given, but pp_transport='torch'"),
        ({"pp_transport": "grpc", "pp_shared_dir": "/x"}, "pp_shared_dir is given, but pp_transport='grpc'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ParallelConfig(**options)


def test_a_transport_with_one_stage_is_harmless() -> None:
    assert not ParallelConfig(pp_transport="grpc").needs_process_groups
    assert not ParallelConfig(pipeline_parallel_size=2, pp_transport="grpc").needs_process_groups
    assert ParallelConfig(pipeline_parallel_size=2).needs_process_groups
