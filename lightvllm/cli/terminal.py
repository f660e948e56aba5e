"""What the sub-commands show: results on stdout, and on stderr what is being waited for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from rich.console import Console


def stdout() -> Console:
    """A rich console. When nobody reads stdout any more it raises BrokenPipeError, which ``main`` turns into a status;
    rich itself would exit."""
    from rich.console import Console

    class Stdout(Console):
        def on_broken_pipe(self) -> NoReturn:
            raise BrokenPipeError

    return Stdout()


@contextlib.contextmanager
def status() -> Iterator[Callable[[str], None]]:
    """A function that shows a state until the next one, or until the block ends: a spinner on a terminal, otherwise a
    line for each new state."""
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
