"""vLLM's handlers, speaking for one expert."""

import copy
from typing import Any

from deltamux.serve.api.expert import Expert

# What vLLM reads from a generation_config.json.
GENERATION_KEYS = (
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "max_new_tokens",
)


def specialise(handler: Any, expert: Expert) -> Any:
    """A shallow copy of a vLLM handler that speaks for one expert.

    vLLM keeps template and sampling defaults on the handler, one set for the whole server; a copy
    shares everything else.
    """
    variant = copy.copy(handler)
    if getattr(handler.model_config, "generation_config", "auto") == "auto":
        override = getattr(handler.model_config, "override_generation_config", None) or {}
        variant.default_sampling_params = sampling_defaults(expert.sampling | override)
    if expert.chat_template and getattr(handler, "online_renderer", None) is not None:
        variant.online_renderer = copy.copy(handler.online_renderer)
        variant.online_renderer.chat_template = expert.chat_template
        variant.chat_template = expert.chat_template
    return variant


def sampling_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """The sampling parameters in a generation_config.json, under vLLM's names."""
    found = {key: config[key] for key in GENERATION_KEYS if config.get(key) is not None}
    if "max_new_tokens" in found:
        found["max_tokens"] = found.pop("max_new_tokens")
    return found
