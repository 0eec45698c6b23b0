"""What is wrong with a file that people or programs wrote, in one line."""

from pydantic import ValidationError

# Findings that are told; a file of another kind has hundreds. Chosen, not measured.
MOST_FINDINGS = 3


def problems(error: Exception) -> str:
    """An error in one line; of pydantic's findings the first few: `experts.0.path: Field required; …`."""
    if not isinstance(error, ValidationError):
        return " ".join(str(error).split())
    found = []
    for each in error.errors(include_url=False, include_input=False):
        place = ".".join(map(str, each["loc"]))
        said = each["msg"].removeprefix("Value error, ")
        found.append(f"{place}: {said}" if place else said)
    more = len(found) - MOST_FINDINGS
    rest = [f"and {more} more"] if more > 0 else []
    return "; ".join(found[:MOST_FINDINGS] + rest)
