"""Headers between the ranks of a process group."""

from __future__ import annotations

import time

import pytest
import torch
from stage_channels import CPU, groups

from lightvllm.errors import LightvllmError
from lightvllm.transfer.group import GroupInlet, GroupOutlet, _header, _numbers
from lightvllm.transfer.stage import Header, StageTransport


def test_a_header_survives_its_numbers() -> None:
    for header in (Header(2, 7, -1, "float8_e5m2", (0, 576)), Header(0, 1, 2**40, "bool", ())):
        assert _header(_numbers(header, len(header.shape)).tolist()) == header


@pytest.mark.parametrize("place", [0, 4, 5])
def test_a_malformed_header_is_refused(place: int) -> None:
    numbers = _numbers(Header(0, 1, 1, "int8", (2,)), 1).tolist()
    numbers[place] = 99
    with pytest.raises(LightvllmError, match="a malformed header came"):
        _header(numbers)


def test_a_tensor_larger_than_a_step_can_have_is_not_allocated() -> None:
    first, second = groups()
    assert first.stage_groups is not None
    assert second.stage_groups is not None
    inlet = GroupInlet(*second.stage_groups, 0, 2, 16, CPU, 30.0)
    outlet = GroupOutlet(*first.stage_groups, 1, 2)
    try:
        outlet.put(Header(0, 1, 1, "float32", (5,)), torch.ones(5), time.monotonic() + 5)
        with pytest.raises(LightvllmError, match="a tensor of 20 bytes came"):
            inlet.take(time.monotonic() + 10)
    finally:
        outlet.close()
        inlet.close()


def test_three_stages_hand_on_at_once() -> None:
    """The middle rank's two channels are in one group; each message finds its own."""
    contexts = groups(3)
    pairs = [context.stage_groups for context in contexts]
    assert all(pairs)
    stages = [
        StageTransport(
            "torch",
            CPU,
            20.0,
            inlet=GroupInlet(*pairs[rank], rank - 1, 3, 1024, CPU, 20.0) if rank else None,  # type: ignore[misc]
            outlet=GroupOutlet(*pairs[rank], rank + 1, 3) if rank < 2 else None,  # type: ignore[misc]
        )
        for rank in range(3)
    ]
    try:
        for step in range(9):
            stages[0].send(torch.tensor([step, 0]), step)
            stages[1].send(stages[1].receive((2,), torch.int64, step) + 100, step)
            assert stages[2].receive((2,), torch.int64, step).tolist() == [step + 100, 100]
    finally:
        for stage in stages:
            stage.close()
