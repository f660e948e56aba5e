"""The threads that share a kernel's work: several callers at once, more threads than cores, a fork."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from kernel_fixtures import compiled, random, threads  # noqa: F401

from lightvllm import kernels
from lightvllm.errors import ConfigError


@pytest.mark.usefixtures("compiled", "threads")
def test_several_callers_at_once() -> None:
    weight = random(1000, 576, dtype=torch.float32, seed=1)
    inputs = [random(rows, 576, dtype=torch.float32, seed=rows) for rows in (1, 3, 7, 200)]
    expected = [kernels.linear(x, weight) for x in inputs]
    torch.set_num_threads(3)

    def call(caller: int) -> bool:
        torch.set_num_threads(3)  # is the thread's own
        x, y = inputs[caller % 4], expected[caller % 4]
        return all(torch.equal(kernels.linear(x, weight), y) for _ in range(20))

    with ThreadPoolExecutor(4) as callers:
        assert all(callers.map(call, range(8)))


_FORK = """
import os, torch
from lightvllm import kernels
kernels.use("compiled")
torch.set_num_threads(3)
x, weight = torch.ones(4, 576), torch.ones(1000, 576)
expected = kernels.linear(x, weight)
child = os.fork()
if child == 0:
    os._exit(0 if all(torch.equal(kernels.linear(x, weight), expected) for _ in range(20)) else 1)
assert torch.equal(kernels.linear(x, weight), expected)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.usefixtures("compiled")
def test_a_forked_child_computes() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _FORK], env=os.environ, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "0\n", done.stderr


_THREADS = """
import os, torch
from lightvllm import kernels
kernels.use("compiled")
x, weight = torch.ones(4, 576), torch.ones(1000, 576)

def started(threads):
    before = len(os.listdir("/proc/self/task"))
    torch.set_num_threads(threads)
    kernels.linear(x, weight)
    return len(os.listdir("/proc/self/task")) - before

print(started(1), started(3), started(2), started(4))
"""


_CHOSEN = """
import os, torch
from lightvllm import kernels

def started(threads):
    before = len(os.listdir("/proc/self/task"))
    kernels.set_num_threads(threads)
    kernels.linear(torch.ones(4, 576), torch.ones(1000, 576))
    return len(os.listdir("/proc/self/task")) - before, torch.get_num_threads()

kernels.use("compiled")
print(started(3), started(1))
kernels.use("reference")
kernels.set_num_threads(2)
print(torch.get_num_threads())
"""


@pytest.mark.usefixtures("compiled")
def test_threads_of_the_kernels_alone() -> None:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", _CHOSEN], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout == "(2, 1) (0, 1)\n2\n", done.stderr


def test_no_threads_are_refused() -> None:
    with pytest.raises(ConfigError, match="threads=0; use 1 or more"):
        kernels.set_num_threads(0)


@pytest.mark.usefixtures("compiled")
def test_as_many_threads_as_torch_was_told() -> None:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", _THREADS], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout == "0 2 0 1\n", done.stderr
