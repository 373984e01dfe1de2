"""The noise that an adapter bears is what it is said to be, for every kind of model and input."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from silotune.client.operations import adapter_noise
from silotune.client.operations.adapter_noise import public_inputs, tolerated_noise
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
def mean_cosine(model: Adapted, inputs: object, names: list[str], deviation: float) -> float:
    """Over other draws of the noise than those by which it was found, text by text."""
    start, rng = model.initial_arrays(), np.random.default_rng(99)
    model.load(start)
    encoded = model.encode(inputs)  # type: ignore[arg-type]

    def features() -> torch.Tensor:
        found = []
        for row in range(len(encoded)):
            own = model.features(encoded, torch.tensor([row]), adapter=True)[0].float()
            found.append(own[: int(encoded.lengths(torch.tensor([row])))] if own.dim() > 1 else own)
        return torch.cat([f.reshape(-1, f.shape[-1]) for f in found])

    clean, cosines = features(), []
    for _ in range(8):
        noise = {
            n: (a + deviation * rng.standard_normal(a.shape) if n in names else a).astype("f4")
            for n, a in start.items()
        }
        model.load(noise)
        cosines.append(float(torch.cosine_similarity(clean, features(), dim=-1).mean()))
    return float(np.mean(cosines))


@pytest.mark.parametrize(("kind", "of"), KINDS)
@pytest.mark.parametrize("cosine", [0.7, 0.9])
def test_the_noise_leaves_the_cosine(kind: str, of: str, cosine: float) -> None:
    contract, model = model_of(kind, of)
    inputs, plan = public_inputs(contract, model), contract.round_plan(contract.rounds)
    before = {n: a.copy() for n, a in model.initial_arrays().items()}
    found = tolerated_noise(model, inputs, plan.trains, cosine=cosine)
    after = {n: p.numpy(force=True) for n, p in model.named_tensors().items()}
    assert all(np.array_equal(before[n], after[n]) for n in before)  # nothing of it stays
    names = [n for n in trained_names(before, plan.trains) if not n.startswith("head.")]
    assert found < adapter_noise.MOST
    assert mean_cosine(model, inputs, names, found) == pytest.approx(cosine, abs=0.15)


def test_less_is_borne_by_more_layers() -> None:
    """The inputs are the contract's alone: the same twice, and no file is read."""
    found = []
    for layers in (1, 2):
        folder = tiny.folder_of("bert")
        contract = tiny.contract_of("classification", "bert", folder)
        adapter = contract.model_dump(mode="json", exclude_none=True)["adapter"]
        contract = contract.changed(adapter=adapter | {"layers": layers})
        model = Encoder(contract, folder, EXACT)
        inputs = public_inputs(contract, model)
        assert inputs == public_inputs(contract, model)
        assert len(set(map(len, (text.split() for text in inputs)))) > 2  # several lengths
        found.append(tolerated_noise(model, inputs, contract.round_plan(2).trains))
    assert found[1] < found[0]
