"""Prometheus metrics of the router: drift against the fit, and the shadow router's agreement.

Drift compares the last decisions with what cross-validation saw when the router was fitted: the mix
of domains, the share left to the base, the mean confidence. A window of decisions is kept, not a
decaying average, so that the figures mean the same at every request rate.
"""

from collections import Counter as Counts
from collections import deque
from collections.abc import Iterable
from typing import Any, Final

from prometheus_client import Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import REGISTRY, Collector

from deltamux.router.decide.config import RouterConfig
from deltamux.router.decide.decision import REASON_ABSTAIN, Decision

# Decisions that the drift figures are of. Chosen, not measured: a share of 1 % is ten of them.
WINDOW: Final = 1000

shadow_total = Counter(
    "deltamux_router_shadow",
    "Requests that a shadow router decided too, by whether it chose the same expert.",
    ["agree"],
)
shadow_seconds = Histogram(
    "deltamux_router_shadow_seconds",
    "Time of a shadow decision.",
    buckets=(1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 1),
)
token_source = Counter(
    "deltamux_router_token_source",
    "Routed requests by where their token ids came from: the request itself, or tokenization.",
    ["source"],
)
reloads_total = Counter("deltamux_router_reloads", "Reloads of the router.", ["result"])


class Drift:
    """The last decisions of one router against the figures of its fit.

    Args:
        config: The router's.
    """

    def __init__(self, config: RouterConfig) -> None:
        self._config = config
        self._window: deque[Decision] = deque(maxlen=WINDOW)

    def observe(self, decision: Decision) -> None:
        """Count a decision."""
        self._window.append(decision)

    def figures(self) -> dict[str, Any]:
        """The figures of the window.

        Returns:
            `decisions`; `mix` and `fit_mix`, domain to share; `mix_distance`, half the sum of the
            differences of the two (total variation, 0 to 1); `abstained`, `fit_abstained`,
            `confidence`, `fit_confidence`. The window's figures are None while it is empty.
        """
        seen = list(self._window)
        config, count = self._config, len(seen)
        fit_mix = {label: config.training.mix.get(label, 0.0) for label in config.labels}
        figures: dict[str, Any] = {
            "decisions": count,
            "fit_mix": fit_mix,
            "fit_abstained": config.heldout.abstained,
            "fit_confidence": config.heldout.confidence,
            "mix": None,
            "mix_distance": None,
            "abstained": None,
            "confidence": None,
        }
        if count:
            domains = Counts(decision.domain for decision in seen)
            mix = {label: domains[label] / count for label in config.labels}
            away = sum(abs(mix[label] - fit_mix[label]) for label in config.labels)
            figures["mix"], figures["mix_distance"] = mix, away / 2
            left = sum(decision.reason == REASON_ABSTAIN for decision in seen)
            figures["abstained"] = left / count
            figures["confidence"] = sum(decision.confidence for decision in seen) / count
        return figures


class DriftCollector(Collector):
    """Exports the current router's drift; made once, told of every new router."""

    def __init__(self) -> None:
        self.drift: Drift | None = None

    def describe(self) -> list[Any]:
        """Nothing: `collect` must not run when the collector is registered."""
        return []

    def collect(self) -> Iterable[Any]:
        """All families that the window has figures for."""
        figures = self.drift.figures() if self.drift else {}
        single = {
            "mix_distance": (
                "mix_distance",
                "Total variation between the mixes of domains of window and fit.",
            ),
            "abstention_ratio": ("abstained", "Share of the window left to the base."),
            "fit_abstention_ratio": (
                "fit_abstained",
                "Share of the held-out prompts of the fit left to the base.",
            ),
            "mean_confidence": ("confidence", "Mean confidence of the window."),
            "fit_mean_confidence": ("fit_confidence", "Mean confidence on held-out prompts."),
        }
        for metric, (name, text) in single.items():
            if figures.get(name) is not None:
                yield GaugeMetricFamily(f"deltamux_router_{metric}", text, figures[name])
        by_domain = {
            "domain_ratio": ("mix", "Share of a domain in the window."),
            "fit_domain_ratio": ("fit_mix", "Share of a domain in the prompts of the fit."),
        }
        for metric, (name, text) in by_domain.items():
            if figures.get(name) is not None:
                family = GaugeMetricFamily(f"deltamux_router_{metric}", text, labels=["domain"])
                for domain, share in figures[name].items():
                    family.add_metric([domain], share)
                yield family


collector = DriftCollector()
REGISTRY.register(collector)
