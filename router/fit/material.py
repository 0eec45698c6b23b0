"""What a fit works on: domains and their experts, the base's tokenizer, examples as token ids."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from deltamux.router.decide.config import EXPERT_NAME, FALLBACK_DOMAINS, TAKEN_NAMES
from deltamux.router.decide.decision import BASE_NAME
from deltamux.router.decide.encoder import SentenceEncoder, join
from deltamux.router.decide.features import Ids, bounded_ids
from deltamux.router.decide.tables import Mask
from deltamux.router.decide.tokenizer import build_encode, read_tokenizer
from deltamux.router.fit.augment import Example, augment
from deltamux.router.fit.base_directory import resolve_base
from deltamux.router.fit.classifier import Examples
from deltamux.router.fit.crossval import Kinship, context_groups
from deltamux.router.fit.data import Dataset, Prompt
from deltamux.router.fit.design import Design, build_design
from deltamux.router.fit.embedding import EmbeddingRows, find_embedding
from deltamux.router.fit.options import Options

# Fewest different prompts of a domain.
MIN_PROMPTS: Final = 5
# Prompts of one domain that are fitted on; more cost time and change little.
MAX_PROMPTS: Final = 1000
# The same where a sentence encoder has to read them.
MAX_ENCODED: Final = 700
# Domain that is added where the user's prompts have none that the base answers.
IMPLICIT_DOMAIN: Final = "general"


@dataclass(frozen=True)
class Material:
    """What a fit works on; N examples, of which the first `num_labelled` are the user's.

    Attributes:
        experts: Domain to expert, sorted; None for domains that the base answers.
        tokenizer: Bytes of the base's `tokenizer.json`.
        vocab_size: At least the embedding's rows and every token id.
        embedding: The base's input embedding; None where the base has no weights.
        examples: Labelled prompts, then what was added.
        numbers: Their labels and weights.
        kinship: Which of them must stay together.
        ids: Bounded token ids of each example.
        num_labelled: Labelled prompts that are fitted on.
    """

    experts: dict[str, str | None]
    tokenizer: bytes
    vocab_size: int
    embedding: EmbeddingRows | None
    examples: list[Example]
    numbers: Examples
    kinship: Kinship
    ids: list[Ids]
    num_labelled: int

    @property
    def labels(self) -> list[str]:
        """Domains in the order of the scores."""
        return list(self.experts)

    @property
    def specialists(self) -> Mask:
        """Bool [D], True where a domain has an expert."""
        return np.array([expert is not None for expert in self.experts.values()], dtype=np.bool_)


def prepare(dataset: Dataset, base: str, options: Options, *, encoded: bool) -> Material:
    """Read the base, choose and add examples, tokenize.

    Args:
        dataset: Labelled prompts.
        base: Directory or hub id.
        options: Names, descriptions, seed.
        encoded: Whether a sentence encoder will read every example.

    Raises:
        FileNotFoundError: The base has no tokenizer.
        ValueError: The data or the names cannot make a router.
    """
    experts = assign_experts(dataset, options)
    directory = resolve_base(base)
    tokenizer = read_tokenizer(directory)
    embedding = find_embedding(directory)
    encode, vocab_size = build_encode(tokenizer)
    vocab_size = max(vocab_size, embedding.num_rows if embedding else 0)
    limit = MAX_ENCODED if encoded else MAX_PROMPTS
    prompts = _subset(dataset, limit, options.seed)
    examples = augment(prompts, experts, options.descriptions, options.seed)
    ids = [
        bounded_ids([encode(turn) for turn in example.prompt.turns], vocab_size)
        for example in examples
    ]
    return Material(
        experts=experts,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        embedding=embedding,
        examples=examples,
        numbers=_numbers(examples, list(experts)),
        kinship=_kinship(examples, prompts),
        ids=ids,
        num_labelled=len(prompts),
    )


def design_of(material: Material, encoder: SentenceEncoder | None) -> Design:
    """Return the features of all examples; with an encoder it reads every turn."""
    sentences = None
    if encoder is not None:
        prompts = [example.prompt for example in material.examples]
        sentences = np.stack([join([encoder.vector(turn) for turn in p.turns]) for p in prompts])
    return build_design(
        material.ids,
        material.vocab_size,
        material.num_labelled,
        embedding=material.embedding,
        sentences=sentences,
    )


def assign_experts(dataset: Dataset, options: Options) -> dict[str, str | None]:
    """Give every domain of the data its expert, sorted by domain.

    Raises:
        ValueError: The data or the names cannot make a router.
    """
    counts = Counter(prompt.domain for prompt in dataset.prompts)
    if len(counts) < 2:
        raise ValueError(f"a router needs prompts of two domains or more, got {sorted(counts)}")
    for domain, count in counts.items():
        if count < MIN_PROMPTS:
            raise ValueError(
                f"domain {domain!r} has {count} different prompts; {MIN_PROMPTS} are the least that "
                "can be cross-validated, 16 a start, and 64 a sensible number"
            )
    for names in (options.experts, options.descriptions, options.minimums):
        if unknown := set(names) - set(counts):
            raise ValueError(
                f"no prompts of the domains {sorted(unknown)}; known: {sorted(counts)}"
            )
    mapping = _map(counts, options.experts)
    if not any(mapping.values()):
        raise ValueError(f"no domain of {sorted(counts)} has an expert; name one: DOMAIN=EXPERT")
    if all(mapping.values()) and IMPLICIT_DOMAIN not in mapping:
        # Everything that is no expert's needs a place, and deltamux has prompts for it.
        mapping = dict(sorted({**mapping, IMPLICIT_DOMAIN: None}.items()))
    return mapping


def _map(counts: Mapping[str, int], experts: Mapping[str, str]) -> dict[str, str | None]:
    """Domain to expert, sorted by domain."""
    mapping: dict[str, str | None] = {}
    for domain in sorted(counts):
        fallback = domain.casefold() in FALLBACK_DOMAINS
        expert = experts.get(domain, BASE_NAME if fallback else domain)
        mapping[domain] = None if expert == BASE_NAME else _checked(expert, domain)
    return mapping


def _checked(expert: str, domain: str) -> str:
    """An expert's name, as a server can serve it.

    Raises:
        ValueError: No server can.
    """
    if expert.casefold() in TAKEN_NAMES:
        problem = "means something else to a server"
    elif not re.fullmatch(EXPERT_NAME, expert):
        problem = "is not up to 64 letters, digits, '.', '_' and '-'"
    else:
        return expert
    raise ValueError(
        f"no expert can be called {expert!r}: it {problem}; name the expert of the domain "
        f"{domain!r}: --expert '{domain}=NAME', or '{domain}=base' for none"
    )


def _subset(dataset: Dataset, limit: int, seed: int) -> list[Prompt]:
    """The pinned prompts and at most `limit` others of each domain, in their order."""
    pinned, prompts = dataset.prompts[: dataset.pinned], dataset.prompts[dataset.pinned :]
    rng = np.random.default_rng(seed)
    domains = np.array([prompt.domain for prompt in prompts])
    kept = [
        rng.permutation(np.flatnonzero(domains == domain))[:limit] for domain in np.unique(domains)
    ]
    return pinned + [prompts[index] for index in np.sort(np.concatenate([[], *kept])).astype(int)]


def _numbers(examples: Sequence[Example], labels: Sequence[str]) -> Examples:
    """Labels and weights of examples."""
    return Examples(
        truth=np.array([labels.index(e.prompt.domain) for e in examples], dtype=np.int64),
        weights=np.array([example.weight for example in examples]),
        meaning=np.array([example.meaning for example in examples]),
        num_domains=len(labels),
    )


def _kinship(examples: Sequence[Example], prompts: Sequence[Prompt]) -> Kinship:
    """Contexts of examples; generated prompts of one field are one, others each their own."""
    origins = np.array([example.origin for example in examples], dtype=np.int64)
    groups = context_groups(prompts)
    keys = [e.field or f"\0{e.origin}" for e in examples if e.generated]
    numbers = {key: int(groups.max()) + 1 + place for place, key in enumerate(dict.fromkeys(keys))}
    own = np.array([numbers[key] for key in keys], dtype=np.int64)
    return Kinship(origins, np.concatenate([groups, own]))
