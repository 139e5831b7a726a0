"""Progress of long work on the terminal: a bar, the rate and the time left."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

Item = TypeVar("Item")

# Progress and remarks go to stderr, so that a command's output can be piped.
console = Console(stderr=True)


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        rate = task.finished_speed or task.speed
        return Text("" if rate is None else f"{rate:,.1f}/s", style="progress.data.speed")


@dataclass
class Bar:
    """One running bar; `advance` counts, `note` shows a short remark such as the loss."""

    _progress: Progress
    _task: TaskID

    def advance(self, count: int = 1) -> None:
        """Count `count` finished items."""
        self._progress.advance(self._task, count)

    def note(self, text: str) -> None:
        """Show `text` behind the bar."""
        self._progress.update(self._task, note=text)


@contextmanager
def bar(what: str, total: int, *, done: int = 0, show: bool = True) -> Iterator[Bar]:
    """Show a progress bar for `total` items while the block runs.

    Args:
        what: What is being done, for example "train".
        total: Number of items.
        done: Items already done, when work is resumed.
        show: False on every rank but the first.

    Yields:
        The bar to advance.
    """
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=not (show and console.is_terminal),
    )
    # Entered only where it moves: elsewhere some versions of rich print an empty line behind it.
    with nullcontext() if progress.disable else progress:
        yield Bar(progress, task := progress.add_task(what, total=total, completed=done, note=""))
        if show and not console.is_terminal:  # a log gets one line instead of a moving bar
            seconds = progress.tasks[task].elapsed or 0.0
            say(
                f"{what}: {total - done:,} in {seconds:.1f} s {progress.tasks[task].fields['note']}"
            )


def track(items: Sequence[Item], what: str, *, show: bool = True) -> Iterable[Item]:
    """Iterate over `items` behind a progress bar.

    Args:
        items: The work.
        what: What is being done.
        show: False on every rank but the first.

    Yields:
        Each item in turn.
    """
    with bar(what, len(items), show=show) as running:
        for item in items:
            yield item
            running.advance()


def say(text: str) -> None:
    """Print one remark to stderr."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)
