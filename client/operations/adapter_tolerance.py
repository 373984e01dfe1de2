"""How much noise, and how large a step, an adapter bears: measured on the model with public inputs.

Noise is known before any record is read, and so is what it does to a model: Gaussian noise in an
adapter turns the features of every text. Where it turns them to a cosine of COSINE of what they
were, most of a feature is left for the head to read; at twice that noise little is.
The same is asked of one round's step: were all clipped gradients alike and in the direction that
moves the features most, they would keep that cosine. Longer steps overshoot whatever is learnt,
however little noise there is. common/planning/adapter_rule.py makes rates of both. No record is
used.

Shapes: n inputs, T tokens, F features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import optimize
from torch import Tensor

from silotune.common.contract.contract import Contract
from silotune.common.contract.inputs import PairInput, TableInput
from silotune.common.contract.schedule import TensorGroups
from silotune.common.contract.task import Language
from silotune.common.data import featurize
from silotune.common.data.records import Inputs
from silotune.common.models.adapted import Adapted
from silotune.common.models.base import Encoded
from silotune.common.protocol.messages import Arrays
from silotune.common.protocol.tensors import trained_names

COSINE = 0.6
INPUTS = 24
# Draws of the noise, whose effects are averaged: as many as have DRAWN entries together.
DRAWN, LEAST_DRAWS, MOST_DRAWS = 1 << 13, 2, 8
LEAST, MOST = 1e-6, 1e3  # of a standard deviation, and of a step
ACCURACY = 0.01  # of their logarithms
ITERATIONS = 8  # of the power method, after which the features' movement grew by less than 2 %
SMALL = 1e-2  # the norm of a movement that counts as a derivative's


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


@dataclass(frozen=True)
class AdapterTolerance:
    """What an adapter bears.

    Attributes:
        noise: The standard deviation of independent Gaussian noise on every trained entry at which
            the mean cosine between an input's features with and without it is the one asked for;
            MOST where no noise turns the features so far.
        step: The L2 norm of a movement of the adapter, in the direction that moves the features
            most, at which the mean cosine is that; MOST likewise.
    """

    noise: float
    step: float


def adapter_tolerance(
    model: Adapted, inputs: Inputs, groups: TensorGroups, *, cosine: float = COSINE
) -> AdapterTolerance:
    """The noise and the step that an adapter bears.

    Args:
        model: With its adapter; the adapter's tensors are overwritten.
        inputs: Public ones (`public_inputs`).
        groups: What the round trains (common/contract/schedule.py); the head is left out.
        cosine: The mean cosine between an input's features with and without a movement of the
            adapter at which the movement is the largest that is borne.

    Returns:
        Both, to 1 % where the cosine falls as they grow.
    """
    with model.lock:
        start = model.initial_arrays()
        trained = sorted(set(trained_names(start, groups)) - {n for n in start if "head." in n})
        model.load(start)
        encoded = model.encode(inputs)
        features = _FeaturesOf(model, encoded, {name: start[name] for name in trained})
        generator = np.random.default_rng(0)
        entries = sum(start[name].size for name in trained)
        draws = [
            {n: generator.standard_normal(start[n].shape, dtype=np.float32) for n in trained}
            for _ in range(min(max(-(-DRAWN // entries), LEAST_DRAWS), MOST_DRAWS))
        ]
        strongest = _strongest_direction(features, draws[0])
        found = AdapterTolerance(
            noise=_largest(features, draws, cosine),
            step=_largest(features, [strongest, _scaled(strongest, -1)], cosine),
        )
        model.load(start)
        return found


class _FeaturesOf:
    """The features of public inputs, at norm 1, as a function of the adapter's movement from its
    start: one less a mean cosine is then half their mean squared movement."""

    def __init__(self, model: Adapted, encoded: Encoded, start: Arrays) -> None:
        self.model, self.encoded, self.start = model, encoded, start
        model.load(start)
        self.at_start = self._found(grad=False)

    def moved(self, direction: Arrays, by: float) -> Tensor:
        """The features [n, F] after a movement."""
        self.model.load(
            {n: (a + by * direction[n]).astype(np.float32) for n, a in self.start.items()}
        )
        return self._found(grad=False)

    def gradient(self, of: Tensor) -> Arrays:
        """The gradient at the start of the features' inner product with `of` [n, F]."""
        self.model.load(self.start)
        tensors = self.model.named_tensors()
        parameters = [tensors[name] for name in self.start]
        with self.model.requiring(self.start):
            found = torch.autograd.grad((self._found(grad=True) * of).sum(), parameters)
        return {name: g.numpy(force=True) for name, g in zip(self.start, found, strict=True)}

    def _found(self, *, grad: bool) -> Tensor:
        """What the head reads of each input, or of each of its tokens, at norm 1: [n, F]."""
        found, model, encoded = [], self.model, self.encoded
        with torch.set_grad_enabled(grad):
            for index, n in model.micro_batches(encoded, torch.arange(len(encoded)), adapter=True):
                features = model.features(encoded, index, adapter=True)[:n].float()
                if features.dim() == 3:
                    lengths = encoded.lengths(index[:n])
                    there = torch.arange(features.shape[1])[None, :] < lengths[:, None]
                    features = features[there.to(features.device)]
                found.append(features)
        return torch.nn.functional.normalize(torch.cat(found), dim=-1)


def _strongest_direction(features: _FeaturesOf, begin: Arrays) -> Arrays:
    """The unit movement of the adapter that moves the features most near its start: the first
    right singular vector of their Jacobian, by the power method."""
    direction = begin
    for _ in range(ITERATIONS):
        direction = _scaled(direction, 1 / _norm(direction))
        change = features.moved(direction, SMALL) - features.moved(direction, -SMALL)
        direction = features.gradient(change / (2 * SMALL))
    return _scaled(direction, 1 / _norm(direction))


def _largest(features: _FeaturesOf, directions: Sequence[Arrays], cosine: float) -> float:
    """The largest movement that keeps a mean cosine, in the mean over directions."""

    def kept(by: float) -> float:
        moved = torch.stack([features.moved(direction, by) for direction in directions])
        return float((moved * features.at_start).sum(dim=-1).mean())

    if kept(MOST) > cosine:
        return MOST
    found = optimize.brentq(
        lambda log: kept(math.exp(log)) - cosine, math.log(LEAST), math.log(MOST), xtol=ACCURACY
    )
    return math.exp(found)


def _scaled(direction: Arrays, by: float) -> Arrays:
    return {name: by * array for name, array in direction.items()}


def _norm(direction: Arrays) -> float:
    return math.sqrt(sum(float((array**2).sum()) for array in direction.values()))
