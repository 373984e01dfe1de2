"""The noise and the step that an adapter bears are what they are said to be, for every kind of
model and input."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from silotune.client.operations.adapter_tolerance import (
    MOST,
    adapter_tolerance,
    public_inputs,
)
from silotune.common.contract.compute import Performance
from silotune.common.contract.contract import Contract
from silotune.common.models.adapted import Adapted
from silotune.common.models.causal_lm import LanguageModel
from silotune.common.models.encoder import Encoder
from silotune.common.protocol.tensors import trained_names
from tests import tiny

EXACT = Performance(bf16="off", device="cpu", micro_batch=8)
KINDS = [
    ("classification", "bert"),
    ("classification", "llama"),
    ("tokens", "bert"),
    ("bi", "bert"),
    ("cross", "bert"),
    ("language", "llama"),
]


def model_of(kind: str, of: str) -> tuple[Contract, Adapted]:
    folder = tiny.folder_of(of)
    contract = tiny.contract_of(kind, of, folder)
    network = LanguageModel if kind == "language" else Encoder
    return contract, network(contract, folder, EXACT)


@torch.no_grad()
def mean_cosine(model: Adapted, inputs: object, moves: list[dict[str, np.ndarray]]) -> float:
    """Between the features with and without each of the moves, text by text."""
    start = model.initial_arrays()
    model.load(start)
    encoded = model.encode(inputs)  # type: ignore[arg-type]

    def features() -> torch.Tensor:
        found = []
        for row in range(len(encoded)):
            own = model.features(encoded, torch.tensor([row]), adapter=True)[0].float()
            found.append(own[: int(encoded.lengths(torch.tensor([row])))] if own.dim() > 1 else own)
        return torch.cat([f.reshape(-1, f.shape[-1]) for f in found])

    clean, cosines = features(), []
    for move in moves:
        model.load({n: (a + move.get(n, 0)).astype("f4") for n, a in start.items()})
        cosines.append(float(torch.cosine_similarity(clean, features(), dim=-1).mean()))
    return float(np.mean(cosines))


@pytest.mark.parametrize(("kind", "of"), KINDS)
@pytest.mark.parametrize("cosine", [0.7, 0.9])
def test_the_noise_leaves_the_cosine(kind: str, of: str, cosine: float) -> None:
    contract, model = model_of(kind, of)
    inputs, plan = public_inputs(contract, model, n=8), contract.round_plan(contract.rounds)
    before = {n: a.copy() for n, a in model.initial_arrays().items()}
    found = adapter_tolerance(model, inputs, plan.trains, cosine=cosine)
    after = {n: p.numpy(force=True) for n, p in model.named_tensors().items()}
    assert all(np.array_equal(before[n], after[n]) for n in before)  # nothing of it stays
    names = [n for n in trained_names(before, plan.trains) if not n.startswith("head.")]
    assert found.noise < MOST
    rng = np.random.default_rng(99)  # other draws than those by which it was found
    moves = [
        {n: found.noise * rng.standard_normal(before[n].shape) for n in names} for _ in range(8)
    ]
    assert mean_cosine(model, inputs, moves) == pytest.approx(cosine, abs=0.15)


@pytest.mark.parametrize(("kind", "of"), KINDS)
def test_no_other_direction_moves_the_features_as_much_as_the_step(kind: str, of: str) -> None:
    """Small steps, where the features are linear in the adapter: random directions of the step's
    norm, and the direction of each feature's own gradient."""
    contract, model = model_of(kind, of)
    inputs, plan = public_inputs(contract, model, n=8), contract.round_plan(contract.rounds)
    found = adapter_tolerance(model, inputs, plan.trains, cosine=0.99)
    start = model.initial_arrays()
    names = [n for n in trained_names(start, plan.trains) if not n.startswith("head.")]
    model.load(start)
    encoded, tensors = model.encode(inputs), model.named_tensors()
    index = torch.arange(len(encoded))
    moves, rng = [], np.random.default_rng(3)
    for feature in range(4):
        with model.requiring(names):
            features = model.features(encoded, index, adapter=True).float()
            of = features.reshape(-1, features.shape[-1])[:, feature].sum()
            grads = torch.autograd.grad(of, [tensors[name] for name in names])
        moves.append(dict(zip(names, (g.numpy() for g in grads), strict=True)))
    moves += [{n: rng.standard_normal(start[n].shape) for n in names} for _ in range(4)]
    for move in moves:
        norm = np.sqrt(sum((a**2).sum() for a in move.values()))
        scaled = {n: found.step / norm * a for n, a in move.items()}
        assert mean_cosine(model, inputs, [scaled]) > 0.985


def test_less_is_borne_by_more_layers() -> None:
    """The inputs are the contract's alone: the same twice, and no file is read."""
    found = []
    for layers in (1, 2):
        folder = tiny.folder_of("bert")
        contract = tiny.contract_of("classification", "bert", folder)
        adapter = contract.model_dump(mode="json", exclude_none=True)["adapter"]
        contract = contract.changed(adapter=adapter | {"layers": layers})
        model = Encoder(contract, folder, EXACT)
        inputs = public_inputs(contract, model, n=8)
        assert inputs == public_inputs(contract, model, n=8)
        assert len(set(map(len, (text.split() for text in inputs)))) > 2  # several lengths
        found.append(adapter_tolerance(model, inputs, contract.round_plan(2).trains))
    assert found[1].noise < found[0].noise
    assert found[1].step < found[0].step
