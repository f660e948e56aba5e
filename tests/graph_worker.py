"""The worker class of the tests of compiled graphs."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

from contract_worker import ContractWorker

from lightvllm.messages import Deferred


class GraphWorker(ContractWorker):
    """What graphs are made of. Notes each call, and whether two ran at a time."""

    def join(self, *parts: object, sep: str = "") -> str:
        self.append(parts)
        return sep.join(map(str, parts))

    def extend(self, value: list[Any], item: object) -> list[Any]:
        return [*value, item]

    def thread(self, value: object) -> int:
        return threading.get_ident()

    def negative(self, value: int) -> int:
        if value < 0:
            raise ValueError(f"{value} is negative")
        return value

    def unpicklable(self, value: object) -> object:
        return threading.Lock()

    def lock(self, value: object) -> object:
        """Something that can stay on a worker only."""
        self._lock = threading.Lock()
        return self._lock

    def is_my_lock(self, lock: object) -> bool:
        return lock is self._lock

    def touch(self, value: object, path: str) -> object:
        Path(path).touch()
        return value

    def touch_and_wait(self, value: object, mine: str, other: str, limit: float = 60.0) -> object:
        """Returns when somebody has touched ``other``."""
        Path(mine).touch()
        deadline = time.monotonic() + limit
        while not Path(other).exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{other} did not appear")
            time.sleep(0.001)
        return value

    def put_off(self, value: object) -> object:
        """Its result tells, besides the value, whether it was finished in the same thread."""
        begun = threading.get_ident()
        return Deferred(lambda: [value, threading.get_ident() == begun])

    def put_off_and_fail(self, value: object) -> object:
        return Deferred(lambda: self.boom("too late"))

    def hang(self, value: object, path: str) -> object:
        self.touch_and_hang(path)
        return value

    def leave(self, value: object) -> None:
        self.exit_yourself(3)

    # ------------------------------------------------------------------------------------------------- tensors

    def tensor(self, dtype: str, shape: tuple[int, ...]) -> Any:
        """Every bit pattern that the dtype has, as far as the shape has room."""
        import torch

        kind = getattr(torch, dtype)
        size = torch.empty(0, dtype=kind).element_size()
        count = torch.Size(shape).numel() * size
        return (torch.arange(count) % 251).to(torch.uint8).view(kind).reshape(shape)

    def digest(self, tensor: Any) -> tuple[str, tuple[int, ...], bytes]:
        import torch

        return str(tensor.dtype), tuple(tensor.shape), tensor.reshape(-1).view(torch.uint8).numpy().tobytes()

    def pair(self, tensor: Any) -> dict[str, Any]:
        """Tensors inside another object, one of them a view with strides."""
        return {"a": tensor, "nested": [tensor.transpose(0, 1)]}

    def first_row(self, pair: dict[str, Any]) -> tuple[str, tuple[int, ...], bytes]:
        return self.digest(pair["nested"][0][:, 0].contiguous())
