"""What is being waited for, on stderr: a spinner on a terminal, otherwise a line for each new state."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def status() -> Iterator[Callable[[str], None]]:
    """A function that shows a state until the next one, or until the block ends."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(console.file.write)
        return
    with console.status("starting") as spinner:
        yield lambda what: spinner.update(escape(what))


def _lines(write: Callable[[str], object]) -> Callable[[str], None]:
    last = ""

    def show(what: str) -> None:
        nonlocal last
        if what != last:
            write(what + "\n")
        last = what

    return show
