"""Robust means: a few malicious sites have limited effect. They need single updates: no masks.

An update here is a site's whole change as one vector. All rules count every site once, whatever
its weight in the contract, for a weight is what an attacker would ask for. They act on what is
already private (post-processing). None tells an attack from a site that is merely unlike others.

Shapes: k sites, D entries.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from silotune.common.contract.aggregation import Robust
from silotune.common.protocol.messages import Arrays

Vectors = NDArray[np.float64]


def combined(updates: Mapping[str, Arrays], settings: Robust) -> Arrays:
    """The change that a rule makes of the sites' changes. ValueError for fewer than the rule needs
    (the contract's quorum sees to it)."""
    sites = sorted(updates)
    names = sorted(updates[sites[0]])
    vectors = np.stack(
        [np.concatenate([updates[site][name].ravel() for name in names]) for site in sites]
    ).astype(np.float64)
    vector, change, at = _rule(vectors, settings), Arrays(), 0
    for name in names:
        shape = updates[sites[0]][name].shape
        size = int(np.prod(shape))
        change[name] = vector[at : at + size].reshape(shape).astype(np.float32)
        at += size
    return change


def _rule(vectors: Vectors, settings: Robust) -> NDArray[np.float64]:
    f = settings.byzantine
    if settings.rule == "median":
        return np.asarray(np.median(vectors, axis=0))
    if settings.rule == "trimmed-mean":
        return trimmed_mean(vectors, f)
    if settings.rule == "norm":
        assert settings.max_norm is not None
        return np.asarray(cut(vectors, settings.max_norm).mean(axis=0))
    scores = krum_scores(vectors, f)
    best = np.argsort(scores, kind="stable")
    kept = best[: 1 if settings.rule == "krum" else len(vectors) - f]
    return np.asarray(vectors[kept].mean(axis=0))


def krum_scores(vectors: Vectors, f: int) -> NDArray[np.float64]:
    """[k], the sum of the squared distances to the k - f - 2 nearest others (Blanchard, El Mhamdi,
    Guerraoui and Stainer 2017, section 4). Krum takes the update of least score, multi-Krum the
    mean of the k - f of least. ValueError unless k >= 2 f + 3."""
    k = len(vectors)
    if k < 2 * f + 3:
        raise ValueError(f"Krum against {f} sites needs {2 * f + 3} updates, there are {k}")
    # One at a time: all differences at once would be k times as large as the updates.
    apart = np.stack([((vectors - own) ** 2).sum(axis=1) for own in vectors])
    np.fill_diagonal(apart, np.inf)
    return np.asarray(np.sort(apart, axis=1)[:, : k - f - 2].sum(axis=1))


def trimmed_mean(vectors: Vectors, f: int) -> NDArray[np.float64]:
    """Entry by entry the mean without the f largest and the f smallest (Yin, Chen, Ramchandran and
    Bartlett 2018, Definition 2). ValueError unless k > 2 f."""
    if len(vectors) <= 2 * f:
        raise ValueError(f"a mean of {len(vectors)} without {f} at each end is none")
    return np.asarray(np.sort(vectors, axis=0)[f : len(vectors) - f].mean(axis=0))


def cut(vectors: Vectors, most: float) -> Vectors:
    """Each update, made shorter where its L2 norm is beyond `most` (Sun, Kairouz, Suresh and
    McMahan 2019)."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    shorter: Vectors = vectors * np.minimum(1.0, most / np.maximum(norms, 1e-300))
    return shorter
