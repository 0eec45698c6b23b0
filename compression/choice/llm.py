"""A language model as the operator of the evolutionary search, after Self-Pruner (arXiv 2502.14413).

Any server with the OpenAI API will do. It is sent the layer rates and losses of two parents, nothing
of the model or its data, and asked for the rates of one offspring. Whatever it answers, the search
goes on: an unusable answer or a failing network is replaced by the offspring of `blend`.
"""

import http.client
import json
import logging
import math
import random
import re
import urllib.request
from dataclasses import dataclass, field

from deltamux.compression.choice.evolution import Candidate, blend

LARGEST_RATE = 10.0
# A dead server would otherwise cost a timeout for every offspring.
FAILURES_BEFORE_GIVING_UP = 3
LARGEST_ANSWER_BYTES = 1 << 20

logger = logging.getLogger("deltamux.allocate")


@dataclass
class LlmOperator:
    """Asks a chat model for offspring; pass it to `evolution.evolve` as `operator`.

    With an endpoint that samples, two searches need not end alike. After three failures of the network
    in a row the endpoint is not asked again.

    Attributes:
        base_url: Of the API, for instance http://127.0.0.1:8000/v1.
        model: Its name there.
        api_key: Sent as bearer token if given.
        timeout_seconds: For connecting and for every read.
        proposals: Offspring asked of this operator so far.
        fallbacks: How many of them `blend` had to make.
    """

    base_url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    timeout_seconds: float = 30
    proposals: int = field(default=0, init=False)
    fallbacks: int = field(default=0, init=False)
    _failures_in_row: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(
                f"'base_url' must be an http or https address, got {self.base_url!r}: give for "
                "instance 'http://127.0.0.1:8000/v1'"
            )

    def __call__(self, mother: Candidate, father: Candidate, chance: random.Random) -> list[float]:
        """One rate per layer, from the model if it gives usable ones, else from `blend`."""
        self.proposals += 1
        if self._failures_in_row < FAILURES_BEFORE_GIVING_UP:
            try:
                return _read_rates(self._ask(prompt(mother, father)), len(mother.rates))
            except (OSError, http.client.HTTPException) as error:
                self._failures_in_row += 1
                logger.warning("cannot ask %r at %s: %s", self.model, self.base_url, error)
            except (LookupError, TypeError, ValueError, RecursionError) as error:
                logger.info("the answer of %r is of no use: %s", self.model, error)
        self.fallbacks += 1
        return blend(mother, father, chance)

    def _ask(self, question: str) -> str:
        body = {"model": self.model, "messages": [{"role": "user", "content": question}]}
        headers = {"Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        address = self.base_url.rstrip("/") + "/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=self.timeout_seconds) as response:
            answer = response.read(LARGEST_ANSWER_BYTES)
        self._failures_in_row = 0
        return str(json.loads(answer)["choices"][0]["message"]["content"])


def prompt(mother: Candidate, father: Candidate) -> str:
    """What the model is asked."""
    count = len(mother.rates)
    parents = "\n".join(
        f"loss {parent.loss:.6g}: {json.dumps([round(rate, 3) for rate in parent.rates])}"
        for parent in (mother, father)
    )
    return (
        f"The weights of a language model with {count} decoder layers are compressed. A candidate "
        f"is a list of {count} relative bit rates, first layer first, with mean 1; a lower loss is "
        f"better. Two candidates:\n{parents}\n"
        "Cross them over and mutate the result into one new candidate that you expect to have a "
        f"lower loss. Answer with nothing but a JSON list of {count} numbers from 0 to "
        f"{LARGEST_RATE:g}."
    )


def _read_rates(answer: str, count: int) -> list[float]:
    lists = re.findall(r"\[[^\[\]]*\]", answer)
    if not lists:
        raise ValueError("it holds no JSON list")
    # A model that thinks aloud gives its answer last.
    rates = json.loads(lists[-1])
    if len(rates) != count:
        raise ValueError(f"it must have {count} rates, got {len(rates)}")
    if not all(type(rate) in (int, float) and 0 <= rate <= LARGEST_RATE for rate in rates):
        raise ValueError(f"its rates must be numbers from 0 to {LARGEST_RATE:g}, got {rates}")
    if not math.fsum(rates) > 0:
        raise ValueError("its rates must not all be 0")
    return [float(rate) for rate in rates]
