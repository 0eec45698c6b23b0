"""What may go into an artifact: ladders of rungs for the linears, and the weights that leave no choice.

A choice is evaluated in memory: the weights that it stands for are decoded from the rungs as a reader would decode
them from the file, layer by layer as the model runs.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch

from deltamux.compression.artifact.matrices import Coded, Factored
from deltamux.compression.artifact.merge import expert_weights
from deltamux.compression.artifact.stored import Encoded, LinearDelta, Stored
from deltamux.compression.choice.problem import Choice
from deltamux.compression.choice.task import Task
from deltamux.compression.choice.workspace import Ladder, Workspace
from deltamux.compression.evaluate import Evaluation
from deltamux.compression.streaming.forward import WeightSource

# What the steps of linears are multiplied with, by name.
Stretches = Mapping[str, float]


@dataclass(frozen=True)
class Candidates:
    """All artifacts that a task may end in.

    Attributes:
        task: What is compressed.
        work: Where the rungs are.
        ladders: The linears that changed.
        fixed: The weights that leave no choice.
    """

    task: Task
    work: Workspace
    ladders: list[Ladder]
    fixed: list[Encoded]
    _divergences: dict[tuple[tuple[int, ...], float], float] = field(default_factory=dict)

    def encoded(self, choice: Choice, stretches: Stretches | None = None) -> Iterator[Encoded]:
        """The weights of a choice as they go into the file.

        Args:
            choice: A rung for every ladder: 0 stands for no delta, i for the i-th entry.
            stretches: What steps are multiplied with, by the linear's name.
        """
        yield from self.fixed
        for ladder, rung in zip(self.ladders, choice, strict=True):
            if rung:
                yield self._rung(ladder, rung, (stretches or {}).get(ladder.name, 1.0))

    def weights(self, choice: Choice, stretches: Stretches | None = None) -> WeightSource:
        """The decompressed expert of a choice, as it would be read back from the file."""
        chosen = self._chosen(choice)

        def stored(name: str) -> Stored | None:
            if name not in chosen:
                return self._fixed.get(name)
            return self._rung(*chosen[name], (stretches or {}).get(name, 1.0)).stored()

        return expert_weights(self.task.difference.base, stored)

    def smooth_weights(self, choice: Choice, stretches: Stretches) -> WeightSource:
        """The same with steps that are not rounded to what is stored, for slopes."""
        chosen, base = self._chosen(choice), self.task.difference.base
        plain = self.weights(choice)

        def load(name: str) -> torch.Tensor:
            if name not in chosen or name not in stretches:
                return plain(name)
            return self.linear(choice, name).dense(base.load(name), stretches[name])

        return load

    def linear(self, choice: Choice, name: str) -> LinearDelta:
        """What a choice keeps of a linear."""
        found = self._rung(*self._chosen(choice)[name], 1.0).stored()
        assert isinstance(found, Coded | Factored)
        return found

    def changed(self, choice: Choice) -> list[str]:
        """The linears that a choice keeps something of."""
        return list(self._chosen(choice))

    def compared(self, choice: Choice, stretches: Stretches | None = None) -> Evaluation:
        """The comparison with the expert on the held-out text."""
        assert self.task.reference is not None
        return self.task.reference.compare(self.weights(choice, stretches))

    def divergence(self, choice: Choice, stretch: float) -> float:
        """The KL on the trial text, with one stretch for all deltas; measured once for each."""
        key = tuple(choice), stretch
        if key not in self._divergences:
            assert self.task.trial is not None
            source = self.weights(choice, self.evenly(stretch))
            self._divergences[key] = self.task.trial.divergence(source)
        return self._divergences[key]

    def evenly(self, stretch: float) -> dict[str, float]:
        """One stretch for every linear."""
        return {ladder.name: stretch for ladder in self.ladders}

    @cached_property
    def _fixed(self) -> dict[str, Stored]:
        return {weight.entry.name: weight.stored() for weight in self.fixed}

    def _chosen(self, choice: Choice) -> dict[str, tuple[Ladder, int]]:
        pairs = zip(self.ladders, choice, strict=True)
        return {ladder.name: (ladder, rung) for ladder, rung in pairs if rung}

    def _rung(self, ladder: Ladder, rung: int, stretch: float) -> Encoded:
        return self.work.rung(ladder, rung - 1).scaled(stretch)
