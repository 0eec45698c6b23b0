"""The one place where what users can cause becomes one line.

Damaged files, content of another shape than its name promises, templates that refuse a conversation and full disks
raise exceptions of a dozen libraries. Where such content is touched, `naming` turns them into a ValueError that says
what was being read or written; everything else is a fault of ours and keeps its traceback.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def naming(what: str | Path, way_out: str = "") -> Iterator[None]:
    """Name what is read or written in the errors that its content can cause.

    Args:
        what: A path, or another description.
        way_out: What to do about it.

    Raises:
        ValueError: One line with `what`, the finding and the way out.
    """
    described = repr(str(what)) if isinstance(what, Path) else what
    try:
        yield
    except json.JSONDecodeError as error:
        finding = f"is no JSON: {error.msg}, line {error.lineno} column {error.colno}"
        raise ValueError(_line(described, finding, way_out)) from error
    except UnicodeDecodeError as error:
        finding = f"is no UTF-8 text: byte {error.object[error.start]:#04x} at {error.start}"
        raise ValueError(_line(described, finding, way_out)) from error
    except KeyError as error:
        raise ValueError(_line(described, f"lacks {error.args[0]!r}", way_out)) from error
    except OSError as error:
        finding = f"cannot be used: {error.strerror or error}"
        raise ValueError(_line(described, finding, way_out)) from error
    except (SafetensorError, TypeError, AttributeError, LookupError) as error:
        raise ValueError(_line(described, f"cannot be used: {error}", way_out)) from error
    except Exception as error:
        if not _is_of_a_library(error):
            raise
        raise ValueError(_line(described, f"cannot be used: {error}", way_out)) from error


def _is_of_a_library(error: Exception) -> bool:
    """Whether a template or a tokenizer raised it: neither library is imported for this question."""
    modules = {each.__module__.partition(".")[0] for each in type(error).__mro__}
    # tokenizers raises bare exceptions from its compiled part.
    return "jinja2" in modules or type(error) is Exception


def _line(what: str, finding: str, way_out: str) -> str:
    words = " ".join(f"{what} {finding}".split())
    return f"{words}: {way_out}" if way_out else words
