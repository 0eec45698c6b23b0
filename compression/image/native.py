"""Compiled libraries of this package: found beside the module that uses them, or done without.

`pip install` builds them from the C++ sources with the compiler it finds; without one the install
succeeds all the same and their users take the path in Python. They are plain C interfaces, not Python
extensions: nothing of Python or of torch is needed to build them.
"""

import ctypes
import importlib.machinery
from pathlib import Path


def load_library(folder: Path, name: str) -> ctypes.CDLL:
    """A compiled library.

    Args:
        folder: Where the module that uses it is.
        name: Of the library, without what a platform appends.

    Raises:
        OSError: It was not built, or cannot be loaded here; the message is one line.
    """
    found = [folder / f"{name}{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    path = next((each for each in found if each.is_file()), None)
    if path is None:
        raise OSError(
            f"{name!r} was not built: install g++, then pip install --no-cache-dir deltamux again"
        )
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise OSError(f"{str(path)!r} cannot be loaded: {reason}") from error
