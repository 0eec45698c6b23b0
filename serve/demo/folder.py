"""Where the demo keeps what it makes, and what can be read there."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltamux.compression.artifact.artifact import Artifact
from deltamux.compression.checkpoint.checkpoint import open_checkpoint
from deltamux.serve.demo import data

DOMAINS = data.SPECIALISTS
GENERAL = "general"
SEED = 0


@dataclass(frozen=True)
class DemoFolder:
    """Where the demo keeps what it makes."""

    root: Path

    @property
    def base(self) -> Path:
        """The base checkpoint."""
        return self.root / "base"

    @property
    def router(self) -> Path:
        """The router."""
        return self.root / "router"

    @property
    def config(self) -> Path:
        """The server's configuration."""
        return self.root / "deltamux.yaml"

    def data(self, domain: str, split: str) -> Path:
        """Generated text of a domain."""
        return self.root / "data" / domain / f"{split}.jsonl"

    def expert(self, domain: str) -> Path:
        """A tuned checkpoint."""
        return self.root / "experts" / domain

    def compressed(self, domain: str) -> Path:
        """A compressed expert."""
        return self.root / "compressed" / domain


def expert_figures(folder: DemoFolder, domain: str) -> dict[str, Any]:
    """Sizes and quality of a compressed expert."""
    artifact = Artifact(folder.compressed(domain))
    return {
        "bits_per_weight": artifact.manifest.totals.bits_per_weight,
        "bytes": artifact.total_bytes(),
        "bytes_full": open_checkpoint(folder.expert(domain)).total_bytes(),
        "gain_kept": verification(folder, domain)["gain_kept"],
    }


def verification(folder: DemoFolder, domain: str) -> dict[str, float]:
    """What the compressor measured on held-out text."""
    found = Artifact(folder.compressed(domain)).manifest.verification
    assert found is not None
    return found


def rows(path: Path) -> list[dict[str, str]]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def router_accuracy(folder: DemoFolder) -> float:
    """Share of held-out prompts of all domains that reach their expert (or, of none, the base)."""
    from deltamux.router.decide.router import Router
    from deltamux.router.decide.tokenizer import load_tokenizer

    router, encode = Router.load(folder.router), load_tokenizer(folder.router)
    right = total = 0
    for domain in (*DOMAINS, GENERAL):
        for row in rows(folder.data(domain, "test")):
            decision = router.decide([row["prompt"]], encode)
            right += decision.expert == (None if domain == GENERAL else domain)
            total += 1
    return right / total
