"""What the router's commands share with the terminal: options, user errors and tables."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

# Exit status for an error that the user can mend.
USER_ERROR_STATUS = 2


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn errors with a way out into one line on stderr and exit status 2, without a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(USER_ERROR_STATUS) from error


def user_path(text: str) -> Path:
    """A path as a user writes it: a shell leaves the `~` of `--output=~/x` alone."""
    return Path(text).expanduser()


JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON line instead of a table.")]
Tokenizer = Annotated[str, typer.Option(help="Served base: directory or hub id.")]
Output = Annotated[
    Path,
    typer.Option("--output", "-o", parser=user_path, metavar="PATH", help="Directory to write."),
]


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Lay out a table: the first column to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )
