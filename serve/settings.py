"""What a server is to do: `deltamux.yaml`, and the part of it that reaches vLLM's processes.

Precedence: command line > environment (`DELTAMUX_*`) > YAML > default. The engine's own arguments
stand under `engine` and are handed over unchanged. Slots, host cache, experts and router travel to
every vLLM process in `additional_config["deltamux"]`, which is part of vLLM's compilation cache key.
"""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, model_validator

from deltamux.compression.paths import user_path
from deltamux.compression.validation import problems
from deltamux.serve.durations import Duration
from deltamux.serve.names import BASE, NAME_PATTERN, check_expert_name

ENVIRONMENT_PREFIX = "DELTAMUX_"
# What vLLM's own LoRA takes at most by rule of thumb; chosen, not measured.
DEFAULT_RANK = 64
# Makes the library of metrics keep them in files, for several processes; gauges and what is read at a scrape get lost.
MULTIPROCESS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
# `org/name@revision`, with a branch, tag or commit; without one it would look like a directory.
HUB_ID = r"[\w.-]+/[\w.-]+@[\w./-]+"

Size = Annotated[ByteSize, Field(ge=0)]
ExpertName = Annotated[str, Field(pattern=NAME_PATTERN)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BaseSettings(_Model):
    """The shared model.

    Attributes:
        model: The 16-bit checkpoint that experts were made against: a directory or a hub id.
        revision: Of a hub id.
        quantized: A quantized checkpoint of it, which vLLM serves in its place; None: it serves `model`.
    """

    model: str
    revision: str | None = None
    quantized: str | None = None


class ExpertSettings(_Model):
    """One compressed expert.

    Attributes:
        name: What clients call it.
        path: Its directory, or a hub id with a revision: `org/name@main`.
        pin: Whether it keeps a slot.
        priority: Whose requests wait less; smaller numbers do.
        concurrency: Its requests that may be in the engine at once; None: any number.
        ttl: Seconds without a request after which it leaves memory; None: the server's.
    """

    name: ExpertName
    path: Path
    pin: bool = False
    priority: int = 0
    concurrency: Annotated[int, Field(ge=1)] | None = None
    ttl: Duration | None = None


class RouterSettings(_Model):
    """The router behind `model="auto"`.

    Attributes:
        path: Its directory.
        fallback: Who answers where it abstains.
        features: "default" reads the tables alone, "encoder" wants a router with a sentence encoder;
            None takes what the router was fitted with.
        shadow: Directory of a second router, which decides too and is only counted.
        resident_margin: How far behind the winner an expert in a slot may be, and still answer.
        log: File for decisions and feedback, from which `deltamux router refit` learns; None: none.
        log_prompts: Whether the log has the prompts themselves, or only a hash of each.
    """

    path: Path
    fallback: str = BASE
    features: Literal["default", "encoder"] | None = None
    shadow: Path | None = None
    resident_margin: float = Field(default=0.0, ge=0.0, le=1.0)
    log: Path | None = None
    log_prompts: Literal["hashed", "whole"] = "hashed"


class SlotSettings(_Model):
    """What one slot has room for.

    Attributes:
        bytes: Its size; "auto" is that of the largest configured expert.
        rank: The largest rank of factors, a LoRA adapter's for instance; "auto" is 64 on a CPU, and on a GPU, where
            factors cost launches, the largest of a configured expert.
    """

    bytes: Literal["auto"] | Size = "auto"
    rank: Literal["auto"] | Annotated[int, Field(ge=0)] = "auto"

    @property
    def largest_rank(self) -> int:
        """The largest rank that an adapter may be opened with."""
        return DEFAULT_RANK if self.rank == "auto" else self.rank


class _ServerSettings(_Model):
    """What the configuration and deltamux's code inside vLLM share.

    Attributes:
        version: Of the configuration.
        experts: Served from the start.
        experts_dir: A folder; each complete artifact in it is served under its directory's name.
        state: A file in which experts that were added at run time are kept over a restart; None: they are not.
        preload: Experts that are brought to host memory before the first request; the others are only checked.
        ttl: Seconds without a request after which an expert leaves memory; None: never.
        slot_wait: Seconds that a request may wait for a slot before a busy expert has to give up its own.
        router: Who answers `auto`.
        host_cache: Host memory for experts.
        image_cache: How much of the user's cache directory slot images may take; 0: none are kept.
        log_requests: Whether one line of JSON a request is written to standard output.
        slot: What one slot has room for.
        roots: Folders that clients may load experts and routers from; empty: those that the configuration and what
            it names lie in. With the hub's cache among them, clients may name hub ids.
        tenants: `tenants.yaml` (see `api/tenants.py`); None: there are no tenants.
        metrics: Whether `/metrics` asks for a key where there are keys.
    """

    version: Literal[1] = 1
    experts: tuple[ExpertSettings, ...] = ()
    experts_dir: Path | None = None
    state: Path | None = None
    preload: Literal["all"] | tuple[ExpertName, ...] = "all"
    ttl: Duration | None = None
    slot_wait: Duration = 5.0
    router: RouterSettings | None = None
    host_cache: Size = ByteSize(8 * 2**30)
    image_cache: Size = ByteSize(0)
    log_requests: bool = False
    slot: SlotSettings = SlotSettings()
    roots: tuple[Path, ...] = ()
    tenants: Path | None = None
    metrics: Literal["open", "key"] = "open"

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where experts and routers that clients name may lie."""
        named = [expert.path.parent for expert in self.experts if expert.path.is_absolute()]
        if self.experts_dir is not None:
            named.append(self.experts_dir)
        if self.router is not None:
            named.append(self.router.path.parent)
        return self.roots or tuple(dict.fromkeys(named))

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        names = [expert.name for expert in self.experts]
        for name in names:
            check_expert_name(name)
            if names.count(name) > 1:
                raise ValueError(f"the expert name {name!r} is given twice")
        if self.router and self.router.fallback not in (BASE, *names):
            raise ValueError(f"router.fallback {self.router.fallback!r} is neither base nor expert")
        unknown = sorted(set(self.preload) - set(names)) if self.preload != "all" else []
        if unknown:
            raise ValueError(f"preload names {unknown[0]!r}, which is none of the experts")
        return self

    def preloads(self, name: str) -> bool:
        """Whether an expert is loaded before the first request."""
        return self.preload == "all" or name in self.preload


class PluginSettings(_ServerSettings):
    """What deltamux's code inside vLLM needs to know; `slots` itself is vLLM's max_loras.

    Attributes:
        base: The checkpoint that experts were made against, where vLLM serves a quantized one; None: vLLM's model.
        base_revision: Of a hub id.
    """

    base: str | None = None
    base_revision: str | None = None


class Settings(_ServerSettings):
    """`deltamux.yaml`."""

    base: BaseSettings
    slots: int = Field(default=4, ge=1)
    engine: dict[str, Any] = {}

    def plugin(self) -> PluginSettings:
        """The part for vLLM's processes."""
        shared = {name: getattr(self, name) for name in _ServerSettings.model_fields}
        if self.base.quantized is not None:
            shared |= {"base": self.base.model, "base_revision": self.base.revision}
        return PluginSettings(**shared)


def load_settings(path: Path, environment: dict[str, str] | None = None) -> Settings:
    """Read `deltamux.yaml`; paths in it are relative to its folder.

    `DELTAMUX_SLOTS`, `DELTAMUX_HOST_CACHE`, `DELTAMUX_LOG_REQUESTS`, `DELTAMUX_BASE` and
    `DELTAMUX_ROUTER` override it.

    Raises:
        ValueError: Not YAML, an unknown key, or a value out of range; the message names it.
    """
    environment = dict(os.environ) if environment is None else environment
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{str(path)!r} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} must hold a mapping, got {type(content).__name__}")
    _override(content, environment)
    try:
        settings = Settings.model_validate(content)
    except ValidationError as error:
        raise ValueError(
            f"{str(path)!r} is not a deltamux configuration: {problems(error)}"
        ) from error
    return _with_absolute_paths(settings, path.parent.absolute())


def _override(content: dict[str, Any], environment: dict[str, str]) -> None:
    for key in ("slots", "host_cache", "log_requests"):
        value = environment.get(ENVIRONMENT_PREFIX + key.upper())
        if value:
            content[key] = value
    for key, field in (("base", "model"), ("router", "path")):
        value = environment.get(ENVIRONMENT_PREFIX + key.upper())
        if value:
            # Unlike the file's, these paths are relative to where the command runs.
            local = user_path(value)
            path = str(local.absolute()) if key == "router" or local.is_dir() else value
            before = content.get(key)
            content[key] = {**(before if isinstance(before, dict) else {}), field: path}


def _with_absolute_paths(settings: Settings, root: Path) -> Settings:
    experts = tuple(
        expert.model_copy(update={"path": _directory(root, expert.path.expanduser())})
        for expert in settings.experts
    )
    places = {
        name: root / path
        for name in ("experts_dir", "state")
        if (path := getattr(settings, name)) is not None
    }
    router = settings.router
    if router:
        shadow = router.shadow and root / router.shadow.expanduser()
        log = router.log and root / router.log.expanduser()
        path = root / router.path.expanduser()
        router = router.model_copy(update={"path": path, "shadow": shadow, "log": log})
    base = settings.base
    for field in ("model", "quantized"):
        named = getattr(base, field)
        if named is not None and (root / user_path(named)).is_dir():
            base = base.model_copy(update={field: str(root / user_path(named))})
    tenants = settings.tenants and root / settings.tenants.expanduser()
    parts = {"experts": experts, "router": router, "base": base, "tenants": tenants}
    changed = settings.model_copy(update=parts | places)
    roots = tuple(root / each.expanduser() for each in settings.roots) or (root, *changed.folders)
    return changed.model_copy(update={"roots": roots})


def _directory(root: Path, path: Path) -> Path:
    """An expert's directory; what is none and looks like a hub id with a revision stays one."""
    is_id = re.fullmatch(HUB_ID, str(path)) and not (root / path).exists()
    return path if is_id else root / path


def plugin_settings(additional_config: Any) -> PluginSettings:
    """Read `additional_config["deltamux"]` inside a vLLM process.

    Raises:
        ValueError: It is missing or wrong. It must be there: vLLM's compiled-graph cache does not
            see deltamux's layers, and only `additional_config` tells two configurations apart.
    """
    content = additional_config.get("deltamux") if isinstance(additional_config, dict) else None
    if content is None:
        raise ValueError(
            'the deltamux plugin needs --additional-config \'{"deltamux": {"version": 1, …}}\': '
            "start with `deltamux serve CONFIG`, or give it"
        )
    try:
        return PluginSettings.model_validate(content)
    except ValidationError as error:
        raise ValueError(f'additional_config["deltamux"] is wrong: {problems(error)}') from error
