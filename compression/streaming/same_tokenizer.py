"""Whether an expert's tokenizer reads text as the base's does, which the server reads all text with.

Files are no measure: libraries write the same tokenizer in different ways. Compared is what a tokenizer is: its
vocabulary, its merges in their order, its added tokens with the way they take the spaces around them, and the steps in
front of the model (normalizer, pre-tokenizer), which two releases may spell differently, so that there text decides.
"""

import json
from collections.abc import Iterator
from typing import Any

# Texts that normalizers and pre-tokenizers are known to differ on: spaces, line ends, digits, case, accents in one
# and in two characters, ligatures, scripts without spaces, emoji, code, marks.
PROBES = (
    "The quick brown fox",
    " leading, trailing ",
    "two  spaces\n\nand\tlines\r\n",
    "1234567 3.14 1,000",
    "CamelCase UPPER don't we'll",
    "caf\u00e9 cafe\u0301 \ufb01ne \uff21 stra\u00dfe \u0130",
    "\u6f22\u5b57\u304b\u306a \ud55c\uae00 \u0627\u0644\u0639 \u0939\u093f\u0928",
    "\U0001f469\u200d\U0001f680 \u2026 \u201cquoted\u201d \u00a0x",
    "def f(x):\n    return x ** 2  # ok",
    "<|im_start|>user\n[INST] <s> </s> <think>",
)
# What of an added token decides how text around it is read.
SURROUNDINGS = ("lstrip", "rstrip", "single_word")


def tokenizer_difference(served: Any, own: Any) -> str | None:
    """The first thing that an expert's tokenizer reads differently than the base's; None: nothing.

    Args:
        served: The base's tokenizer, as transformers loads it.
        own: The expert's.
    """
    return next(_differences(served, own), None)


def smaller_differences(served: Any, own: Any) -> list[str]:
    """What two tokenizers that read an expert's own text alike differ in all the same, a line each."""
    ours, theirs = served.get_vocab(), own.get_vocab()
    found = []
    alone = sorted(ours.keys() - theirs.keys(), key=lambda token: ours[token])
    if alone:
        found.append(
            f"token {alone[0]!r} is the base's alone ({len(alone):,} are): the server reads text "
            "that holds it as that token"
        )
    if own.pad_token is not None and own.pad_token not in ours:
        found.append(f"token {own.pad_token!r} of the expert is for padding, and never read")
    return found


def _differences(served: Any, own: Any) -> Iterator[str]:
    ours, theirs = served.get_vocab(), own.get_vocab()
    # An expert that pads with a token of its own never reads it.
    unread = {own.pad_token} if own.pad_token not in ours else set()
    yield from _vocabulary(ours, {name: n for name, n in theirs.items() if name not in unread})
    before, after = _parts(served), _parts(own)
    if before is None or after is None:
        yield from _texts(served, own, "a piece of text")
        return
    yield from _added_tokens(before, after)
    yield from _merges(before, after)
    for step in ("normalizer", "pre_tokenizer"):
        if before.get(step) != after.get(step):
            yield from _texts(served, own, f"the {step}")
    yield from _texts(served, own, "a piece of text")


def _vocabulary(ours: dict[str, int], theirs: dict[str, int]) -> Iterator[str]:
    """Of tokens that are other ones; those that only the base has are in no text of the expert's."""
    differing = [token for token in theirs if ours.get(token) != theirs[token]]
    if differing:
        token = min(differing, key=lambda each: theirs[each])
        here = f"is {ours[token]}" if token in ours else "is missing"
        yield (
            f"token {token!r} is {theirs[token]} in the expert's tokenizer and {here} in the base's "
            f"({len(differing):,} tokens differ)"
        )


def _added_tokens(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    ours = {token["content"]: token for token in before["added_tokens"]}
    for token in after["added_tokens"]:
        other = ours.get(token["content"], token)
        changed = [key for key in SURROUNDINGS if token[key] != other[key]]
        if changed:
            yield (
                f"token {token['content']!r} has {changed[0]} {token[changed[0]]} in the expert's "
                f"tokenizer and {other[changed[0]]} in the base's"
            )


def _merges(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    ours, theirs = (_merge_list(each) for each in (before, after))
    if ours == theirs:
        return
    pairs = enumerate(zip(ours, theirs, strict=False))
    place = next((index for index, (one, other) in pairs if one != other), None)
    place = min(len(ours), len(theirs)) if place is None else place
    one, other = (merges[place] if place < len(merges) else None for merges in (ours, theirs))
    yield f"merge {place} is {other} in the expert's tokenizer and {one} in the base's"


def _merge_list(parts: dict[str, Any]) -> list[tuple[str, ...]]:
    """Merges as pairs; files have them as pairs or as text with a space between."""
    merges = parts["model"].get("merges") or []
    return [tuple(each.split(" ")) if isinstance(each, str) else tuple(each) for each in merges]


def _texts(served: Any, own: Any, what: str) -> Iterator[str]:
    for text in PROBES:
        ours, theirs = (each(text, add_special_tokens=False)["input_ids"] for each in (served, own))
        if ours != theirs:
            yield (
                f"{what} differs: {text!r} is {len(theirs)} tokens in the expert's tokenizer, "
                f"{len(ours)} in the base's, and not the same ones"
            )


def _parts(tokenizer: Any) -> dict[str, Any] | None:
    """What a tokenizer is made of, as its library writes it; None for one of another library."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        return None
    parts: dict[str, Any] = json.loads(backend.to_str())
    return parts
