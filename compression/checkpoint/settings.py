"""What stands beside an expert's weights and is used in serving it: one schema for all of it.

| file | what is read |
|---|---|
| `generation_config.json` | sampling defaults, the tokens that end an answer |
| `config.json` | the tokens that end an answer |
| `tokenizer_config.json` | the token that ends an answer, the chat template |
| `chat_template.jinja` | the chat template; it wins over the one above |

An answer ends at any of the tokens that the three files name. Whatever else a file says is left alone. A value that no
request could be answered with is refused here, by file and key, before the first request meets it: 20.0 is 20, "20" is
no number, and a token has to be in the vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from deltamux.compression.files import MIB, read_json, read_text
from deltamux.compression.names import CONFIG_FILE
from deltamux.compression.validation import problems

GENERATION_FILE = "generation_config.json"
TOKENIZER_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
# Chosen, not measured: templates have some kilobytes, and models a handful of tokens that end an answer.
MOST_TEMPLATE_BYTES = MIB
MOST_STOP_IDS = 128
LARGEST_CONSTANT = 1_000_000
# Of a token's id, where the vocabulary is not known.
LARGEST_ID = 2**31 - 1

Settings = TypeVar("Settings", bound=BaseModel)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"must be a whole number, got {_shown(value)}")
    if value != int(value):
        raise ValueError(f"must be a whole number, got {value}")
    return int(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"must be a number, got {_shown(value)}")
    return float(value)


def _several(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


Whole = Annotated[int, BeforeValidator(_whole)]
Number = Annotated[float, BeforeValidator(_number)]
TokenId = Annotated[Whole, Field(ge=0, le=LARGEST_ID)]
TokenIds = Annotated[list[TokenId], BeforeValidator(_several), Field(max_length=MOST_STOP_IDS)]


class _Read(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class TextSettings(_Read):
    """What is read of `text_config` in `config.json`."""

    eos_token_id: TokenIds | None = None


class ModelSettings(_Read):
    """What is read of `config.json`; a model of text and images has its own configuration of text."""

    eos_token_id: TokenIds | None = None
    text_config: TextSettings | None = None

    @property
    def stop_ids(self) -> list[int]:
        """The tokens that end an answer."""
        inner = self.text_config.eos_token_id if self.text_config else None
        return [*(self.eos_token_id or []), *(inner or [])]


class GenerationSettings(_Read):
    """What is read of `generation_config.json`; ranges are those of vLLM's sampling parameters."""

    eos_token_id: TokenIds | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    top_k: Annotated[Whole, Field(ge=-1, le=LARGEST_ID)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    max_new_tokens: Annotated[Whole, Field(ge=1)] | None = None


class Token(_Read):
    """A token as an object."""

    content: str


class NamedTemplate(_Read):
    """One of several templates."""

    name: str
    template: str


class TokenizerSettings(_Read):
    """What is read of `tokenizer_config.json`."""

    eos_token: str | Token | None = None
    chat_template: str | list[NamedTemplate] | None = None
    added_tokens_decoder: dict[str, Token] = {}

    @property
    def template(self) -> str | None:
        """The chat template; of several, the default one."""
        if isinstance(self.chat_template, list):
            found = {each.name: each.template for each in self.chat_template}
            return found.get("default")
        return self.chat_template

    def stop_id(self, token_id: Callable[[str], int | None]) -> int | None:
        """The id of the token that ends an answer: as the file has it, or as a tokenizer does."""
        token = self.eos_token.content if isinstance(self.eos_token, Token) else self.eos_token
        if token is None:
            return None
        for identity, added in self.added_tokens_decoder.items():
            if added.content == token and identity.isdecimal():
                return int(identity)
        return token_id(token)


@dataclass(frozen=True)
class SideSettings:
    """What is used of an expert besides its weights.

    Attributes:
        sampling: Its sampling defaults, by their names in `generation_config.json`.
        stop_ids: Tokens that end an answer, those of `generation_config.json` first.
        template: Its own chat template, None where it has none.
    """

    sampling: dict[str, Any]
    stop_ids: list[int]
    template: str | None


def read_side_settings(
    root: Path,
    vocabulary: int | None = None,
    token_id: Callable[[str], int | None] = lambda _: None,
) -> SideSettings:
    """Read and check what stands beside an expert's weights.

    Args:
        root: Its directory.
        vocabulary: Tokens that the served model has; None: not known.
        token_id: The served tokenizer's id of a token, None where it has no such token.

    Raises:
        ValueError: A value cannot be used; the message names file and key.
    """
    generation = _read(root / GENERATION_FILE, GenerationSettings)
    tokenizer = _read(root / TOKENIZER_FILE, TokenizerSettings)
    ends = {
        GENERATION_FILE: generation.eos_token_id,
        CONFIG_FILE: _read(root / CONFIG_FILE, ModelSettings).stop_ids,
        TOKENIZER_FILE: [tokenizer.stop_id(token_id)],
    }
    stop_ids: list[int] = []
    for name, found in ends.items():
        ids = [each for each in found or [] if each is not None]
        if vocabulary is not None and ids and max(ids) >= vocabulary:
            raise ValueError(
                f"{str(root / name)!r}: the token {max(ids)} that ends an answer is not below the "
                f"vocabulary of {vocabulary}: correct the file"
            )
        stop_ids += ids
    sampling = generation.model_dump(exclude_none=True, exclude={"eos_token_id"})
    return SideSettings(sampling, list(dict.fromkeys(stop_ids)), own_template(root))


def own_template(root: Path) -> str | None:
    """The chat template of a checkpoint or artifact, its syntax checked; None where it has none.

    Raises:
        ValueError: The file that it is in is damaged, or its syntax is.
    """
    path = root / TEMPLATE_FILE
    if path.exists():
        template: str | None = read_text(path, MOST_TEMPLATE_BYTES)
    else:
        path = root / TOKENIZER_FILE
        template = _read(path, TokenizerSettings).template
    if template is not None:
        check_template(path, template)
    return template


def check_template(path: Path, template: str) -> None:
    """Parse the chat template of a file; nothing of it is run.

    Raises:
        ValueError: It is too long, its syntax is wrong, or it names a filter or test that there is none of.
    """
    from jinja2 import TemplateSyntaxError, nodes
    from transformers.utils.chat_template_utils import _compile_jinja_template

    def refusal(finding: str) -> ValueError:
        return ValueError(f"{str(path)!r}: chat template: {finding}: correct it")

    if len(template) > MOST_TEMPLATE_BYTES:
        raise refusal(f"it has {len(template):,} characters, {MOST_TEMPLATE_BYTES:,} are read")
    environment = _compile_jinja_template("").environment
    try:
        parsed = environment.parse(template)
    except TemplateSyntaxError as error:
        raise refusal(f"line {error.lineno}: {error.message}") from error
    except RecursionError as error:
        raise refusal("it is nested too deep") from error
    endless = _endless(parsed)
    if endless:
        raise refusal(endless)
    for kind, names in ((nodes.Filter, environment.filters), (nodes.Test, environment.tests)):
        for node in parsed.find_all(kind):
            if node.name not in names:
                what = kind.__name__.lower()
                raise refusal(f"line {node.lineno}: there is no {what} {node.name!r}")


def _endless(parsed: Any) -> str | None:
    """What of a parsed template Jinja would compute for ever when it compiles it: constants."""
    from jinja2 import nodes

    if any(parsed.find_all(nodes.Pow)):
        return "it has a power, which takes any time to compute"
    for product in parsed.find_all(nodes.Mul):
        values = [each.value for each in product.find_all(nodes.Const)]
        largest = max((each for each in values if isinstance(each, int)), default=0)
        constant = not any(product.find_all(nodes.Name))
        if constant and (any(product.find_all(nodes.Mul)) or largest > LARGEST_CONSTANT):
            return f"line {product.lineno}: it has a product that is too large to compute"
    return None


def _read(path: Path, schema: type[Settings]) -> Settings:
    """A file by its schema; one that is not there says nothing."""
    if not path.exists() and not path.is_symlink():
        return schema()
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} is no JSON object: save it again")
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        raise ValueError(f"{str(path)!r} cannot be used: {problems(error)}") from error
