"""Starting a process of our own, and saying how it ended: for whoever starts one. Any module may import this one."""

from __future__ import annotations

import os
import signal
from pathlib import Path


def python_path(others: str | None) -> str:
    """PYTHONPATH under which the child imports this very lightvllm; ``others`` is what is in it already."""
    root = str(Path(__file__).resolve().parent.parent)
    return os.pathsep.join([root, *filter(None, [others])])


def how_it_ended(code: int) -> str:
    """Of ``Popen.returncode``: ``"killed by SIGKILL"`` or ``"exited with code 1"``."""
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:  # a real-time signal
        return f"killed by signal {-code}"
