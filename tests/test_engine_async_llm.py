"""``AsyncLLM``: one suite for its two modes, the engine in a process of its own and in a thread.

Most of it runs over the fake executor, which checks every step and computes tokens that depend on all that came before.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import shutil
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio
import tiny_llama
from async_engines import SMALL, Make, collect, idle, llm_answers, plain, use_the_fake, when, write_model
from waiting import gone, no_more_files_than, open_files

from lightvllm import LLM, AsyncLLM, SamplingParams
from lightvllm.engine import async_llm, intake
from lightvllm.engine.core_process import ProcessCore
from lightvllm.errors import ConfigError, LightvllmError, PlacementError, QueueFull, RpcTimeout, Shutdown, WorkerDied
from lightvllm.sampling_params import StructuredOutputs

SLOW = {"FAKE_STEP_SECONDS": "0.02"}
HANGING = {"FAKE_STEP_SECONDS": "1000"}


def params(seed: int = 1, **given: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, "max_tokens": 12, "ignore_eos": True, "seed": seed} | given)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(params=["process", "thread"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest_asyncio.fixture
async def make(mode: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Make]:
    use_the_fake(monkeypatch)
    made: list[AsyncLLM] = []

    async def make(**options: Any) -> AsyncLLM:
        engine = await AsyncLLM.create(folder, engine_process=mode == "process", **{**SMALL, **options})
        made.append(engine)
        return engine

    yield make
    for engine in made:
        await engine.shutdown()
        assert not is_alive(engine)


def is_alive(engine: AsyncLLM) -> bool:
    if isinstance(engine._front.core, ProcessCore):
        return not gone(engine._front.core.pid)
    return bool(engine._front.core._thread.is_alive())  # type: ignore[attr-defined]


async def first(stream: Any) -> Any:
    """The first output of a stream that goes on."""
    async with asyncio.timeout(60):
        return await anext(stream)


# ------------------------------------------------------------------------------------------------- outputs


@pytest.mark.asyncio
async def test_the_three_kinds_of_outputs_say_what_llm_says(make: Make, folder: Path) -> None:
    prompts: list[Any] = ["hello world", [5, 6, 7], {"prompt": "five", "prompt_token_ids": [8, 9]}]
    asked = [params(1, logprobs=2), params(2, n=3), params(3, stop=["l", "w"], max_tokens=40)]
    expected = llm_answers(folder, prompts, asked)
    engine = await make()
    for prompt, one, right in zip(prompts, asked, expected, strict=True):
        (final,) = await collect(engine.generate(prompt, one, output_kind="final"))
        cumulative = await collect(engine.generate(prompt, one))
        deltas = await collect(engine.generate(prompt, one, "mine", output_kind="delta"))
        assert plain(final) == plain(cumulative[-1]) == plain(right)
        assert [output.finished for output in cumulative] == [False] * (len(cumulative) - 1) + [True]
        texts = [output.outputs[0].text for output in cumulative]
        assert texts == sorted(texts, key=len)
        merged = deltas[0]
        for delta in deltas[1:]:
            merged.add(delta)
        merged.outputs.sort(key=lambda output: output.index)
        assert plain(merged) == plain(right)
        assert {output.request_id for output in deltas} == {"mine"}
        for output in (final, cumulative[0], deltas[-1]):
            assert (output.prompt, output.prompt_token_ids) == (right.prompt, right.prompt_token_ids)
        times = deltas[-1].metrics
        assert times.arrival_time <= times.first_scheduled_time <= times.first_token_time <= times.finished_time
        assert final.num_cached_tokens is not None
    await idle(engine)


@pytest.mark.asyncio
async def test_outputs_that_nobody_has_taken_are_merged(make: Make, folder: Path) -> None:
    (expected,) = llm_answers(folder, ["hello"], [params(max_tokens=100)])
    engine = await make(env={"FAKE_STEP_SECONDS": "0.002"})
    stream = engine.generate("hello", params(max_tokens=100), output_kind="delta")
    begun = await first(stream)
    await idle(engine)
    last = await first(stream)
    assert last.finished
    assert begun.outputs[0].text + last.outputs[0].text == expected.outputs[0].text
    assert begun.outputs[0].token_ids + last.outputs[0].token_ids == expected.outputs[0].token_ids
    with pytest.raises(StopAsyncIteration):
        await first(stream)


@pytest.mark.asyncio
async def test_an_output_does_not_change_when_the_request_goes_on(make: Make) -> None:
    engine = await make()
    outputs = await collect(engine.generate("hello", params(logprobs=1)))
    lengths = [len(output.outputs[0].token_ids) for output in outputs]
    assert lengths == [len(output.outputs[0].logprobs or ()) for output in outputs]
    assert lengths == sorted(set(lengths))


@pytest.mark.asyncio
async def test_chat_is_generate_after_the_template(make: Make) -> None:
    engine = await make()
    conversation = [{"role": "user", "content": "hello"}]
    (answer,) = await collect(engine.chat(conversation, params(), output_kind="final"))
    text = engine.tokenizer.apply_chat_template(conversation)
    assert answer.prompt == text
    assert answer.prompt_token_ids == engine.tokenizer.encode(text, add_special_tokens=False)
    with pytest.raises(ConfigError, match="unknown role"):
        engine.chat([{"role": "nobody", "content": "hello"}])


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.build(tmp_path_factory.mktemp("real"))


@pytest.mark.asyncio
async def test_a_real_model_says_what_llm_says(mode: str, real: Path) -> None:
    prompts, asked = ["The quick brown", "Paris"], [params(1, logprobs=1, prompt_logprobs=1), params(2, temperature=0)]
    with LLM(real, num_kv_blocks=32, threads=1) as llm:
        expected = llm.generate(prompts, asked)
    async with await AsyncLLM.create(real, engine_process=mode == "process", num_kv_blocks=32, threads=1) as engine:
        streams = [
            engine.generate(prompt, one, output_kind="delta") for prompt, one in zip(prompts, asked, strict=True)
        ]
        for deltas, right in zip(await asyncio.gather(*map(collect, streams)), expected, strict=True):
            told = deltas[0]
            for delta in deltas[1:]:
                told.add(delta)
            assert plain(told) == plain(right)
            assert told.prompt_logprobs == right.prompt_logprobs
        (whole,) = await collect(engine.generate(prompts[0], asked[0], output_kind="final"))
        assert whole.prompt_logprobs == expected[0].prompt_logprobs
        with pytest.raises(ConfigError, match="generates text and makes no embeddings"):
            await engine.embed("Paris")


@pytest.mark.asyncio
async def test_a_model_that_makes_embeddings(mode: str, real: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(real, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaModel"]}))
    with LLM(folder, num_kv_blocks=32, threads=1) as llm:
        expected = llm.embed(["The quick brown", "Paris"])
    async with await AsyncLLM.create(folder, engine_process=mode == "process", num_kv_blocks=32, threads=1) as engine:
        assert (engine.info.can_embed, engine.info.can_generate) == (True, False)
        got = await asyncio.gather(engine.embed("The quick brown"), engine.embed("Paris", "mine", priority=1))
        assert [output.embedding for output in got] == [output.embedding for output in expected]
        assert [output.prompt_token_ids for output in got] == [output.prompt_token_ids for output in expected]
        assert got[1].request_id == "mine"
        with pytest.raises(ConfigError, match="makes embeddings and generates no text"):
            await collect(engine.generate("Paris"))
        leaving = asyncio.ensure_future(engine.embed("The quick brown fox"))
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        await idle(engine)


@pytest.mark.asyncio
async def test_structured_outputs_are_checked_here_and_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = await make()
    asked = params(max_tokens=3, structured_outputs=StructuredOutputs(regex="(unclosed"))
    with pytest.raises(ConfigError, match="structured_outputs"):
        await collect(engine.generate("hello", asked))
    looked: list[int] = []
    monkeypatch.setattr(async_llm, "check_structured", lambda *_: looked.append(threading.get_ident()))
    monkeypatch.setattr(intake, "check_structured", lambda *_: looked.append(0))
    await collect(engine.generate("hello", asked))  # the fake does not mind the grammar
    assert looked[0] != threading.get_ident()
    assert looked[1:] == [0]


@pytest.mark.asyncio
async def test_without_a_tokenizer(make: Make) -> None:
    engine = await make(skip_tokenizer_init=True)
    (output,) = await collect(engine.generate([1, 2], params(), output_kind="final"))
    assert (output.outputs[0].text, len(output.outputs[0].token_ids)) == ("", 12)
    with pytest.raises(ConfigError, match="there is no tokenizer"):
        await collect(engine.generate("text"))
    with pytest.raises(ConfigError, match="skip_tokenizer_init"):
        _ = engine.tokenizer


# ------------------------------------------------------------------------------------- what an engine tells


@pytest.mark.asyncio
async def test_what_is_known_of_an_engine(make: Make, folder: Path) -> None:
    said: list[str] = []
    engine = await make(progress=said.append, max_num_waiting=7, executor="k8s", tensor_parallel_size=2)
    assert said == ["starting the fake"]
    info = engine.info
    assert (info.model, info.path, info.executor, info.start_seconds) == (str(folder), str(folder), "k8s", 0.25)
    assert (info.max_num_waiting, info.can_generate, info.can_embed) == (7, True, False)
    assert info.config.scheduler.max_num_seqs == 8
    assert [(r.rank, r.tp_rank, r.pp_rank, r.worker, r.pid, r.health) for r in engine.ranks] == [
        (0, 0, 0, "fake-0", 1000, "ready"),
        (1, 1, 0, "fake-1", 1001, "ready"),
    ]
    assert (engine.state, engine.failure, engine.stats.num_kv_blocks) == ("ready", None, 128)
    await engine.check_health()
    await asyncio.gather(engine.check_health(), engine.check_health())


@pytest.mark.asyncio
async def test_listeners_are_told_of_every_step_until_they_end(make: Make) -> None:
    engine = await make()
    steps: list[int] = []
    end = engine.on_change(lambda: steps.append(engine.stats.total_steps))
    await collect(engine.generate("hello", params()))
    assert steps[-1] >= 12
    told = len(steps)
    end()
    end()
    await collect(engine.generate("hello", params()))
    assert len(steps) == told


@pytest.mark.asyncio
async def test_a_listener_that_fails_costs_nobody_else_anything(make: Make) -> None:
    complaints: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context["exception"]))
    engine = await make(progress=lambda text: int(text))
    assert [type(complaint) for complaint in complaints] == [ValueError]
    engine.on_change(lambda: 1 / 0)  # type: ignore[arg-type,return-value]
    (output,) = await collect(engine.generate("hello", params(), output_kind="final"))
    assert output.finished
    assert {type(complaint) for complaint in complaints[1:]} == {ZeroDivisionError}


# ------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("prompt", "given", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([999], {}, "token id 999 is not in the vocabulary"),
        ([1] * 300, {}, "max_model_len=256"),
        (3.5, {}, "expected text or a list of token ids"),
        ("x", {"priority": "high"}, "priority='high'"),
        ("x", {"timeout": -1}, "timeout=-1"),
        ("x", {"request_id": 5}, "request_id=5 is not allowed"),
        ("hello " * 5000, {}, "max_model_len=256"),
        ("x", {"output_kind": "some"}, "output_kind='some' is not allowed; use 'delta' or 'cumulative' or 'final'"),
        ("x", {"sampling_params": {"n": 2}}, "expected SamplingParams"),
        ("x", {"sampling_params": SamplingParams(stop_token_ids=[999])}, r"stop_token_ids=\[999\]"),
    ],
)
@pytest.mark.asyncio
async def test_bad_requests_are_refused_at_once(make: Make, prompt: Any, given: dict[str, Any], message: str) -> None:
    engine = await make()
    with pytest.raises(ConfigError, match=message):
        await collect(engine.generate(prompt, **given))
    (output,) = await collect(engine.generate("hello", params(), output_kind="final"))
    assert output.finished


@pytest.mark.asyncio
async def test_a_request_id_is_in_use_until_its_request_is_over(make: Make) -> None:
    engine = await make(env=SLOW)
    stream = engine.generate("hello", params(max_tokens=200), "mine")
    await first(stream)
    with pytest.raises(ConfigError, match="request_id='mine' is in use"):
        await collect(engine.generate("hello", params(), "mine"))
    await stream.aclose()
    outputs = await collect(engine.generate("hello", params(2), "mine", output_kind="delta"))
    assert sum(len(output.outputs[0].token_ids) for output in outputs) == 12


@pytest.mark.asyncio
async def test_more_than_may_wait_are_refused_and_told_when_to_come_again(make: Make) -> None:
    engine = await make(max_num_seqs=2, max_num_waiting=3, env=HANGING, shutdown_timeout=0.2)
    streams = [engine.generate("hello", params(seed)) for seed in range(5)]
    readers = [asyncio.ensure_future(collect(stream)) for stream in streams]
    await asyncio.sleep(0)  # each has been begun
    with pytest.raises(QueueFull, match="3 sequences are waiting and max_num_waiting=3; try again in about") as refused:
        await first(engine.generate("hello", params()))
    assert 1.0 <= refused.value.retry_after <= 60.0
    readers.pop().cancel()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    readers.append(asyncio.ensure_future(collect(engine.generate("hello", params()))))
    await asyncio.sleep(0)
    await engine.shutdown()
    results = await asyncio.gather(*readers, return_exceptions=True)
    assert {type(result) for result in results} == {Shutdown}


# ------------------------------------------------------------------------------------- aborts and time-outs


@pytest.mark.asyncio
async def test_two_hundred_streams_a_third_of_which_vanish(make: Make, folder: Path) -> None:
    draw = random.Random(0)
    prompts = [[draw.randrange(4, 200) for _ in range(draw.randrange(1, 40))] for _ in range(200)]
    asked = [params(seed, max_tokens=draw.randrange(1, 30), n=draw.choice([1, 1, 1, 2])) for seed in range(200)]
    expected = llm_answers(folder, prompts, asked)
    # An engine much quicker than its readers would leave nobody the time to vanish.
    engine = await make(num_kv_blocks=40, env={"FAKE_STEP_SECONDS": "0.002"})

    async def use(index: int) -> bool:
        await asyncio.sleep(draw.random() / 5)
        leave_after = draw.randrange(1, 10) if draw.random() < 0.33 else None
        kind = draw.choice(["delta", "cumulative", "final"])
        outputs = []
        stream = engine.generate(prompts[index], asked[index], output_kind=kind)
        async for output in stream:
            outputs.append(output)
            if len(outputs) == leave_after and not output.finished:
                await stream.aclose()
                return False
        if kind == "delta":
            for output in outputs[1:]:
                outputs[0].add(output)
            outputs[0].outputs.sort(key=lambda output: output.index)
            outputs[-1] = outputs[0]
        assert plain(outputs[-1]) == plain(expected[index])
        return True

    files = open_files()
    async with asyncio.timeout(100):
        stayed = await asyncio.gather(*map(use, range(200)))
    await idle(engine)
    assert 100 < sum(stayed) < 200
    assert (len(engine._front.streams), len(engine._front._request_ids), engine._front._admission._under_way) == (
        0,
        0,
        0,
    )
    no_more_files_than(files)
    assert engine.stats.total_preemptions > 0


@pytest.mark.parametrize("how", ["close", "cancel", "forget"])
@pytest.mark.asyncio
async def test_who_stops_reading_frees_the_blocks(make: Make, how: str) -> None:
    engine = await make(env=SLOW)
    stream = engine.generate("hello world", params(max_tokens=200))
    if how == "close":
        await first(stream)
        await stream.aclose()
    elif how == "cancel":
        reader = asyncio.ensure_future(collect(stream))
        await when(engine, lambda: engine.stats.num_running, "it runs")
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
    else:
        async for _ in stream:
            break
        del stream
        gc.collect()
    await idle(engine)
    assert engine.stats.total_generation_tokens < 200


@pytest.mark.asyncio
async def test_cancelling_at_any_stage(make: Make) -> None:
    engine = await make(max_num_seqs=1, env=SLOW)
    never_begun = engine.generate("hello", params())
    running = engine.generate("hello", params(max_tokens=200))
    await first(running)
    waiting = asyncio.ensure_future(collect(engine.generate("hello", params())))
    await when(engine, lambda: engine.stats.num_waiting, "it waits")
    waiting.cancel()
    just_sent = asyncio.ensure_future(collect(engine.generate("hello", params())))
    await asyncio.sleep(0)
    just_sent.cancel()
    await never_begun.aclose()
    await running.aclose()
    await asyncio.gather(waiting, just_sent, return_exceptions=True)
    await idle(engine)
    over = engine.generate("hello", params(), output_kind="delta")
    last = None
    while last is None or not last.finished:
        last = await first(over)
    await over.aclose()
    await idle(engine)


@pytest.mark.asyncio
async def test_a_request_is_ended_in_time_whether_it_runs_or_waits(make: Make) -> None:
    engine = await make(max_num_seqs=1, env=SLOW)
    runs = asyncio.ensure_future(collect(engine.generate("hello", params(max_tokens=200), timeout=1.5)))
    waits = asyncio.ensure_future(collect(engine.generate("hello", params(max_tokens=200), timeout=0.3)))
    (*_, waited), (*_, ran) = await waits, await runs
    assert (waited.outputs[0].finish_reason, waited.outputs[0].token_ids) == ("timeout", [])
    assert ran.outputs[0].finish_reason == "timeout"
    assert 0 < len(ran.outputs[0].token_ids) < 200
    await idle(engine)


@pytest.mark.asyncio
async def test_a_lower_priority_goes_first(make: Make) -> None:
    engine = await make(max_num_seqs=1, env=SLOW)
    order: list[str] = []

    async def ask(name: str, priority: int) -> None:
        await collect(engine.generate("hello", params(), name, priority=priority, output_kind="final"))
        order.append(name)

    busy = engine.generate("hello", params(max_tokens=20))
    await first(busy)
    late = [asyncio.ensure_future(ask(name, priority)) for name, priority in (("last", 5), ("then", 0), ("first", -5))]
    await asyncio.gather(collect(busy), *late)
    assert order == ["first", "then", "last"]


# ------------------------------------------------------------------------------------------ ends and failures


@pytest.mark.asyncio
async def test_shutdown_while_requests_run(make: Make) -> None:
    engine = await make(env=SLOW)
    readers = [asyncio.ensure_future(collect(engine.generate("hello", params(max_tokens=200)))) for _ in range(20)]
    await when(engine, lambda: engine.stats.num_running, "they run")
    await engine.shutdown()
    assert not is_alive(engine)
    for result in await asyncio.gather(*readers, return_exceptions=True):
        assert isinstance(result, Shutdown)
    assert (engine.state, engine.failure, [r.health for r in engine.ranks]) == ("stopped", None, ["stopped"])
    for call in (engine.check_health(), engine.embed("x"), collect(engine.generate("x"))):
        with pytest.raises(Shutdown):
            await call
    await engine.shutdown()


@pytest.mark.asyncio
async def test_a_step_that_does_not_end_is_ended_by_force(make: Make) -> None:
    engine = await make(env=HANGING, shutdown_timeout=0.2)
    reader = asyncio.ensure_future(collect(engine.generate("hello", params())))
    await asyncio.sleep(0.05)
    async with asyncio.timeout(10):
        await engine.shutdown()
    with pytest.raises(Shutdown):
        await reader


@pytest.mark.parametrize("busy", [True, False], ids=["in a step", "idle"])
@pytest.mark.asyncio
async def test_a_dead_worker_fails_everything_at_once(make: Make, tmp_path: Path, busy: bool) -> None:
    deaths = tmp_path / "deaths"
    os.mkfifo(deaths)
    env = {"FAKE_DEATHS": str(deaths), **(HANGING if busy else {})}
    engine = await make(executor="k8s", tensor_parallel_size=2, pipeline_parallel_size=2, env=env)
    readers = []
    if busy:
        readers = [asyncio.ensure_future(collect(engine.generate("hello", params(seed)))) for seed in range(20)]
        await asyncio.sleep(0.05)
    await asyncio.to_thread(deaths.write_text, "2:killed by SIGKILL")
    await when(engine, lambda: engine.state == "failed", "the death is noticed")
    for result in await asyncio.gather(*readers, return_exceptions=True):
        assert isinstance(result, WorkerDied)
        assert (result.rank, result.worker, result.reason) == (2, "fake-2", "killed by SIGKILL")
    assert engine.failure == "worker fake-2 (rank 2) died: killed by SIGKILL"
    assert [r.health for r in engine.ranks] == ["stopped", "stopped", "dead", "stopped"]
    assert [r.reason for r in engine.ranks] == ["", "", "killed by SIGKILL", ""]
    for call in (engine.check_health(), collect(engine.generate("hello"))):
        with pytest.raises(WorkerDied, match="rank 2"):
            await call
    await engine.shutdown()
    assert engine.state == "failed"


@pytest.mark.asyncio
async def test_an_error_that_is_nobody_s_is_said_and_ends_the_engine(make: Make, capfd: Any) -> None:
    engine = await make(env={"FAKE_STEP_ERROR": "3"})
    with pytest.raises(LightvllmError, match="internal error in the engine: ZeroDivisionError: nobody has thought"):
        await collect(engine.generate("hello", params()))
    assert engine.state == "failed"
    await engine.shutdown()
    assert "Traceback" in capfd.readouterr().err


@pytest.mark.parametrize("kind", [ConfigError, PlacementError, RpcTimeout])
@pytest.mark.asyncio
async def test_a_start_that_fails_says_why(make: Make, kind: type[LightvllmError]) -> None:
    with pytest.raises(kind, match="the fake does not start"):
        await make(env={"FAKE_START": kind.__name__})
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lightvllm")]
    assert not psutil.Process().children()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_num_waitin": 3}, "unknown option max_num_waitin; did you mean max_num_waiting"),
        ({"max_num_waiting": -1}, "max_num_waiting=-1"),
        ({"max_num_waiting": "3"}, "max_num_waiting='3' is not allowed; use a value of type int"),
        ({"shutdown_timeout": 0}, "shutdown_timeout=0"),
        ({"return_logits": True}, "return_logits"),
        ({"block_size": 3}, "block_size=3"),
    ],
)
@pytest.mark.asyncio
async def test_bad_options_are_refused_before_anything_starts(make: Make, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        await make(**options)


@pytest.mark.asyncio
async def test_a_start_can_be_cancelled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_the_fake(monkeypatch)
    begun = asyncio.Event()
    env = {"FAKE_START": "hang"}
    start = asyncio.ensure_future(AsyncLLM.create(folder, env=env, progress=lambda _: begun.set(), **SMALL))
    async with asyncio.timeout(60):
        await begun.wait()
        (child,) = psutil.Process().children()
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start
    assert gone(child.pid)


@pytest.mark.asyncio
async def test_two_engines_in_one_process(make: Make, folder: Path) -> None:
    (expected,) = llm_answers(folder, ["hello"], [params()])
    one, two = await make(env=SLOW), await make()
    slow = asyncio.ensure_future(collect(one.generate("hello", params())))
    (answer,) = await collect(two.generate("hello", params(), output_kind="final"))
    await two.shutdown()
    assert plain(answer) == plain((await slow)[-1]) == plain(expected)


@pytest.mark.asyncio
async def test_a_forgotten_engine_is_ended(make: Make, mode: str, folder: Path) -> None:
    engine = await AsyncLLM.create(folder, engine_process=mode == "process", **SMALL)
    core = engine._front.core
    await collect(engine.generate("hello", params()))
    del engine
    gc.collect()
    if isinstance(core, ProcessCore):
        assert gone(core.pid)
    else:
        assert not core._thread.is_alive()  # type: ignore[attr-defined]


@pytest.mark.parametrize("engine_process", [True, False])
def test_an_event_loop_that_is_closed_early(
    folder: Path, monkeypatch: pytest.MonkeyPatch, engine_process: bool
) -> None:
    use_the_fake(monkeypatch)

    async def use() -> AsyncLLM:
        engine = await AsyncLLM.create(folder, engine_process=engine_process, env=SLOW, **SMALL)
        await first(engine.generate("hello", params(max_tokens=200)))
        return engine

    engine = asyncio.run(use())
    assert is_alive(engine) or not engine_process
    core = engine._front.core
    del engine
    gc.collect()
    assert gone(core.pid) if isinstance(core, ProcessCore) else not core._thread.is_alive()  # type: ignore[attr-defined]
