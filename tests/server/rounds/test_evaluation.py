"""Public rows, scored overall and by group, with the one-hot model."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from silotune.common.contract.contract import Contract
from silotune.common.contract.model import OneHotModel
from silotune.common.data import records
from silotune.common.data.text_decoding import Reading
from silotune.common.errors import DataError
from silotune.common.models.factory import build
from silotune.common.protocol.messages import Arrays
from silotune.common.tasks.calibration import fit
from silotune.common.tasks.metrics import score
from silotune.server.flower.app_bundle import write_app
from silotune.server.operations.server_folder import ServerFolder, ServerSettings
from silotune.server.rounds.evaluation import PublicTest
from tests import tiny
from tests.server.operations.test_server_folder import admitted

HEADER = "age,smoker,outcome\n"
ZERO: Arrays = {"head.bias": np.zeros(2, np.float32), "head.weight": np.zeros((2, 6), np.float32)}


def by_smoking() -> Arrays:
    """Ill if and only if a smoker. Features: young, old, age missing, yes, no, smoker missing."""
    weight = np.zeros((2, 6), np.float32)
    weight[1, 3], weight[0, 4] = 2.0, 2.0
    return {"head.bias": np.zeros(2, np.float32), "head.weight": weight}


@pytest.fixture
def public_test(tmp_path: Path, table_contract: Contract) -> Callable[..., PublicTest]:
    """public_test(north=rows, ...): the rows of each group, as CSV text without a header."""

    def make(**groups: str) -> PublicTest:
        files = {}
        for group, rows in groups.items():
            files[group] = tmp_path / f"{group}.csv"
            files[group].write_text(HEADER + rows)
        return PublicTest(table_contract, build(table_contract, None), files)

    return make


def test_scores_by_group(public_test: Callable[..., PublicTest]) -> None:
    test = public_test(north="70,yes,1\n30,no,0\n30,yes,0\n70,no,0\n", south="30,yes,1\n70,no,1\n")
    found = test.scores(by_smoking(), adapter_active=False)
    assert list(found) == ["", "north", "south"]
    assert found["north"]["accuracy"] == 0.75
    assert found["south"]["accuracy"] == 0.5
    assert found[""]["accuracy"] == pytest.approx(4 / 6)
    # In the north one smoker of two is ill and no other: the pairs are 2 right and 1 tied.
    assert found["north"]["auc"] == pytest.approx(2.5 / 3)
    assert found["south"]["auc"] is None
    assert {scores["predicted_classes"] for scores in found.values()} == {2}


def test_one_answer_for_all_is_told(public_test: Callable[..., PublicTest]) -> None:
    test = public_test(north="70,yes,0\n30,no,0\n30,no,1\n70,no,0\n")
    (overall, north) = test.scores(ZERO, adapter_active=False).values()
    assert overall == north
    names = ("predicted_classes", "accuracy", "auc")
    assert tuple(overall[name] for name in names) == (1, 0.75, 0.5)
    assert overall["loss"] == pytest.approx(np.log(2))


def test_the_whole_is_scored_over_rows_not_groups(
    tmp_path: Path, table_contract: Contract, write_rows: Callable[..., Path]
) -> None:
    files = {
        "north": write_rows(tmp_path / "n.csv", 30, seed=1),
        "south": write_rows(tmp_path / "s.csv", 7, seed=2),
    }
    model = build(table_contract, None)
    test = PublicTest(table_contract, model, files)
    rng = np.random.default_rng(0)
    adapter = {n: rng.standard_normal(a.shape).astype(np.float32) for n, a in ZERO.items()}
    logits = test.outputs(adapter, adapter_active=False)
    found = test.scores(adapter, adapter_active=False)
    labels = [records.read(path, table_contract).labels for path in files.values()]
    task = table_contract.task
    assert found[""] == score(task, logits, [*labels[0], *labels[1]])
    assert found["north"] == score(task, logits[:30], labels[0])
    assert found["south"] == score(task, logits[30:], labels[1])


def test_logits_are_those_of_a_linear_model(
    public_test: Callable[..., PublicTest], table_contract: Contract
) -> None:
    test = public_test(north="70,yes,1\n,no,0\n", south="30,,1\n")
    rng = np.random.default_rng(0)
    adapter = {n: rng.standard_normal(a.shape).astype(np.float32) for n, a in ZERO.items()}
    cells = np.array([[0, 1, 0, 1, 0, 0], [0, 0, 1, 0, 1, 0], [1, 0, 0, 0, 0, 1]])
    assert isinstance(table_contract.model, OneHotModel)
    rows = cells * table_contract.model.norm / np.sqrt(2)
    expected = rows @ adapter["head.weight"].T + adapter["head.bias"]
    found = np.stack(test.outputs(adapter, adapter_active=False))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    # Nothing of one adapter stays behind in the shared model.
    assert not np.stack(test.outputs(ZERO, adapter_active=False)).any()


def test_metrics_are_the_overall_scores(public_test: Callable[..., PublicTest]) -> None:
    test = public_test(north="70,yes,1\n30,no,0\n", south="30,yes,1\n")
    overall = test.scores(by_smoking(), adapter_active=False)[""]
    found = test.metrics(by_smoking(), False)
    assert found == overall
    found["auc"] = None
    assert test.metrics(by_smoking(), False)["auc"] is not None


def test_some_rows_calibrate_and_no_figure_uses_them(
    public_test: Callable[..., PublicTest],
) -> None:
    rng = np.random.default_rng(0)
    smokers = rng.random(300) < 0.5
    ill = rng.random(300) < np.where(smokers, 0.7, 0.3)
    rows = "".join(
        f"30,{'yes' if smokes else 'no'},{int(sick)}\n"
        for smokes, sick in zip(smokers, ill, strict=True)
    )
    whole = public_test(north=rows)
    test, calibrating = whole.divided()
    assert calibrating is not None
    assert (len(test.labels), len(calibrating.labels)) == (240, 60)
    assert abs(np.mean(calibrating.labels) - ill.mean()) < 1 / 60  # in proportion to the labels
    sure = {name: 3 * array for name, array in by_smoking().items()}
    for part in (test, calibrating):
        outputs = part.outputs(sure, adapter_active=False)
        assert part.scores(sure, adapter_active=False)["north"] == score(
            part.task, outputs, part.labels
        )
    found = calibrating.calibration(sure, adapter_active=False)
    assert found is not None
    assert found == fit(
        whole.task, calibrating.outputs(sure, adapter_active=False), calibrating.labels
    )
    assert found.temperature > 2
    outputs = test.outputs(sure, adapter_active=False)
    after = score(test.task, found.apply(outputs), test.labels)
    before = test.metrics(sure, False)
    assert after["loss"] < before["loss"]  # type: ignore[operator]
    assert after["calibration"] < before["calibration"]  # type: ignore[operator]
    assert len(whole.labels) == 300  # it stays as it is


def test_of_few_public_rows_none_calibrates(public_test: Callable[..., PublicTest]) -> None:
    whole = public_test(north="70,yes,1\n30,no,0\n" * 59)
    assert whole.divided() == (whole, None)
    test, calibrating = public_test(north="70,yes,1\n30,no,0\n" * 60).divided()
    assert calibrating is not None
    assert (len(test.labels), len(calibrating.labels)) == (80, 40)


def test_candidates_of_a_query_are_for_figures_or_calibrate(tmp_path: Path) -> None:
    contract, folder = tiny.contract_of("bi", "bert"), tiny.folder_of("bert")
    rows = tiny.rows_of("bi", 600)
    for place, row in enumerate(rows):
        row["query"] = f"q{place // 3}"
    file = tiny.write(tmp_path / "pairs.csv", rows)
    test, calibrating = PublicTest(contract, build(contract, folder), {"": file}).divided()
    assert calibrating is not None
    assert not set(test.queries) & set(calibrating.queries)
    assert len(set(calibrating.queries)) == 40
    assert len(calibrating.queries) == len(calibrating.encoded) == len(calibrating.targets) == 120


def test_public_rows_must_fit_too(public_test: Callable[..., PublicTest]) -> None:
    with pytest.raises(DataError) as caught:
        public_test(north="70,yes,1\n30,often,0\n")
    assert caught.value.code == "E302"


# How a server's own file of public rows is read ------------------------------------------------


def test_the_app_reads_the_public_rows_as_the_command_does(
    tmp_path: Path, table_contract: Contract
) -> None:
    text = "age;smoker;outcome;note\n70;yes;1;é – €\n30;no;0;x\n"
    (tmp_path / "test.csv").write_bytes(text.replace(";", "\t").encode("cp1252"))
    said = Reading.of("windows-1252", "tab", "--{key} {value}")
    folder = write_app(
        tmp_path / "app",
        contract=tmp_path / "c.toml",
        model=None,
        run="r",
        runs=tmp_path,
        test=tmp_path / "test.csv",
        reading=said,
    )
    config = tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    again = Reading.of(config["encoding"], config["delimiter"] or None, "--{key} {value}")
    assert again == said
    test = PublicTest(
        table_contract, build(table_contract, None), {"": Path(config["test"])}, again
    )
    assert test.labels == [1, 0]


def test_what_is_wrong_with_the_public_rows_is_said_before_the_run(
    tmp_path: Path, table_contract: Contract, run: Callable[..., tuple[int, str, str]]
) -> None:
    place = admitted(
        ServerFolder.create(tmp_path / "fed", ServerSettings(host="fl.example.org")),
        "north",
        "south",
    )
    contract = tmp_path / "contract.json"
    made = place.with_roster(table_contract, masked=False)
    contract.write_text(made.model_dump_json(exclude_none=True))
    path = tmp_path / "test.csv"
    path.write_text("age;smoker;outcome\n70;yes;1\n30;no;maybe\n")
    words = ("server", "run", contract, "--folder", place.folder, "--test", path)
    code, _, wrong = run(*words)
    assert (code, "E303 test.csv" in wrong, "(0, 1): row 3" in wrong) == (1, True, True)
    path.write_bytes("age;smoker;outcome\n70;yes;1\n30;no;é\n".encode("latin-1"))
    assert "set --encoding 'latin-1'" in run(*words)[2]
    assert "row 3" in run(*words, "--encoding", "latin-1")[2]
    assert run(*words, "--encoding", "rot13")[0] == 2
