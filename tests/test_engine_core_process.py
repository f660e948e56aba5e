"""The engine's process, seen from outside: how it ends, and that it does not outlive its parent."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny_llama
from async_engines import LIMIT, SMALL, collect, use_the_fake, when, write_model
from waiting import gone, no_more_files_than, open_files, wait_until

from lightvllm import AsyncLLM, SamplingParams
from lightvllm.engine import core_process
from lightvllm.engine.core_process import ProcessCore
from lightvllm.errors import ConfigError, PlacementError, Shutdown, WorkerDied

LONG = SamplingParams(max_tokens=200, ignore_eos=True)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    use_the_fake(monkeypatch)
    return write_model(tmp_path)


def child_of(engine: AsyncLLM) -> int:
    assert isinstance(engine._front.core, ProcessCore)
    return engine._front.core.pid


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (signal.SIGKILL, r"killed by SIGKILL \(if nobody sent it, memory has run out\)"),
        (signal.SIGSEGV, "killed by SIGSEGV"),
    ],
)
@pytest.mark.parametrize("busy", [True, False], ids=["busy", "idle"])
@pytest.mark.asyncio
async def test_its_death_is_noticed_at_once_and_said(folder: Path, number: int, reason: str, busy: bool) -> None:
    engine = await AsyncLLM.create(folder, env={"FAKE_STEP_SECONDS": "0.02"}, **SMALL)
    readers = [asyncio.ensure_future(collect(engine.generate("hello", LONG))) for _ in range(20 * busy)]
    if busy:
        await when(engine, lambda: engine.stats.num_running, "they run")
    os.kill(child_of(engine), number)
    async with asyncio.timeout(5):
        await when(engine, lambda: engine.state == "failed", "the death is noticed")
    for result in await asyncio.gather(*readers, return_exceptions=True):
        assert isinstance(result, WorkerDied)
    with pytest.raises(WorkerDied, match=rf"engine process \d+ \(rank 0\) died: {reason}"):
        await engine.check_health()
    with pytest.raises(WorkerDied):
        await collect(engine.generate("hello", LONG))
    assert [(r.health, r.reason[:9]) for r in engine.ranks] == [("dead", "killed by")]
    await engine.shutdown()
    assert engine.state == "failed"


@pytest.mark.asyncio
async def test_with_workers_elsewhere_none_of_them_is_said_to_be_dead(folder: Path) -> None:
    engine = await AsyncLLM.create(folder, executor="k8s", tensor_parallel_size=2, **SMALL)
    os.kill(child_of(engine), signal.SIGKILL)
    await when(engine, lambda: engine.state == "failed", "the death is noticed")
    assert [r.health for r in engine.ranks] == ["stopped", "stopped"]
    await engine.shutdown()


@pytest.mark.asyncio
async def test_sigterm_ends_it_in_order_and_sigint_is_the_parent_s(folder: Path) -> None:
    engine = await AsyncLLM.create(folder, env={"FAKE_STEP_SECONDS": "0.01"}, **SMALL)
    child = child_of(engine)
    os.kill(child, signal.SIGINT)
    await engine.check_health()
    reader = asyncio.ensure_future(collect(engine.generate("hello", LONG)))
    await when(engine, lambda: engine.stats.num_running, "it runs")
    os.kill(child, signal.SIGTERM)
    with pytest.raises(Shutdown):
        await reader
    assert engine.state == "stopped"
    await engine.shutdown()
    assert gone(child)


@pytest.mark.asyncio
async def test_being_told_again_to_end_does_not_disturb_the_end(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A start is broken off by an exception; one that came later would meet what tidies up, or the last words."""
    begun = asyncio.Event()
    start = asyncio.ensure_future(
        AsyncLLM.create(folder, env={"FAKE_START": "hang"}, progress=lambda _: begun.set(), **SMALL)
    )
    async with asyncio.timeout(LIMIT):
        await begun.wait()
        (child,) = psutil.Process().children()
        while not gone(child.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGTERM)
            await asyncio.sleep(0)
        with pytest.raises(Shutdown):
            await start
    assert capfd.readouterr().err == ""


@pytest.mark.asyncio
async def test_one_that_ignores_its_end_is_killed(folder: Path) -> None:
    engine = await AsyncLLM.create(folder, shutdown_timeout=0.2, **SMALL)
    os.kill(child_of(engine), signal.SIGSTOP)
    async with asyncio.timeout(10):
        await engine.shutdown()
    assert gone(child_of(engine))


@pytest.mark.asyncio
async def test_a_process_that_cannot_be_started(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    before = open_files()
    with pytest.raises(PlacementError, match=r"cannot start the engine's process: .*No such file"):
        await AsyncLLM.create(folder, **SMALL)
    no_more_files_than(before)


@pytest.mark.asyncio
async def test_a_path_that_no_message_can_carry(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, os.fsdecode(b"/tmp/\xff")])
    async with asyncio.timeout(5):
        with pytest.raises(ConfigError, match=r"'/tmp/\\udcff' is no UTF-8.*engine_process=False"):
            await AsyncLLM.create(folder, **SMALL)


@pytest.mark.asyncio
async def test_a_child_that_dies_while_it_starts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_process, "_CHILD_MODULE", "lightvllm.no_such_module")
    with pytest.raises(WorkerDied, match="exited with code 1"):
        await AsyncLLM.create(folder, **SMALL)


def test_ctrl_c_before_the_child_has_its_own_group_is_not_for_it_either(folder: Path) -> None:
    """What a terminal sends to the group that the child still is in waits, and is dropped."""
    then = """
    popen = subprocess.Popen

    def interrupted(command, **options):
        options.pop("process_group")
        child = popen(["sh", "-c", 'kill -INT $$; exec "$@"', "sh", *command], **options)
        return child

    subprocess.Popen = interrupted
    async with await AsyncLLM.create(folder, **async_engines.SMALL) as other:
        await other.check_health()
        status = open(f"/proc/{other._front.core.pid}/status").read()
        assert "SigBlk:\\t" + 16 * "0" in status, status
        os.kill(other._front.core.pid, signal.SIGINT)
        await other.check_health()
    print("done")
    """
    parent, _child = start(folder, then, stderr=subprocess.PIPE)
    said, complaints = parent.communicate(timeout=LIMIT)
    assert (said, complaints) == ("done\n", "")


@pytest.mark.parametrize(
    ("command", "reason"),
    [("kill -TERM $$", "killed by SIGTERM"), ("kill -40 $$", "killed by signal 40"), ("exit 3", "exited with code 3")],
)
@pytest.mark.asyncio
async def test_a_child_that_never_had_its_own_group(
    folder: Path, monkeypatch: pytest.MonkeyPatch, command: str, reason: str
) -> None:
    popen = subprocess.Popen

    def killed(_command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        del options["process_group"]
        return popen(["sh", "-c", command], **options)

    monkeypatch.setattr(subprocess, "Popen", killed)
    async with asyncio.timeout(5):
        with pytest.raises(WorkerDied, match=reason):
            await AsyncLLM.create(folder, **SMALL)


@pytest.mark.asyncio
async def test_a_child_that_somebody_else_has_waited_for(folder: Path) -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel itself, here
    try:
        engine = await AsyncLLM.create(folder, **SMALL)
        os.kill(child_of(engine), signal.SIGTERM)
        await when(engine, lambda: engine.state == "stopped", "it has said that it ends")
        async with asyncio.timeout(5):
            await engine.shutdown()
        engine = await AsyncLLM.create(folder, **SMALL)
        os.kill(child_of(engine), signal.SIGKILL)
        async with asyncio.timeout(5):
            await when(engine, lambda: engine.state == "failed", "the death is noticed")
        with pytest.raises(WorkerDied, match="nobody knows how"):
            await engine.check_health()
        await engine.shutdown()
    finally:
        signal.signal(signal.SIGCHLD, before)


@pytest.mark.asyncio
async def test_a_start_that_is_called_off_before_the_child_has_read_of_it(folder: Path) -> None:
    """What to start, and that it is to stop, come in one."""
    start = asyncio.ensure_future(AsyncLLM.create(folder, env={"FAKE_START": "hang"}, shutdown_timeout=50.0, **SMALL))
    while not (children := psutil.Process().children()):
        await asyncio.sleep(0)
    start.cancel()
    async with asyncio.timeout(20):
        with pytest.raises(asyncio.CancelledError):
            await start
    assert gone(children[0].pid)


@pytest.mark.asyncio
async def test_nothing_is_left_after_many(folder: Path) -> None:
    before = open_files()
    for _ in range(3):
        async with await AsyncLLM.create(folder, **SMALL) as engine:
            await collect(engine.generate("hello", SamplingParams(max_tokens=3)))
    no_more_files_than(before)
    assert not psutil.Process().children()


# ------------------------------------------------------------------------------- the parent's end, as processes

SCRIPT = """
import asyncio, gc, os, signal, subprocess, sys
folder = {folder!r}
import async_engines, fake_core
from lightvllm import AsyncLLM, SamplingParams
from lightvllm.engine import core_process
core_process.EXECUTOR_FACTORY = "fake_core:make_executor"

async def main():
    engine = await AsyncLLM.create({folder!r}, env={{"FAKE_STEP_SECONDS": "{step_seconds}"}}, **async_engines.SMALL)
    print(engine._front.core.pid, flush=True)
    reader = asyncio.ensure_future(anext(engine.generate("hello", SamplingParams(max_tokens=200, ignore_eos=True))))
    await (asyncio.sleep(0.1) if {step_seconds} > 1 else reader)
    {then}

asyncio.run(main())
"""


def start(folder: Path, then: str, step_seconds: float = 0.01, **options: Any) -> tuple[subprocess.Popen[str], int]:
    """A process that has an engine, in whose loop a request runs; and the engine's process."""
    script = SCRIPT.format(
        folder=str(folder), step_seconds=step_seconds, then=textwrap.indent(textwrap.dedent(then), "    ").strip()
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, **options)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def end(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    with process.stdout:
        return process.wait(LIMIT)


@pytest.mark.parametrize("stuck", [True, False], ids=["in a step that does not end", "between steps"])
def test_it_does_not_outlive_a_parent_that_is_killed(folder: Path, stuck: bool) -> None:
    parent, child = start(folder, "await asyncio.sleep(1000)", step_seconds=1000 if stuck else 0.01)
    parent.kill()
    wait_until(lambda: gone(child), "the engine's process has ended", limit=5)
    assert end(parent) == -signal.SIGKILL


def test_ctrl_c_is_for_the_parent_which_ends_it_in_order(folder: Path) -> None:
    then = """
    try:
        await asyncio.sleep(1000)
    finally:
        await engine.check_health()  # it has not been touched
        await engine.shutdown()
    """
    parent, child = start(folder, then, start_new_session=True, stderr=subprocess.PIPE)
    os.killpg(parent.pid, signal.SIGINT)
    assert parent.stderr is not None
    with parent.stderr:
        said = parent.stderr.read()
    assert end(parent) == -signal.SIGINT
    assert gone(child)
    assert said.rstrip().endswith("KeyboardInterrupt")


@pytest.mark.parametrize("then", ["return", "sys.exit(3)", "global kept; kept = engine"])
def test_a_parent_that_forgets_it_ends_it_at_the_exit(folder: Path, then: str) -> None:
    parent, child = start(folder, then, stderr=subprocess.PIPE)
    assert end(parent) == (3 if "exit" in then else 0)
    assert parent.stderr is not None
    with parent.stderr:
        assert parent.stderr.read() == ""
    assert gone(child)


# ---------------------------------------------------------------------------------------------- real workers


@pytest.mark.slow
@pytest.mark.asyncio
async def test_a_killed_worker_is_the_one_that_is_said_to_be_dead(tmp_path: Path) -> None:
    folder = tiny_llama.build(tmp_path)
    options: dict[str, Any] = {"executor": "k8s", "tensor_parallel_size": 2, "num_kv_blocks": 64, "threads": 1}
    engine = await AsyncLLM.create(folder, **options)
    try:
        (answer,) = await collect(engine.generate([5, 6, 7], SamplingParams(max_tokens=4), output_kind="final"))
        assert answer.finished
        await engine.check_health()
        pids = [rank.pid for rank in engine.ranks]
        os.kill(pids[1], signal.SIGKILL)
        async with asyncio.timeout(5):
            await when(engine, lambda: engine.state == "failed", "the death is noticed while idle")
        assert [r.health for r in engine.ranks] == ["stopped", "dead"]
        assert engine.ranks[1].reason == "killed by SIGKILL"
        with pytest.raises(WorkerDied, match=r"\(rank 1\) died: killed by SIGKILL"):
            await engine.check_health()
    finally:
        await engine.shutdown()
    assert all(map(gone, [*pids, child_of(engine)]))
