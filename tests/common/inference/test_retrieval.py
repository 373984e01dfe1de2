"""The index gives each pair the score that the network gives it, and finds the best."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import save_file

from silotune.common.cli.adapter import adapter
from silotune.common.errors import DataError, UsageError
from silotune.common.inference import retrieval
from silotune.common.inference.retrieval import Index
from silotune.common.models import factory as models
from silotune.common.tasks.calibration import Calibration
from tests import tiny

ITEMS = [
    "pain in the chest",
    "burn left arm",
    "no pain today",
    "right arm",
    "pain",
    "the burn",
]
QUERIES = ["chest pain", "arm", "today"]


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_scores_are_the_networks_own_and_the_order_is_theirs(kind: str) -> None:
    folder = tiny.folder_of(kind)
    contract = tiny.contract_of("bi", kind)
    model = models.build(contract, folder)
    arrays = tiny.moved(model)
    index = Index(contract, model, arrays)
    index.read(ITEMS)
    found = index.search(QUERIES, 4)
    pairs = [(query, item) for query in QUERIES for item in ITEMS]
    with model.lock:
        model.load(arrays)
        encoded = model.encode(pairs)
        outputs = model.predict(encoded, torch.zeros(len(pairs)), adapter=True)
    scores = np.array(outputs)[:, 0].reshape(len(QUERIES), len(ITEMS))
    for row, best in zip(scores, found, strict=True):
        assert [f.item for f in best] == list(np.argsort(-row))[:4]
        assert [f.score for f in best] == pytest.approx(np.sort(row)[::-1][:4], abs=1e-5)


def test_more_than_there_are_and_equal_ones(tmp_path: Path) -> None:
    contract = tiny.contract_of("bi", "bert")
    model = models.build(contract, tiny.folder_of("bert"))
    index = Index(contract, model, tiny.moved(model))
    index.read(["pain", "arm", "pain"])
    (found,) = index.search(["chest"], 10)
    assert len(found) == 3
    places = [f.item for f in found]
    assert places.index(0) < places.index(2)


def test_a_kept_index_is_taken_only_if_nothing_it_was_made_from_is_other(tmp_path: Path) -> None:
    contract = tiny.contract_of("bi", "bert")
    model = models.build(contract, tiny.folder_of("bert"))
    arrays, file = tiny.moved(model), tmp_path / "items.safetensors"
    index = Index(contract, model, arrays)
    assert not index.read(ITEMS, file)
    first = index.search(QUERIES, 3)
    again = Index(contract, model, arrays)
    assert again.read(ITEMS, file)
    assert again.search(QUERIES, 3) == first
    assert not again.read(ITEMS[:-1], file)
    assert not Index(contract, model, tiny.moved(model, seed=1)).read(ITEMS[:-1], file)
    other = contract.changed(name="another")
    assert not Index(other, model, tiny.moved(model, seed=1)).read(ITEMS[:-1], file)
    for foreign in (file.read_bytes()[:40], b"text,user\n"):
        file.write_bytes(foreign)
        with pytest.raises(UsageError, match="is no index of items"):
            again.read(ITEMS, file)
        assert file.read_bytes() == foreign  # nobody's file is written over
    save_file({"items": np.zeros((2, 3), np.float32)}, file)
    with pytest.raises(UsageError, match="is no index"):
        again.read(ITEMS, file)
    with pytest.raises(UsageError, match="is no index"):
        again.read(ITEMS, tmp_path)
    with pytest.raises(DataError, match="no item"):
        again.read([])


def test_texts_that_are_read_together_have_no_index() -> None:
    with pytest.raises(UsageError, match=r'input\.by = "bi"'):
        retrieval.check_contract(tiny.contract_of("cross", "bert"))


def test_the_command_ranks_each_text_once(tmp_path: Path) -> None:
    contract, folder = tiny.contract_of("bi", "bert"), tiny.folder_of("bert")
    model = models.build(contract, folder)
    run = tmp_path / "run"
    run.mkdir()
    (run / "contract.json").write_text(contract.model_dump_json())
    save_file(tiny.moved(model), run / "adapter.safetensors")
    column = retrieval.check_contract(contract).second
    items = tmp_path / "items.csv"
    items.write_text("\n".join([f"id,{column}", *(f"{k},{t}" for k, t in enumerate(ITEMS * 2))]))

    def search() -> Any:
        words = ["search", str(run), str(items), "chest pain", "arm", "--model", str(folder)]
        words += ["-k", "2", "--index", str(tmp_path / "kept"), "--json"]
        done = CliRunner().invoke(adapter, words, standalone_mode=False)
        assert done.exception is None, done.exception
        return json.loads(done.output)

    found = search()
    assert [one["query"] for one in found] == ["chest pain", "arm"]
    for one in found:
        assert len({item["text"] for item in one["items"]}) == 2
    assert (tmp_path / "kept").is_file()
    Calibration(kind="temperature", temperature=4.0, rows=40).write(run)
    for before, after in zip(found, search(), strict=True):
        assert [item["text"] for item in after["items"]] == [i["text"] for i in before["items"]]
        assert [item["score"] for item in after["items"]] == pytest.approx(
            [item["score"] / 4 for item in before["items"]]
        )
