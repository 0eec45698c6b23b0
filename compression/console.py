"""Tables on the terminal."""

import io
from collections.abc import Iterable, Sequence

# Wider than any of our tables: who pipes them somewhere gets whole lines.
WIDTH = 200


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table as text: the first column to the left, the others to the right."""
    from rich.console import Console
    from rich.table import Table

    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, title in enumerate(header):
        grid.add_column(title, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        grid.add_row(*map(str, row))
    page = io.StringIO()
    Console(file=page, width=WIDTH, color_system=None, markup=False, emoji=False).print(grid)
    return "\n".join(line.rstrip() for line in page.getvalue().splitlines())
