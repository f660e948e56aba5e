"""``LLM``: options to configuration, prompts in and outputs in order, and nothing left behind.

Most tests put the fake executor where the factory would make a real one; the last ones run a real model.
"""

from __future__ import annotations

import gc
import io
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_llama
import tiny_tokenizers
from fake_executor import FakeExecutor, scrambled

from lightvllm import LLM, SamplingParams
from lightvllm.config import EngineConfig, ExecutorConfig
from lightvllm.engine.outputs import RequestOutput
from lightvllm.errors import ConfigError, Shutdown, WorkerDied
from lightvllm.executors import factory
from lightvllm.messages import StepInput

# The fake model reads the seed even then, so that one is given: equal prompts get equal answers.
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, seed=1)
VOCAB_SIZE = 266


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return tiny_tokenizers.byte_level(tmp_path)


class Made:
    """What the factory was asked for, and the executor it gave."""

    executor: FakeExecutor
    executor_config: ExecutorConfig
    engine_config: EngineConfig


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    made = Made()

    def make_executor(
        executor: ExecutorConfig, engine: EngineConfig, progress: Callable[[str], None] | None = None
    ) -> FakeExecutor:
        made.executor_config, made.engine_config = executor, engine
        made.executor = FakeExecutor(scrambled(VOCAB_SIZE), block_size=engine.cache.block_size)
        if progress:
            progress("starting")
        return made.executor

    monkeypatch.setattr(factory, "make_executor", make_executor)
    return made


@pytest.fixture
def llm(folder: Path, made: Made) -> LLM:
    return LLM(folder, load_format="dummy")


# ------------------------------------------------------------------------------------------- options


def test_every_option_reaches_its_configuration(folder: Path, made: Made) -> None:
    said: list[str] = []
    llm = LLM(
        str(folder),
        executor="k8s",
        tensor_parallel_size=2,
        pipeline_parallel_size=3,
        dtype="bfloat16",
        max_model_len=48,
        load_format="dummy",
        block_size=8,
        num_kv_blocks=99,
        kv_cache_memory="1.5MiB",
        enable_prefix_caching=False,
        max_num_seqs=5,
        max_num_batched_tokens=77,
        async_scheduling=False,
        device="cpu",
        threads=3,
        attention_backend="naive",
        kernels="reference",
        gpu_memory_utilization=0.5,
        seed=4,
        return_logits=True,
        k8s_workers=["a:1", "b:2"],
        k8s_gpus_per_pod=3,
        k8s_token_file="token",
        strategy="SPREAD",
        start_timeout=1,
        rpc_timeout=2,
        step_timeout=3,
        env={"A": "b"},
        progress=said.append,
    )
    engine, executor = made.engine_config, made.executor_config
    assert (engine.parallel.tensor_parallel_size, engine.parallel.pipeline_parallel_size) == (2, 3)
    assert (engine.model.dtype, engine.model.max_model_len, engine.model.load_format) == ("bfloat16", 48, "dummy")
    assert (engine.cache.block_size, engine.cache.num_blocks, engine.cache.memory_bytes) == (8, 99, 3 * 2**19)
    assert (engine.cache.enable_prefix_caching, engine.seed, engine.return_logits) == (False, 4, True)
    assert (engine.scheduler.max_num_seqs, engine.scheduler.max_num_batched_tokens) == (5, 77)
    assert engine.scheduler.async_scheduling is False
    assert (engine.device.device, engine.device.threads, engine.device.attention_backend) == ("cpu", 3, "naive")
    assert (engine.device.kernels, engine.device.gpu_memory_utilization) == ("reference", 0.5)
    assert (executor.name, executor.k8s_workers, executor.k8s_token_file) == ("k8s", ("a:1", "b:2"), "token")
    assert executor.k8s_gpus_per_pod == 3
    assert (executor.start_timeout, executor.rpc_timeout, executor.step_timeout) == (1, 2, 3)
    assert (executor.strategy, executor.env) == ("SPREAD", {"A": "b"})
    assert said == ["starting"]
    llm.shutdown()
    LLM(folder, load_format="dummy", executor="ray", ray_address="auto").shutdown()
    assert made.executor_config.ray_address == "auto"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"tensor_paralel_size": 2}, "unknown option tensor_paralel_size; did you mean tensor_parallel_size.*known: "),
        ({"zzz": 2}, "unknown option zzz; known: model, executor, tensor_parallel_size"),
        ({"executor": "slurm"}, "executor='slurm' is not allowed; use 'uniproc' or 'ray' or 'k8s'"),
        ({"device": "tpu"}, "device='tpu' is not allowed; use 'auto' or 'cpu' or 'cuda'"),
        ({"tensor_parallel_size": "2"}, "tensor_parallel_size='2' is not allowed; use a value of type int"),
        ({"max_model_len": "long"}, r"max_model_len='long' is not allowed; use a value of type int \| None"),
        ({"enable_prefix_caching": 1}, "enable_prefix_caching=1 is not allowed; use a value of type bool"),
        ({"env": {"A": 1}}, r"env={'A': 1} is not allowed; use a value of type Mapping\[str, str\] \| None"),
        ({"kv_cache_memory": "much"}, "kv_cache_memory='much' is no size; .* such as '2GiB'"),
        ({"max_model_len": 0}, "max_model_len=0 does not fit"),
        ({"tensor_parallel_size": 3}, "tensor_parallel_size=3 cannot split this model"),
        ({"block_size": 3}, "block_size=3"),
    ],
)
def test_bad_options_are_refused_before_anything_starts(
    folder: Path, made: Made, options: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        LLM(folder, **({"load_format": "dummy"} | options))
    assert not hasattr(made, "executor")


@pytest.mark.parametrize(
    ("size", "expected"),
    [(5, 5), ("5", 5), ("2 GiB", 2**31), ("1.5kb", 1500), ("3m", None), ("4MB", 4_000_000), ("1TiB", 2**40)],
)
def test_sizes(folder: Path, made: Made, size: int | str, expected: int | None) -> None:
    if expected is None:
        with pytest.raises(ConfigError, match="is no size"):
            LLM(folder, load_format="dummy", kv_cache_memory=size)
    else:
        LLM(folder, load_format="dummy", kv_cache_memory=size)
        assert made.engine_config.cache.memory_bytes == expected


def test_without_a_tokenizer(folder: Path, made: Made) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        LLM(folder, load_format="dummy")
    llm = LLM(folder, load_format="dummy", skip_tokenizer_init=True)
    assert len(llm.generate([5, 6], GREEDY)[0].outputs[0].token_ids) == 6
    with pytest.raises(ConfigError, match="skip_tokenizer_init=True"):
        llm.get_tokenizer()


# ------------------------------------------------------------------------------------------- generate


def test_outputs_are_in_the_order_of_the_prompts(llm: LLM) -> None:
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (9, 1, 5)]
    outputs = llm.generate(["hello", {"prompt_token_ids": [9, 9]}, [7]], params)
    assert [len(o.outputs[0].token_ids) for o in outputs] == [9, 1, 5]
    assert [o.prompt for o in outputs] == ["hello", None, None]
    assert [o.prompt_token_ids for o in outputs] == [llm.get_tokenizer().encode("hello"), [9, 9], [7]]
    assert all(o.finished for o in outputs)
    assert outputs[0].outputs[0].text == llm.get_tokenizer().decode(outputs[0].outputs[0].token_ids)


def test_one_prompt_needs_no_list(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode("hello")
    forms: list[Any] = ["hello", ids, {"prompt_token_ids": ids}, ["hello"], [ids], tuple(ids)]
    assert len({tuple(llm.generate(form, GREEDY)[0].outputs[0].token_ids) for form in forms}) == 1
    assert llm.generate([], GREEDY) == []


def test_the_default_is_vllm_s(llm: LLM) -> None:
    assert llm.default_sampling_params == SamplingParams()
    assert llm.default_sampling_params.max_tokens == 16
    params = SamplingParams(ignore_eos=True)
    assert len(llm.generate("hello", params)[0].outputs[0].token_ids) == 16


def test_a_bad_prompt_stops_all_and_leaves_nothing_queued(llm: LLM, made: Made) -> None:
    with pytest.raises(ConfigError, match="the prompt is empty"):
        llm.generate(["hello", ""], GREEDY)
    with pytest.raises(ConfigError, match="2 prompts, but 1 sampling_params"):
        llm.generate(["hello", "x"], [GREEDY])
    for wrong in ({"n": 2}, [{"n": 2}]):
        with pytest.raises(ConfigError, match=r"sampling_params is \{'n': 2\}; expected SamplingParams"):
            llm.generate("hello", wrong)  # type: ignore[arg-type]
    assert not llm.engine.has_unfinished_requests()
    assert made.executor.steps == []
    assert llm.generate("hello", GREEDY)[0].finished


def test_an_interrupt_aborts_what_was_asked_and_the_model_stays_usable(llm: LLM, made: Made) -> None:
    execute = made.executor.execute_model

    def interrupted(scheduler_output: StepInput, non_block: bool = False) -> Any:
        future = execute(scheduler_output, non_block)
        if scheduler_output.step == 3:
            answer = future.result

            def result(timeout: float | None = None) -> Any:
                future.result = answer  # type: ignore[method-assign]
                raise KeyboardInterrupt

            future.result = result  # type: ignore[method-assign]
        return future

    made.executor.execute_model = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["hello", "x"], GREEDY)
    assert not llm.engine.has_unfinished_requests()
    assert len(llm.generate("hello", GREEDY)[0].outputs[0].token_ids) == 6


def test_chat_is_generate_after_the_template(llm: LLM) -> None:
    conversation = [{"role": "user", "content": "hello"}]
    (prompt,) = llm.preprocess_chat(conversation)
    assert prompt["prompt"].endswith("<|assistant|>")
    (answer,) = llm.chat(conversation, GREEDY)
    assert (answer.prompt, answer.prompt_token_ids) == (prompt["prompt"], prompt["prompt_token_ids"])
    assert answer.prompt_token_ids[0] == 0, "the template's <|bos|> became the special token"
    two = llm.chat([conversation, [{"role": "system", "content": "x"}]], GREEDY, add_generation_prompt=False)
    assert len(two) == 2
    assert not any(o.prompt.endswith("<|assistant|>") for o in two if o.prompt)
    for empty in ([], [[]]):
        with pytest.raises(ConfigError, match="at least one message"):
            llm.chat(empty, GREEDY)


def test_a_progress_bar_only_on_a_terminal(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    shown, hidden, piped = Terminal(), Terminal(), io.StringIO()
    for stream, use_tqdm in ((shown, True), (hidden, False), (piped, True)):
        monkeypatch.setattr(sys, "stderr", stream)
        llm.generate(["hello", "x"], GREEDY, use_tqdm)
    assert "2/2" in shown.getvalue()
    assert "tokens/s" in shown.getvalue()
    assert hidden.getvalue() == piped.getvalue() == ""


# ------------------------------------------------------------------------------------------- stream


def test_a_stream_yields_growing_outputs(llm: LLM) -> None:
    expected = llm.generate(["hello", "x"], GREEDY)
    last: dict[int, RequestOutput] = {}
    for output in llm.stream(["hello", "x"], GREEDY):
        before = last.get(output.prompt_index)
        if before is not None:
            assert not before.finished
            assert output.outputs[0].text.startswith(before.outputs[0].text)
            assert len(output.outputs[0].token_ids) == len(before.outputs[0].token_ids) + 1
        last[output.prompt_index] = output
    assert all(last[i].finished for i in (0, 1))
    assert [last[i].outputs[0].text for i in (0, 1)] == [o.outputs[0].text for o in expected]


def test_a_stream_left_standing_loses_nothing_to_another_call(llm: LLM) -> None:
    expected = llm.generate("hello", GREEDY)[0].outputs[0].token_ids
    stream = llm.stream("hello", GREEDY)
    next(stream)
    assert llm.generate("x", GREEDY)[0].finished
    assert [len(o.outputs[0].token_ids) for o in stream] == [2, 3, 4, 5, 6]
    stream = llm.stream("hello", GREEDY)
    assert list(stream)[-1].outputs[0].token_ids == expected


def test_closing_a_stream_aborts_it(llm: LLM) -> None:
    stream = llm.stream(["hello", "x"], GREEDY)
    next(stream)
    assert llm.engine.has_unfinished_requests()
    stream.close()
    assert not llm.engine.has_unfinished_requests()


# ------------------------------------------------------------------------------------------- the end


def test_shutdown_is_done_once(folder: Path, made: Made) -> None:
    with LLM(folder, load_format="dummy") as llm:
        assert llm.generate("hello", GREEDY)[0].finished
    llm.shutdown()
    assert made.executor.num_shutdowns == 1
    with pytest.raises(Shutdown):
        llm.generate("hello", GREEDY)


def test_a_forgotten_llm_shuts_down(folder: Path, made: Made) -> None:
    llm = LLM(folder, load_format="dummy")
    del llm
    gc.collect()
    assert made.executor.num_shutdowns == 1


def test_a_constructor_that_fails_late_shuts_the_executor_down(
    folder: Path, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: FakeExecutor) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(FakeExecutor, "max_concurrent_batches", property(fail, lambda self, value: None), raising=False)
    with pytest.raises(KeyboardInterrupt):
        LLM(folder, load_format="dummy")
    assert made.executor.num_shutdowns == 1


def test_a_worker_s_death_reaches_the_caller(llm: LLM, made: Made) -> None:
    made.executor.fail_at[2] = WorkerDied("w0", "killed by SIGKILL", 0)
    with pytest.raises(WorkerDied, match=r"worker w0 \(rank 0\) died: killed by SIGKILL"):
        llm.generate("hello", GREEDY)


# ------------------------------------------------------------------------------------- a real model


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.build(tmp_path_factory.mktemp("tiny"))


def test_a_real_model_says_what_transformers_says_even_when_preempted(real: Path) -> None:
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(real, dtype=torch.float32)
    prompts = ["The quick brown fox", "Paris is", "One token after another", "The quick brown fox jumps"]
    with LLM(real, threads=1, max_model_len=48, num_kv_blocks=12, block_size=4, max_num_batched_tokens=64) as llm:
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    for output in outputs:
        ids = torch.tensor([output.prompt_token_ids])
        found = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert output.outputs[0].token_ids == found[0, ids.shape[1] :].tolist()
    assert sum(o.metrics.num_preemptions for o in outputs) > 0


def test_an_llm_that_is_never_shut_down_does_not_keep_the_interpreter(real: Path) -> None:
    code = (
        "from lightvllm import LLM, SamplingParams\n"
        f"llm = LLM({str(real)!r}, threads=1, num_kv_blocks=16, max_model_len=64)\n"
        "print(len(llm.generate('Paris', SamplingParams(max_tokens=3, ignore_eos=True))[0].outputs[0].token_ids))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ran.returncode, ran.stdout.strip(), ran.stderr) == (0, "3", "")


@pytest.mark.parametrize("moment", ["making the KV cache", "generating"])
def test_an_interrupt_ends_the_process_at_once(real: Path, moment: str) -> None:
    code = (
        "from lightvllm import LLM, SamplingParams\n"
        "def say(what): print(what, flush=True)\n"
        f"llm = LLM({str(real)!r}, threads=1, progress=say)\n"
        "say('generating')\n"
        "while True:\n"
        "    llm.generate('Paris', SamplingParams(max_tokens=100, ignore_eos=True))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert any(line.strip() == moment for line in process.stdout)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=3)
        finally:
            process.kill()
    assert process.returncode == -signal.SIGINT
    assert errors.strip().endswith("KeyboardInterrupt")
    assert errors.count("Traceback") == 1, errors
