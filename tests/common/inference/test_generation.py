"""`silotune adapter answer`: greedy answers of a language model, and how near they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import save_file

from silotune.common.cli.adapter import adapter
from silotune.common.errors import UsageError
from silotune.common.models import factory as models
from silotune.common.models.causal_lm import LanguageModel
from silotune.common.tasks import rouge
from tests import tiny


def call(*words: object) -> Result:
    return CliRunner().invoke(adapter, ["answer", *map(str, words)], standalone_mode=False)


def test_answers_are_the_models_own_and_are_scored_where_there_are_some(tmp_path: Path) -> None:
    contract, folder = tiny.contract_of("language", "llama"), tiny.folder_of("llama", chat=True)
    contract = contract.changed(model={"sha256": tiny.sha256(folder)})
    model = models.build(contract, folder)
    assert isinstance(model, LanguageModel)
    arrays = tiny.moved(model, seed=1, by=1.0)  # it says something
    save_file(arrays, tmp_path / "adapter.safetensors")
    (tmp_path / "contract.json").write_text(contract.model_dump_json())
    with model.lock:
        model.load(arrays)
        wanted = [model.answer(text, 5) for text in ("pain in the chest", "left arm")]
    assert len(wanted[0].split()) > 1
    prompt, label = contract.columns[0], contract.task.label_column
    rows = tmp_path / "rows.csv"
    rows.write_text(f"{prompt},{label}\npain in the chest,{wanted[0]}\nleft arm,xyzzy\n")
    found = json.loads(call(tmp_path, rows, "--model", folder, "--most", 5, "--json").output)
    assert found["answers"] == wanted
    assert found["scores"] == {
        "ROUGE-1": pytest.approx(0.5),
        "ROUGE-L": pytest.approx(0.5),
        "exact match": 0.5,
    }
    rows.write_text(f"{prompt}\npain in the chest\nleft arm\n")
    done = call(tmp_path, rows, "--model", folder, "--most", 5, "--rows", 1)
    assert f"→ {wanted[0]}" in done.output
    assert "ROUGE" not in done.output
    assert "left arm" not in done.output


def test_rouge_is_that_of_the_paper() -> None:
    """Lin 2004, section 3.1: to "police killed the gunman", "police kill the gunman" has a longest
    common subsequence of 3 of 4 words, "the gunman kill police" of 2; as bags both have 3."""
    wanted = ["police killed the gunman"]
    near, far = (
        rouge.rouge([answer], wanted)
        for answer in ("police kill the gunman", "The gunman kill police.")
    )
    assert (near["ROUGE-L"], far["ROUGE-L"]) == (pytest.approx(0.75), pytest.approx(0.5))
    assert near["ROUGE-1"] == far["ROUGE-1"] == pytest.approx(0.75)
    assert rouge.rouge(["您的卡在路上"], ["卡在路上"])["ROUGE-L"] == pytest.approx(0.8)


def test_other_tasks_and_a_missing_package_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "contract.json").write_text(tiny.contract_of("tokens", "bert").model_dump_json())
    error = call(tmp_path, tmp_path / "rows.csv").exception
    assert isinstance(error, UsageError)
    assert "it has no answers" in str(error)
    monkeypatch.setattr(rouge, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match="pip install rouge-score"):
        rouge.rouge(["a"], ["a"])
