"""Who may use the server, and what of it: `tenants.yaml`.

    version: 1
    tenants:
      - name: research
        keys: ["sha256:9f86d0…"]       # `deltamux key` makes a key and its hash
        experts: [math, sql]           # default: all; the base is everybody's
        requests_per_minute: 600       # default: no limit; so are the next two
        tokens_per_minute: 200000
        concurrency: 16
        admin: false                   # whether it may load, delete, pin and reload

Keys are random words of at least 128 bits, so that a plain SHA-256 of them tells nothing; hashes are compared in constant
time, all of them whatever the first ones say.
"""

import hashlib
import hmac
import secrets
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from deltamux.compression.files import read_text
from deltamux.compression.validation import problems
from deltamux.serve.api.limits import Limits
from deltamux.serve.names import BASE, NAME_PATTERN

KEY_PREFIX = "dmx-"
HASH_PREFIX = "sha256:"
KEY_BYTES = 32
# Characters of a key that somebody brings along; 22 of base 64 are 128 bits.
SHORTEST_KEY = 22
# Whoever has one of vLLM's own keys (`--api-key`) beside tenants.
API_KEY_TENANT = "api-key"
# Mixed into the prefix cache's keys, so that nobody learns from the time of an answer what another tenant asked.
_SALT = secrets.token_bytes(32)


class TenantSettings(BaseModel):
    """One tenant, as its file has it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    keys: Annotated[
        list[Annotated[str, Field(pattern=rf"^{HASH_PREFIX}[0-9a-f]{{64}}$")]], Field(min_length=1)
    ]
    experts: list[Annotated[str, Field(pattern=NAME_PATTERN)]] | None = None
    requests_per_minute: PositiveInt | None = None
    tokens_per_minute: PositiveInt | None = None
    concurrency: PositiveInt | None = None
    admin: bool = False


class TenantsFile(BaseModel):
    """The file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    tenants: Annotated[list[TenantSettings], Field(min_length=1)]

    @model_validator(mode="after")
    def _apart(self) -> "TenantsFile":
        names = [tenant.name for tenant in self.tenants]
        keys = [key for tenant in self.tenants for key in tenant.keys]
        for name in (*names, *keys):
            if name == API_KEY_TENANT:
                raise ValueError(f"a tenant cannot be called {name!r}: the name is taken")
            if (names + keys).count(name) > 1:
                raise ValueError(f"{name!r} is given twice")
        return self


@dataclass(frozen=True, eq=False)
class Tenant:
    """Somebody with a key.

    Attributes:
        name: The metrics' label.
        experts: The experts that it may use; None: all.
        admin: Whether it may change what is served.
        limits: What it has left.
        apart: Whether it shares no part of the prefix cache.
    """

    name: str
    experts: frozenset[str] | None = None
    admin: bool = False
    limits: Limits = field(default_factory=Limits)
    apart: bool = True

    @property
    def counts_tokens(self) -> bool:
        """Whether its tokens are limited."""
        return self.limits.counts_tokens

    def may_use(self, name: str) -> bool:
        """Whether it may use an expert."""
        return self.experts is None or name in self.experts or name == BASE

    def cache_salt(self, own: str | None) -> str:
        """What keeps its part of the prefix cache apart; `own` is what its request says."""
        words = f"{self.name}\0{own or ''}".encode()
        return hmac.new(_SALT, words, hashlib.sha256).hexdigest()


# Whose request runs; None: the server asks for no key, or asks nobody for one on this route.
current_tenant: ContextVar[Tenant | None] = ContextVar("current_tenant", default=None)


class Keys:
    """Keys, and whose they are.

    Args:
        tenants: The tenants of the file.
        api_keys: vLLM's own keys; alone or beside tenants, they open everything.
    """

    def __init__(
        self, tenants: Iterable[TenantSettings] = (), api_keys: Iterable[str] = ()
    ) -> None:
        self._known = [
            (bytes.fromhex(key.removeprefix(HASH_PREFIX)), tenant)
            for tenant, keys in ((_tenant(each), each.keys) for each in tenants)
            for key in keys
        ]
        self.tenants = list(dict.fromkeys(tenant for _, tenant in self._known))
        holder = Tenant(API_KEY_TENANT, admin=True, apart=False)
        self._known += [(_digest(key), holder) for key in api_keys]

    @property
    def required(self) -> bool:
        """Whether a key is asked for."""
        return bool(self._known)

    def owner(self, authorization: str | None) -> Tenant | None:
        """Whose key an `Authorization` header has; None: nobody's."""
        scheme, _, key = (authorization or "").partition(" ")
        digest, found = _digest(key), None
        for known, tenant in self._known:
            if secrets.compare_digest(digest, known):
                found = tenant
        return found if scheme.lower() == "bearer" else None


def load_tenants(path: Path) -> list[TenantSettings]:
    """Read `tenants.yaml`.

    Raises:
        ValueError: Not YAML, an unknown key, or a value out of range; the message names it.
    """
    try:
        content = yaml.safe_load(read_text(path))
        return TenantsFile.model_validate(content).tenants
    except yaml.YAMLError as error:
        raise ValueError(f"{str(path)!r} is not YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        raise ValueError(f"{str(path)!r} is no list of tenants: {problems(error)}") from error


def make_key() -> tuple[str, str]:
    """A new key, and its hash."""
    key = KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)
    return key, key_hash(key)


def key_hash(key: str) -> str:
    """The hash of a key, as `tenants.yaml` has it.

    Raises:
        ValueError: It is too short to be kept as a plain hash, or no word.
    """
    if len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(
            f"a key is one word of at least {SHORTEST_KEY} characters, drawn at random: let "
            "`deltamux key` make one"
        )
    return HASH_PREFIX + _digest(key).hex()


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _tenant(settings: TenantSettings) -> Tenant:
    limits = Limits(settings.requests_per_minute, settings.tokens_per_minute, settings.concurrency)
    experts = None if settings.experts is None else frozenset(settings.experts)
    return Tenant(settings.name, experts, settings.admin, limits)
