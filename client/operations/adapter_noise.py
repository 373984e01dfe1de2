"""How much noise an adapter bears: measured on the model itself, with public inputs.

Noise is known before any record is read, and so is what it does to a model: Gaussian noise in an
adapter turns the features of every text. Where it turns them to a cosine of COSINE of what they
were, about half of a feature is left for the head to read; at twice that noise almost nothing is.
A learning rate that leaves so much noise in the released adapter is the largest that is of use
(common/planning/adapter_rule.py), whatever is to be learnt. No record is used.

Shapes: n inputs, T tokens, F features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from silotune.common.contract.contract import Contract
from silotune.common.contract.inputs import PairInput, TableInput
from silotune.common.contract.schedule import TensorGroups
from silotune.common.contract.task import Language
from silotune.common.data import featurize
from silotune.common.data.records import Inputs
from silotune.common.models.adapted import Adapted
from silotune.common.models.base import Encoded
from silotune.common.protocol.tensors import trained_names

COSINE = 0.5
INPUTS = 24
# Draws of the noise, whose effects are averaged: as many as have DRAWN entries together.
DRAWN, LEAST_DRAWS, MOST_DRAWS = 1 << 14, 2, 16
LEAST, MOST = 1e-6, 1e3  # of a standard deviation
STEPS = 12  # of the bisection, each on half of what is left of the logarithm


def public_inputs(contract: Contract, model: Adapted, n: int = INPUTS) -> Inputs:
    """Inputs that are made of the contract and the model's vocabulary alone.

    Args:
        contract: What the inputs must fit.
        model: Whose vocabulary free text is drawn from, where the contract lists no sentences.
        n: How many.

    Returns:
        Rows drawn from a table's schema, the sentences of `model.standardise`, or random words of
        4 tokens up to `model.max_tokens`; for a pair two of them.
    """
    if isinstance(contract.input, TableInput):
        return featurize.synthetic(contract.input, n, seed=0)
    spec = getattr(contract.model, "standardise", None)
    texts = list(spec.sentences[:n]) if spec else []
    if not texts:
        longest = max(4, min(model.max_tokens // 2, 64))
        lengths = [4 + (longest - 4) * i // max(n - 1, 1) for i in range(n)]
        ids, mask = model.backbone.made_up(lengths, longest)
        tokenizer = model.backbone.tokenizer
        texts = [tokenizer.decode(row[own]) for row, own in zip(ids, mask, strict=True)]
    if isinstance(contract.task, Language) or isinstance(contract.input, PairInput):
        return list(zip(texts, texts[1:] + texts[:1], strict=True))
    return texts


@torch.no_grad()
def tolerated_noise(
    model: Adapted, inputs: Inputs, groups: TensorGroups, *, cosine: float = COSINE
) -> float:
    """The standard deviation of noise that an adapter bears.

    Args:
        model: With its adapter; the adapter's tensors are overwritten.
        inputs: Public ones (`public_inputs`).
        groups: What the round trains (common/contract/schedule.py); the head is left out.
        cosine: The mean cosine between an input's features with and without noise at which the
            noise is the largest that is borne.

    Returns:
        The standard deviation of independent Gaussian noise on every trained entry of the adapter
        at which the mean cosine is `cosine`, to 1 % where the cosine falls with the noise. MOST
        where no noise turns the features so far.
    """
    with model.lock:
        start = model.initial_arrays()
        trained = sorted(set(trained_names(start, groups)) - {n for n in start if "head." in n})
        model.load(start)
        encoded = model.encode(inputs)
        clean = _features(model, encoded)
        generator = np.random.default_rng(0)
        entries = sum(start[name].size for name in trained)
        draws = [
            {name: generator.standard_normal(start[name].shape) for name in trained}
            for _ in range(min(max(-(-DRAWN // entries), LEAST_DRAWS), MOST_DRAWS))
        ]

        def kept(deviation: float) -> float:
            found = []
            for draw in draws:
                model.load(_noised(start, draw, deviation))
                noisy = _features(model, encoded)
                found.append(float(torch.cosine_similarity(clean, noisy, dim=-1).mean()))
            return sum(found) / len(found)

        low, high = LEAST, MOST
        if kept(high) > cosine:
            return MOST
        for _ in range(STEPS):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if kept(middle) > cosine else (low, middle)
        model.load(start)
        return math.sqrt(low * high)


def _noised(
    start: Mapping[str, np.ndarray], draw: Mapping[str, np.ndarray], deviation: float
) -> dict[str, np.ndarray]:
    return {
        name: (array + deviation * draw[name] if name in draw else array).astype(np.float32)
        for name, array in start.items()
    }


def _features(model: Adapted, encoded: Encoded) -> Tensor:
    """What the head reads of each input, or of each of its tokens: [n, F]."""
    found = []
    for index, n in model.micro_batches(encoded, torch.arange(len(encoded)), adapter=True):
        features = model.features(encoded, index, adapter=True)[:n].float()
        if features.dim() == 3:
            lengths = encoded.lengths(index[:n])
            there = torch.arange(features.shape[1])[None, :] < lengths[:, None]
            features = features[there.to(features.device)]
        found.append(features)
    return torch.cat(found)
