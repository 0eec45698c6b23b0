"""Domains in an unlabelled log: clusters of like prompts, shown for people to name.

k-means on unit vectors (spherical k-means, Dhillon and Modha 2001): the sentence encoder's where it is
installed, else TF-IDF of words reduced by a singular value decomposition. The number of clusters is
the one with the best mean silhouette (Rousseeuw 1987) unless it is given.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from deltamux.router.decide.encoder import join, load_encoder
from deltamux.router.decide.tables import Floats

# Numbers of clusters that are tried. Chosen, not measured.
TRIED: Final = tuple(range(2, 13))
# Prompts that are clustered; of more, as many are drawn.
MAX_PROMPTS: Final = 3000
MIN_PROMPTS: Final = 20
NUM_WORDS: Final = 6
NUM_EXAMPLES: Final = 5
_SVD_WIDTH: Final = 100


@dataclass(frozen=True)
class Cluster:
    """Like prompts: what they are about, the most central ones, and all of them."""

    words: list[str]
    examples: list[str]
    prompts: list[tuple[str, ...]]


def suggest(
    prompts: Sequence[tuple[str, ...]], count: int | None = None, seed: int = 0
) -> list[Cluster]:
    """Cluster prompts, largest cluster first.

    Args:
        prompts: The user's turns of each, without duplicates.
        count: Number of clusters; None: chosen.
        seed: Of draws.

    Raises:
        ValueError: There are too few prompts, or scikit-learn is missing.
    """
    if len(prompts) < MIN_PROMPTS or (count is not None and not 2 <= count < len(prompts)):
        raise ValueError(
            f"{len(prompts)} different prompts cannot be clustered so; {MIN_PROMPTS} are the least, "
            "and from 2 clusters on"
        )
    rng = np.random.default_rng(seed)
    chosen = [prompts[i] for i in np.sort(rng.permutation(len(prompts))[:MAX_PROMPTS])]
    vectors = _vectors(chosen, seed)
    model = _clustered(vectors, count, seed)
    words = _words([" ".join(turns) for turns in chosen], model.labels_)
    clusters = []
    for number, center in enumerate(model.cluster_centers_):
        inside = np.flatnonzero(model.labels_ == number)
        central = inside[np.argsort(-(vectors[inside] @ center))]
        clusters.append(
            Cluster(
                words=words[number],
                examples=[chosen[i][-1] for i in central[:NUM_EXAMPLES]],
                prompts=[chosen[i] for i in central],
            )
        )
    return sorted(clusters, key=lambda cluster: -len(cluster.prompts))


def _clustered(vectors: Floats, count: int | None, seed: int) -> Any:
    """The fitted k-means, of the given number of clusters or of the best one."""
    try:
        from sklearn.cluster import KMeans
        from sklearn.metrics import silhouette_score
    except ImportError as error:
        raise ValueError(
            "clustering needs scikit-learn; run: pip install 'deltamux[router]'"
        ) from error
    best: tuple[float, Any] = (-2.0, None)
    for number in (count,) if count else [k for k in TRIED if k < len(vectors) / 4]:
        found = KMeans(number, n_init=4, random_state=seed).fit(vectors)
        score = float(silhouette_score(vectors, found.labels_, sample_size=1000, random_state=seed))
        best = max(best, (score, found), key=lambda pair: pair[0])
    return best[1]


def _vectors(prompts: Sequence[tuple[str, ...]], seed: int) -> Floats:
    """Unit vectors, float32 [N, K]."""
    try:
        encoder = load_encoder()
    except ValueError:
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.preprocessing import normalize

        counts = TfidfVectorizer(sublinear_tf=True, stop_words="english")
        table = counts.fit_transform([" ".join(turns) for turns in prompts])
        width = min(_SVD_WIDTH, table.shape[1] - 1, len(prompts) - 1)
        reduced = TruncatedSVD(width, random_state=seed).fit_transform(table)
        return np.asarray(normalize(reduced), dtype=np.float32)
    return np.stack([join([encoder.vector(turn) for turn in turns]) for turns in prompts])


def _words(texts: Sequence[str], labels: Any) -> list[list[str]]:
    """Words of each cluster that most of its prompts hold and most others do not."""
    from sklearn.feature_extraction.text import CountVectorizer

    counter = CountVectorizer(binary=True, stop_words="english", token_pattern=r"[A-Za-z]{3,}")
    table = counter.fit_transform(texts)
    names = counter.get_feature_names_out()
    everywhere = np.asarray(table.mean(axis=0)).ravel()
    found = []
    for number in range(int(labels.max()) + 1):
        inside = np.asarray(table[labels == number].mean(axis=0)).ravel()
        lift = inside * np.log((inside + 1e-3) / (everywhere + 1e-3))
        found.append([str(names[i]) for i in np.argsort(-lift)[:NUM_WORDS]])
    return found
