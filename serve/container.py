"""The image's entry command: `python -m deltamux.serve.container CONFIG [vLLM flags]`.

It checks within seconds what a deployment usually gets wrong (key, configuration, base, artifacts,
router, volumes), says it in one line, and otherwise becomes `deltamux serve`. Unlike `deltamux serve`,
which offers the other experts when one is damaged, it refuses to start: whoever deploys is still
looking.
"""

import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from deltamux.compression.image.source import open_source
from deltamux.compression.paths import resolve_directory
from deltamux.router.decide.router import Router
from deltamux.router.decide.tokenizer import tokenizer_sha256
from deltamux.serve.errors import one_line
from deltamux.serve.settings import Settings, load_settings

KEY_VARIABLE = "DELTAMUX_API_KEY"
KEY_FILE_VARIABLE = "DELTAMUX_API_KEY_FILE"
DEFAULT_KEY_FILE = Path("/run/secrets/deltamux_api_key")
# Where vLLM looks for the key; on its command line every process of the machine could read it.
VLLM_KEY_VARIABLE = "VLLM_API_KEY"
# Where models and compiled graphs are kept; the image points them at its volumes.
CACHE_VARIABLES = ("HF_HOME", "VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
DRAIN_VARIABLE = "DELTAMUX_DRAIN_SECONDS"
# How long running requests may take after SIGTERM. Chosen, not measured: an answer of 1,000 tokens.
DRAIN_SECONDS = 60


def main(arguments: list[str]) -> None:
    """Check, then become `deltamux serve`."""
    try:
        environment, command = prepare(arguments, dict(os.environ))
    except Exception as error:
        line = one_line(error)
        if line is None:
            raise
        sys.exit(f"error: {line}")
    os.execve(sys.executable, command, environment)


def prepare(
    arguments: list[str], environment: Mapping[str, str]
) -> tuple[dict[str, str], list[str]]:
    """The environment and the command of the server.

    Args:
        arguments: The configuration's path, then flags for vLLM.
        environment: The container's.

    Raises:
        ValueError: Something is missing or wrong; the message names it and the way out.
    """
    key = api_key(environment)
    if not arguments:
        raise ValueError("no configuration: give the path of a deltamux.yaml as first argument")
    config = Path(arguments[0])
    if not config.is_file():
        raise ValueError(f"{str(config)!r} is not a file: mount the folder with your deltamux.yaml")
    check_caches(environment[name] for name in CACHE_VARIABLES if environment.get(name))
    check_site(load_settings(config, dict(environment)))
    drain = environment.get(DRAIN_VARIABLE) or str(DRAIN_SECONDS)
    if not drain.isdigit():
        raise ValueError(f"{DRAIN_VARIABLE} is a number of seconds, got {drain!r}")
    command = [sys.executable, "-m", "deltamux.serve", "serve", *arguments]
    if "--shutdown-timeout" not in arguments:
        command += ["--shutdown-timeout", drain]
    hidden = {KEY_VARIABLE, KEY_FILE_VARIABLE}
    kept = {name: value for name, value in environment.items() if name not in hidden}
    return kept | {VLLM_KEY_VARIABLE: key}, command


def api_key(environment: Mapping[str, str]) -> str:
    """The API key: the variable's, or the secret file's.

    Raises:
        ValueError: There is none, or it is no plain word.
    """
    key, source = environment.get(KEY_VARIABLE, ""), KEY_VARIABLE
    if not key:
        named = environment.get(KEY_FILE_VARIABLE)
        path = Path(named) if named else DEFAULT_KEY_FILE
        if not path.is_file():
            missing = f"{str(path)!r} is not a file" if named else "there is no secret file"
            raise ValueError(
                f"no API key: {KEY_VARIABLE} is not set and {missing}; set the variable, or name "
                f"a file that holds the key in {KEY_FILE_VARIABLE}"
            )
        if not os.access(path, os.R_OK):
            raise ValueError(
                f"the API key file {str(path)!r} is not readable for user {os.getuid()}: "
                "let that user read it (chmod 644)"
            )
        key, source = path.read_text().strip(), str(path)
    if not key or not key.isprintable() or any(c.isspace() for c in key):
        raise ValueError(f"the API key in {source} must be one word of printable characters")
    return key


def check_caches(folders: Iterable[str]) -> None:
    """Refuse cache folders that the image's user cannot write to."""
    for folder in folders:
        path = Path(folder)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"the cache {folder!r} cannot be made: {error.strerror}") from error
        if not os.access(path, os.W_OK | os.X_OK):
            raise ValueError(
                f"the cache {folder!r} is not writable for user {os.getuid()}: "
                "give its volume to that user"
            )


def check_readable(folder: Path) -> None:
    """Refuse a folder with files that only their owner may read, which others would call missing."""
    for path in folder.iterdir():
        if not os.access(path, os.R_OK):
            raise ValueError(
                f"{str(path)!r} is not readable for user {os.getuid()}: chmod -R a+rX the folder "
                "that is mounted"
            )


def check_site(settings: Settings) -> None:
    """Open everything that a configuration names, without loading weights.

    Raises:
        ValueError: The base, an expert or the router is missing or damaged.
    """
    cache = settings.engine.get("download_dir")
    base = resolve_directory(settings.base.model, settings.base.revision, cache)
    if not (base / "config.json").is_file():
        raise ValueError(f"base.model {str(base)!r} has no config.json: it is not a checkpoint")
    check_readable(base)
    for expert in settings.experts:
        if not expert.path.is_dir():
            raise ValueError(
                f"the expert {expert.name!r} lies at {str(expert.path)!r}, which is not a folder"
            )
        check_readable(expert.path)
        try:
            open_source(expert.path, settings.slot.largest_rank)
        except ValueError as error:
            raise ValueError(f"the expert {expert.name!r} cannot be served: {error}") from error
    if settings.router is not None:
        try:
            Router.load(settings.router.path, tokenizer_sha256=tokenizer_sha256(base))
        except (ValueError, OSError) as error:
            raise ValueError(f"the router cannot be used: {error}") from error


if __name__ == "__main__":
    main(sys.argv[1:])
