"""The recipe service-answers: its replies, and that each question has its own intent's."""

from __future__ import annotations

import pandas as pd
import pytest

from silotune.common.contract.inputs import columns_of
from silotune.common.contract.task import Language
from silotune.common.errors import DataError
from silotune.simulations.comparison.recipe import load_recipe
from silotune.simulations.datasets import catalog, tables


@pytest.fixture(scope="module")
def source() -> pd.DataFrame:
    """Banking77's rows, both parts; skips where its folder is not there."""
    try:
        folder = catalog.fetch("banking77")
    except DataError as error:
        pytest.skip(f"the data cannot be had: {error}")
    return pd.concat(
        [pd.read_csv(folder / f"{split}.csv", dtype=str) for split in ("train", "test")]
    )


def test_replies_are_one_line_each_and_no_two_are_the_same() -> None:
    found = list(tables.replies().values())
    assert len(found) >= 2
    for reply in found:
        assert reply
        assert reply == " ".join(reply.split())
    assert len({reply.lower() for reply in found}) == len(found)


def test_the_contract_learns_the_tables_columns() -> None:
    contract = load_recipe("service-answers").contract
    assert isinstance(contract.task, Language)
    assert contract.task.label_column == "reply"
    assert columns_of(contract.input) == ("query",)
    assert contract.model.sha256 == catalog.SOURCES[contract.model.name].converted  # type: ignore[union-attr]
    assert {phase.trains for phase in contract.phases} == {"adapter"}


def test_every_intent_is_in_the_data(source: pd.DataFrame) -> None:
    assert set(tables.replies()) <= set(source["category"])


def test_each_question_has_its_intents_reply(source: pd.DataFrame) -> None:
    replies = tables.replies()
    text = source["text"].str.split().str.join(" ")
    expected = {
        (question, replies[intent])
        for question, intent in zip(text, source["category"], strict=True)
        if intent in replies
    }
    table = tables.TABLES["service-answers"].make()
    assert list(table.columns) == ["site", "split", "query", "reply"]
    assert set(zip(table["query"], table["reply"], strict=True)) == expected
    assert len(table) == int(source["category"].isin(replies).sum())
    assert set(table["reply"]) == set(replies.values())


def test_a_question_is_at_the_bank_where_service_intents_has_it(source: pd.DataFrame) -> None:
    intents = tables.TABLES["banking77"].make()
    at = ["split", "site"]
    known = set(intents[["text", *at]].itertuples(index=False, name=None))
    table = tables.TABLES["service-answers"].make()
    assert set(table[["query", *at]].itertuples(index=False, name=None)) <= known
    assert set(table["site"]) == set(load_recipe("service-answers").contract.weights())
