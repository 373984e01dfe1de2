"""LoRA's two factors at the server: products of them, and what is lost between products.

An adapted Linear adds B A (times a constant) to a frozen weight. Sites that both change average as
mean(B) mean(A), which is not mean(B A); the functions here say by how much, and keep what is exact.
Pure functions on named float32 arrays, float64 inside; of what the sites have made private, so
they cost no privacy (post-processing).

A sum of products is kept as one product X Y of the factors beside one another, and with X = Q R and
Y^T = P S everything about X Y is in R S^T, which is small: but for FedEx-LoRA's no [out, in] is
made.

Shapes: A [r, in], B [out, r]; r rank; X [out, m], Y [m, in], m the ranks of all that is added.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from silotune.common.protocol.messages import Arrays

Matrix = NDArray[np.float64]
Product = tuple[Matrix, Matrix]  # X, Y
A, B, RESIDUAL = ".lora_A", ".lora_B", ".residual"


def pairs(arrays: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """The names of A and B of each adapted Linear."""
    for name in sorted(arrays):
        if name.endswith(A):
            yield name, name.removesuffix(A) + B


def residual(
    adapter: Arrays, updates: Mapping[str, Arrays], weights: Mapping[str, float]
) -> float | None:
    """||mean(B_i A_i) - mean(B_i) mean(A_i)||_F over all adapted Linears, as a share of
    ||mean(B_i A_i) - B A||_F, the round's whole step: what averaging the factors apart makes wrong.
    None where there is no LoRA or nothing of it moved.

    It is 0 where all sites have one factor in common (FFA, FedSVD, RoLoRA): the mean is linear in
    the other.
    """
    lost = step = 0.0
    trained = {name for change in updates.values() for name in change}
    for a, b in pairs(adapter):
        if not trained & {a, b}:
            continue
        mean = _mean_product(adapter, updates, weights, a, b)
        apart = tuple(_mean(adapter, updates, weights, name) for name in (b, a))
        before = (adapter[b].astype(np.float64), adapter[a].astype(np.float64))
        lost += _norm(_minus(mean, apart)) ** 2
        step += _norm(_minus(mean, before)) ** 2
    return (lost / step) ** 0.5 if step > 0 else None


def refactorise(adapter: Arrays, *carried: Arrays) -> list[Arrays]:
    """FedSVD (arXiv 2505.12805): B A = U S V^T with orthonormal V; the new A is V^T, the new B U S.
    The product stays what it is. Returns the adapter and `carried`: what else is in its coordinates
    (a velocity, a mean of iterates) turned with it. A B of zeros says nothing and is left as it is.

    With A = L Q, Q of orthonormal rows, B L = U S W^T; so V^T = W^T Q, and what was B is B L W.
    Where A is orthonormal from the beginning, L W is a rotation: then nothing that does not look at
    single coordinates can tell FedSVD from FFA, for a gradient's norm, the noise and the mean are
    the same in turned coordinates (tests/server/aggregation/test_lora.py).
    """
    found = [dict(arrays) for arrays in (adapter, *carried)]
    for a, b in pairs(adapter):
        old, low = adapter[b].astype(np.float64), adapter[a].astype(np.float64)
        if not old.any():
            continue
        q, r = np.linalg.qr(low.T)
        w = np.linalg.svd(old @ r.T, full_matrices=len(old) < len(low))[2].T
        for arrays in found:
            if a in arrays:
                arrays[a] = (w.T @ q.T).astype(np.float32)
            if b in arrays:
                arrays[b] = (arrays[b].astype(np.float64) @ (r.T @ w)).astype(np.float32)
    return found


def flex_change(
    adapter: Arrays, updates: Mapping[str, Arrays], weights: Mapping[str, float], mean: Arrays
) -> Arrays:
    """FlexLoRA (arXiv 2402.11505; what a site of lower rank is not sent counts, in its product, as
    it was): the next A and B are those of the mean of
    the products, the nearest of their rank (Eckart and Young 1936), A with orthonormal rows. `mean`
    is the plain mean change, of which what is no factor is kept. Returns the change that leads
    there."""
    change = dict(mean)
    for a, b in pairs(adapter):
        if a in mean:
            x, y = _mean_product(adapter, updates, weights, a, b)
            (q, r), (p, s) = np.linalg.qr(x), np.linalg.qr(y.T)
            u, d, v = np.linalg.svd(r @ s.T)
            rank = len(adapter[a])
            change[a] = (v[:rank] @ p.T - adapter[a]).astype(np.float32)
            change[b] = (q @ u[:, :rank] * d[:rank] - adapter[b]).astype(np.float32)
    return change


def exact_change(
    adapter: Arrays,
    updates: Mapping[str, Arrays],
    weights: Mapping[str, float],
    mean: Arrays,
    scale: float,
) -> Arrays:
    """FedEx-LoRA (arXiv 2410.09432): A and B go to their means, and `residual`, which is added to
    the frozen weight, takes up scale (mean(B_i A_i) - mean(B_i) mean(A_i)). scale: what the model
    multiplies B A by. Returns the change, `mean` with the residuals'."""
    change = dict(mean)
    for a, b in pairs(adapter):
        if a in mean:
            product = _mean_product(adapter, updates, weights, a, b)
            apart = tuple(_mean(adapter, updates, weights, name) for name in (b, a))
            x, y = _minus(product, apart)
            change[a.removesuffix(A) + RESIDUAL] = (scale * (x @ y)).astype(np.float32)
    return change


def _moved(adapter: Arrays, change: Arrays, name: str) -> Matrix:
    """A factor after one site's round; what it does not train stays."""
    before = adapter[name].astype(np.float64)
    return before + change[name] if name in change else before


def _mean(
    adapter: Arrays, updates: Mapping[str, Arrays], weights: Mapping[str, float], name: str
) -> Matrix:
    total = sum(weights[site] for site in updates)
    parts = [weights[s] / total * _moved(adapter, updates[s], name) for s in sorted(updates)]
    return np.asarray(np.sum(parts, axis=0))


def _mean_product(
    adapter: Arrays, updates: Mapping[str, Arrays], weights: Mapping[str, float], a: str, b: str
) -> Product:
    """mean(B_i A_i) over the sites in `updates`."""
    total = sum(weights[site] for site in updates)
    sites = sorted(updates)
    return (
        np.hstack([weights[s] / total * _moved(adapter, updates[s], b) for s in sites]),
        np.vstack([_moved(adapter, updates[s], a) for s in sites]),
    )


def _minus(one: Sequence[Matrix], other: Sequence[Matrix]) -> Product:
    return np.hstack([one[0], -other[0]]), np.vstack([one[1], other[1]])


def _norm(product: Product) -> float:
    """||X Y||_F"""
    x, y = product
    return float(np.linalg.norm(np.linalg.qr(x)[1] @ np.linalg.qr(y.T)[1].T))
