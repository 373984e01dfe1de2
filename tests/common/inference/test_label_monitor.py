"""`silotune adapter watch`: a stream of rows without labels, in time order, with its changes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from silotune.common.cli.adapter import adapter
from silotune.common.contract.contract import Contract
from silotune.common.errors import DataError, UsageError
from silotune.common.models import factory as models
from silotune.common.tasks.calibration import Calibration
from tests import tiny


def contract(task: dict[str, Any] | None = None) -> Contract:
    return Contract.model_validate(
        {
            "format": 1,
            "name": "watched",
            "quorum": 1,
            "task": task
            or {
                "label_column": "ill",
                "labels": [
                    {"name": "healthy", "values": ["0"]},
                    {"name": "ill", "values": ["1"]},
                ],
            },
            "input": {
                "kind": "table",
                "columns": [
                    {
                        "kind": "category",
                        "name": "smoker",
                        "phrase": "smokes",
                        "values": {"yes": "yes", "no": "no"},
                    },
                ],
            },
            "model": {"kind": "one-hot"},
            "privacy": {"expected_units": 10.0},
            "phases": [{"trains": "head", "rounds": 1, "sampling_rate": 1.0, "head_lr": 1.0}],
            "sites": [{"name": "a"}],
        }
    )


def run_of(folder: Path, made: Contract) -> Path:
    """A run whose adapter says "ill", or both labels, or a high number, of those who smoke."""
    folder.mkdir()
    (folder / "contract.json").write_text(made.model_dump_json())
    arrays = models.build(made, None).initial_arrays()
    smokes = np.array([1, -1, 0], dtype=np.float32)  # yes, no, missing
    weight = arrays["head.weight"]
    weight[:] = smokes if len(weight) == 1 else np.stack([-smokes, smokes])
    save_file(arrays, folder / "adapter.safetensors")
    return folder


def rows(file: Path, days: list[tuple[str, str]]) -> Path:
    with file.open("w", newline="") as out:
        csv.writer(out).writerows([("day", "smoker"), *days])
    return file


def smokers(share_before: float, share_after: float, each: int = 300) -> list[str]:
    rng = np.random.default_rng(4)
    return [
        "yes" if rng.random() < share else "no"
        for share in (share_before, share_after)
        for _ in range(each)
    ]


def call(*words: object) -> Any:
    return CliRunner().invoke(adapter, ["watch", *map(str, words)], standalone_mode=False)


def test_rows_out_of_order_are_put_in_order_and_the_change_is_told(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", contract())
    days = [(str(day), smokes) for day, smokes in enumerate(smokers(0.1, 0.7))]
    mixed = [days[k] for k in np.random.default_rng(0).permutation(600)]
    file = rows(tmp_path / "stream.csv", mixed)
    done = call(run, file, "--order-by", "day", "--out", tmp_path / "out", "--json")
    found = json.loads(done.output)
    assert found == json.loads((tmp_path / "out" / "watch.json").read_text())
    assert found["rows"] == 600
    assert found["shares"]["ill"] == pytest.approx(sum(s == "yes" for _, s in days) / 600)
    alert = next(a for a in found["alerts"] if a["label"] == "ill")
    assert abs(alert["since"] - 301) <= 15
    assert alert["before"] < 0.2
    assert alert["after"] > 0.5
    picture = (tmp_path / "out" / "watch.svg").read_text()
    assert ">healthy<" in picture
    assert f"{alert['before']:.0%} → {alert['after']:.0%}" in picture
    shuffled = json.loads(call(run, file, "--out", tmp_path / "out", "--json").output)
    assert shuffled["alerts"] == []


def test_numbers_are_calibrated_by_what_lies_beside_the_adapter(tmp_path: Path) -> None:
    cost = {"kind": "regression", "label_column": "cost", "lowest": 0.0, "highest": 9.0}
    run = run_of(tmp_path / "run", contract(cost))
    file = rows(tmp_path / "stream.csv", [(str(day), "yes") for day in range(50)])
    shares = []
    for offset in (None, 0.25):
        if offset is not None:
            Calibration(kind="affine", slope=0.0, offset=offset, rows=40).write(run)
        found = json.loads(call(run, file, "--out", tmp_path, "--json").output)
        shares.append(found["shares"]["cost"])
    assert shares == pytest.approx([1.0, 0.25])
    (run / "calibration.json").write_text("{}")
    error = call(run, file, "--out", tmp_path).exception
    assert isinstance(error, DataError)
    assert "calibration.json is damaged. Copy it again from the run, or delete it" in str(error)
    Calibration(kind="temperature", temperature=2.0, rows=40).write(run)
    assert "is of another task" in str(call(run, file, "--out", tmp_path).exception)


def test_dates_sort_as_they_are_written(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", contract())
    dates = [f"2026-{1 + k // 28:02d}-{1 + k % 28:02d}" for k in range(300)]
    days = list(zip(dates, smokers(0.0, 1.0, 150), strict=True))
    file = rows(tmp_path / "stream.csv", days[::-1])
    found = json.loads(call(run, file, "--order-by", "day", "--out", tmp_path, "--json").output)
    assert [a["before"] for a in found["alerts"] if a["label"] == "ill"] == [0.0]


@pytest.mark.parametrize(
    ("task", "ill"),
    [
        (
            {
                "kind": "multi-label",
                "label_column": "tags",
                "labels": [{"name": "well", "values": ["w"]}, {"name": "ill", "values": ["i"]}],
            },
            1.0,
        ),
        ({"kind": "regression", "label_column": "cost", "lowest": 0.0, "highest": 9.0}, 1.0),
    ],
)
def test_other_tasks(tmp_path: Path, task: dict[str, Any], ill: float) -> None:
    run = run_of(tmp_path / "run", contract(task))
    file = rows(tmp_path / "stream.csv", [("1", "yes")] * 40)
    found = json.loads(call(run, file, "--out", tmp_path, "--json").output)
    assert found["shares"].get("ill", found["shares"].get("cost")) == ill


def test_text_output_names_rows_from_one(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", contract())
    file = rows(tmp_path / "s.csv", [("1", s) for s in smokers(0.0, 1.0, 100)])
    done = call(run, file, "--out", tmp_path)
    assert "200 rows of s.csv · 2 changes" in done.output
    assert "since row 101" in done.output
    assert all(f.stat().st_mode & 0o077 == 0 for f in tmp_path.glob("watch.*"))
    one = rows(tmp_path / "one.csv", [("1", "yes")])
    assert "1 row of one.csv · 0 changes" in call(run, one, "--out", tmp_path).output


def test_a_task_without_few_answers_is_refused(tmp_path: Path) -> None:
    made = tiny.contract_of("tokens", "bert")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "contract.json").write_text(made.model_dump_json())
    error = call(folder, tmp_path / "none.csv").exception
    assert isinstance(error, UsageError)
    assert "a watch is of classification" in str(error)


def test_bad_input_is_one_sentence_and_shows_no_value(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", contract())
    file = rows(tmp_path / "s.csv", [("1", "yes"), ("", "no")])

    def error(*words: object) -> str:
        found = call(*words).exception
        assert isinstance(found, (DataError, UsageError)), found
        return str(found)

    assert "Column 'hour' is not in s.csv" in error(run, file, "--order-by", "hour")
    for day in ("", "nan", "n/a", "inf", "22/11/2026"):
        odd = rows(tmp_path / "odd.csv", [("1", "yes"), (day, "no")])
        assert "does not put the rows in order" in error(run, odd, "--order-by", "day")
    times = rows(tmp_path / "t.csv", [("2026-11-22T10:00", "yes"), ("2026-11-22T09:00Z", "no")])
    assert "all with a zone" in error(run, times, "--order-by", "day")
    bad = rows(tmp_path / "bad.csv", [("1", "perhaps")])
    said = error(run, bad)
    assert "smoker" in said
    assert "perhaps" not in said
    assert "Column 'smoker' is not in" in error(run, _file(tmp_path / "x.csv", "day\n1\n"))
    arrays = load_file(run / "adapter.safetensors")
    save_file({"head.weight": arrays["head.weight"]}, run / "adapter.safetensors")
    assert "1 tensors missing" in error(run, file)
    save_file(arrays | {"head.bias": np.full(2, np.nan, np.float32)}, run / "adapter.safetensors")
    assert "not finite" in error(run, file)
    (run / "adapter.safetensors").write_bytes(b"no")
    assert "is damaged" in error(run, file)
    (run / "adapter.safetensors").unlink()
    assert "when it is done" in error(run, file)


def _file(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_stream_in_another_encoding_and_delimiter(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", contract())
    file = rows(tmp_path / "stream.csv", list(enumerate(smokers(0.0, 1.0, 60))))
    expected = json.loads(call(run, file, "--out", tmp_path, "--json").output)
    text = file.read_text().replace(",", ";").replace("\n", ";Größe 180 cm, Müdigkeit – 20 €\n")
    file.write_bytes(text.replace("Größe 180 cm, Müdigkeit – 20 €", "note", 1).encode("cp1252"))
    refused = call(run, file, "--out", tmp_path)
    assert "set --encoding 'cp1252'" in str(refused.exception)
    found = call(run, file, "--out", tmp_path, "--json", "--encoding", "cp1252")
    assert json.loads(found.output) == expected


def test_a_packaged_model_is_found_in_the_cache_and_another_one_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.folder_of("bert")
    made = tiny.contract_of("classification", "bert", folder)
    run = tmp_path / "runs" / "variants" / "federated-lora-0"
    run.mkdir(parents=True)
    (run / "contract.json").write_text(made.model_dump_json())
    save_file(models.build(made, folder).initial_arrays(), run / "adapter.safetensors")
    data = tiny.write(tmp_path / "rows.csv", tiny.rows_of("classification", 40))
    cache: dict[str, Path] = {}
    monkeypatch.setattr("silotune.simulations.datasets.catalog.present", cache.get)
    error = call(run, data, "--out", tmp_path / "watch").exception
    assert isinstance(error, DataError)
    assert error.code == "E314"
    assert "--model FOLDER" in str(error)
    cache["tiny"] = folder
    assert "40 rows of rows.csv" in call(run, data, "--out", tmp_path / "watch").output
    cache["tiny"] = tiny.folder_of("bert", window=1)  # of other bytes: hash-checked as elsewhere
    (cache["tiny"] / "vocab.txt").write_text("[PAD]\n")
    error = call(run, data, "--out", tmp_path / "watch").exception
    assert isinstance(error, DataError)
    assert error.code == "E305"
    error = call(tmp_path / "runs", data).exception
    assert "has not ended, or was stopped" in str(error)
    (tmp_path / "runs" / "contract.json").write_text(made.model_dump_json())
    error = call(tmp_path / "runs", data).exception
    assert isinstance(error, UsageError)
    assert str(run) in str(error)
