"""What became of the rows of a text: used, cut, dropped, and what had to be assumed."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

# Places that a line of the report names; a file may have thousands.
MOST_PLACES = 3


@dataclass
class TextReport:
    """What became of rows, filled while they are read (`encode_rows`).

    Attributes:
        source: The file, or what stands for one.
        rows: Rows that it has.
        drawn: Rows that were drawn from it.
        used: Samples made of them.
        tokens: Tokens of these.
        response_tokens: Those of them that count.
        cut: Places of rows that were longer than the limit.
        dropped: Places of rows that were left out, and why.
        assumed: What was taken for granted, and how many rows it concerns.
    """

    source: str = ""
    rows: int = 0
    drawn: int = 0
    used: int = 0
    tokens: int = 0
    response_tokens: int = 0
    cut: list[str] = field(default_factory=list)
    dropped: list[tuple[str, str]] = field(default_factory=list)
    assumed: dict[str, list[str]] = field(default_factory=dict)

    def add(self, tokens: int, response_tokens: int) -> None:
        """Count a sample."""
        self.used += 1
        self.tokens += tokens
        self.response_tokens += response_tokens

    def assume(self, what: str, place: str) -> None:
        """Note an assumption on a row."""
        self.assumed.setdefault(what, []).append(place)

    def as_dictionary(self) -> dict[str, Any]:
        """For programs."""
        return {
            "source": self.source,
            "rows": self.rows,
            "drawn": self.drawn,
            "used": self.used,
            "tokens": self.tokens,
            "response_tokens": self.response_tokens,
            "cut": len(self.cut),
            "dropped": len(self.dropped),
            "assumed": {what: len(places) for what, places in self.assumed.items()},
        }

    def lines(self, what: str) -> list[str]:
        """For people.

        Args:
            what: What the text was for.
        """
        found = [
            f"{what}: {self.used:,} of {self.rows:,} rows of {self.source}, {self.tokens:,} tokens, "
            f"{self.response_tokens:,} of them in responses"
        ]
        if self.cut:
            found.append(f"  cut to the limit: {_places(self.cut)}")
        reasons = Counter(reason for _, reason in self.dropped)
        for reason in reasons:
            places = [place for place, why in self.dropped if why == reason]
            found.append(f"  dropped, {reason}: {_places(places)}")
        found += [f"  {what}: {_places(places)}" for what, places in self.assumed.items()]
        return found


def _places(places: list[str]) -> str:
    """`12 rows (rows.jsonl:3, rows.jsonl:9, rows.jsonl:11, …)`."""
    more = ", …" if len(places) > MOST_PLACES else ""
    count = "1 row" if len(places) == 1 else f"{len(places):,} rows"
    return f"{count} ({', '.join(places[:MOST_PLACES])}{more})"
