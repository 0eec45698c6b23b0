"""Short replies that belong to no domain: "why?", "continue", "looks good, thanks".

On its own such a turn says nothing about its subject, yet a classifier that never saw one finds a
specialist for it: "go ahead" resembles a command. They are added to the training prompts of the
non-specialist domain, so that a follow-up leaves the conversation where it is.
"""

from typing import Final

_PLAIN: Final = (
    "why",
    "why not",
    "how so",
    "how come",
    "really",
    "are you sure",
    "is that right",
    "is that all",
    "what do you mean",
    "what does that mean",
    "what else",
    "what next",
    "and then",
    "and the second one",
    "can you explain",
    "can you explain that again",
    "can you say more",
    "can you make it shorter",
    "can you give an example",
    "could you check that again",
    "could you try another way",
)
_STATED: Final = (
    "continue",
    "go on",
    "go ahead",
    "keep going",
    "next",
    "more",
    "more details please",
    "explain",
    "explain step by step",
    "shorter please",
    "in simple words please",
    "try again",
    "do it again",
    "do the same for the other one",
    "please fix it",
    "fix that please",
    "that is wrong",
    "that does not look right",
    "this is not what i asked for",
    "i do not understand",
    "you did not answer my question",
    "yes",
    "yes please",
    "no",
    "no thanks",
    "ok",
    "okay, do it",
    "sure",
    "sounds good",
    "looks good, thanks",
    "looks good, commit it",
    "looks good, send it",
    "great, thank you",
    "thanks",
    "thanks, that works",
    "that worked",
    "perfect",
    "good, now the next step",
    "the first one",
    "use the second option",
    "never mind",
    "stop",
    "start over",
    "hello",
    "good morning",
    "bye",
)


def followups() -> list[str]:
    """Return every phrase as it is typed in haste and as it is written with care."""
    questions = [form for text in _PLAIN for form in (text, _sentence(text, "?"))]
    statements = [form for text in _STATED for form in (text, _sentence(text, "."))]
    return questions + statements


def _sentence(text: str, end: str) -> str:
    """Capitalise and punctuate."""
    return text[0].upper() + text[1:] + end
