"""A tiny token-classification model of the site's own beside the rules of de-identification."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForTokenClassification,
    BertModel,
    PreTrainedTokenizerFast,
)

from silotune.client.preparation import entity_model
from silotune.client.preparation.deidentify import Deidentifier
from silotune.client.preparation.entity_model import KIND_OF_LABEL
from silotune.client.site import policy
from silotune.client.site.preparation_rules import Deidentify
from silotune.common.errors import DataError, UsageError

LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "B-ORG"]
# Words that no rule finds, and what the tiny model calls them; "qu ##orv ##ax" is one word.
TAGS = {"zyxopheles": 1, "qu": 1, "##orv": 0, "##ax": 2, "blintheim": 3, "acmecorp": 5}
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "note", "says", "of", ".", *TAGS]


def save_model(folder: Path, labels: list[str] = LABELS, **changes: Any) -> Path:
    """A BERT of one layer whose classifier reads the label off the token's own embedding."""
    tokenizer = Tokenizer(
        WordPiece({word: at for at, word in enumerate(VOCABULARY)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=1_000_000,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=24,
        id2label=dict(enumerate(labels)),
        label2id={name: at for at, name in enumerate(labels)},
    )
    model = BertForTokenClassification(config)
    with torch.no_grad():
        embeddings = model.bert.embeddings
        embeddings.position_embeddings.weight.zero_()
        embeddings.token_type_embeddings.weight.zero_()
        embeddings.word_embeddings.weight.copy_(torch.eye(32)[: len(VOCABULARY)] * 10)
        for layer in (
            model.bert.encoder.layer[0].attention.output.dense,
            model.bert.encoder.layer[0].output.dense,
        ):
            layer.weight.zero_()
            layer.bias.zero_()
        model.classifier.weight.zero_()
        for at, word in enumerate(VOCABULARY):
            model.classifier.weight[TAGS.get(word, 0) % len(labels), at] = 5.0
    model.save_pretrained(folder)
    if changes:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def cleaner(folder: Path, **settings: Any) -> Deidentifier:
    return Deidentifier(Deidentify.model_validate({"model": folder, **settings}), bytes(32))


def test_the_models_labels_become_kinds_and_its_words_are_found_whole(folder: Path) -> None:
    text = "the note of zyxopheles says quorvax of blintheim and acmecorp"
    assert Deidentifier(Deidentify(), bytes(32)).clean(text).text == text
    # "quorvax" is three tokens of which the middle one is O; ORG is none of our kinds.
    cleaned = cleaner(folder).clean(text)
    assert cleaned.text == "the note of <PERSON> says <PERSON> of <ADDRESS> and acmecorp"
    assert cleaned.counts == {"person": 2, "address": 1}


def test_the_rules_still_search_beside_the_model(folder: Path) -> None:
    text = "zyxopheles called John Smith on 2024-03-07"
    assert cleaner(folder).clean(text).text == "<PERSON> called <PERSON> on <DATE>"


def test_a_text_longer_than_the_model_is_searched_to_its_end(folder: Path) -> None:
    text = "the note says . " * 300 + "zyxopheles"
    assert cleaner(folder).clean(text).text.endswith("<PERSON>")
    for at in range(0, 60, 7):  # wherever a window ends
        one = "the " * at + "zyxopheles quorvax" + " note" * 60
        assert cleaner(folder).clean(one).counts == {"person": 1}


def test_kinds_and_least_score_hold_for_the_model(folder: Path) -> None:
    text = "zyxopheles of blintheim"
    assert cleaner(folder, kinds=["address"]).clean(text).text == "zyxopheles of <ADDRESS>"
    model = cleaner(folder, least_score=1.0)
    assert model.clean("the note").counts == {}


def test_a_failure_of_the_model_is_an_error_and_not_a_clean_text(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = cleaner(folder)

    def fails(*args: Any, **named: Any) -> Any:
        raise RuntimeError("zyxopheles")

    monkeypatch.setattr(BertForTokenClassification, "forward", fails)
    with pytest.raises(DataError, match="RuntimeError") as caught:
        one.clean("the note of zyxopheles")
    assert "zyxopheles" not in str(caught.value)


def test_no_code_of_the_folder_runs_and_nothing_is_downloaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    for name in ("AutoConfig", "AutoTokenizer", "AutoModelForTokenClassification"):
        kind = getattr(entity_model, name)
        real = kind.from_pretrained

        def noted(*args: Any, real: Any = real, **named: Any) -> Any:
            asked.append(named)
            return real(*args, **named)

        monkeypatch.setattr(kind, "from_pretrained", noted)
    cleaner(folder)
    assert len(asked) >= 3
    assert all(not one["trust_remote_code"] and one["local_files_only"] for one in asked)


def test_a_folder_that_wants_to_run_code_is_refused(tmp_path: Path) -> None:
    wanting = save_model(tmp_path, auto_map={"AutoConfig": "code.Config"})
    (wanting / "code.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UsageError, match=r"auto_map in config\.json"):
        cleaner(wanting)


def test_what_is_no_token_classification_model_is_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UsageError, match=r"no readable config\.json"):
        cleaner(tmp_path / "nothing")
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    BertModel(
        BertConfig(
            vocab_size=20,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    ).save_pretrained(other)
    wrong = r"no token-classification model.*names BertModel"
    with pytest.raises(UsageError, match=wrong) as caught:
        cleaner(other)
    assert caught.value.code == "E103"
    # A config that says so does not make it one: the classifier would be random.
    file = other / "config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"architectures": ["BertForTokenClassification"]})
    )
    with pytest.raises(UsageError, match="lacks weights"):
        cleaner(other)
    (other / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UsageError, match="cannot be read"):
        cleaner(other)


def test_a_model_with_other_labels_is_refused(tmp_path: Path) -> None:
    wrong = save_model(tmp_path, ["O", "LABEL_1", "B-Disease"])
    with pytest.raises(UsageError, match="B-Disease, LABEL_1, O"):
        cleaner(wrong)


def test_labels_are_read_with_and_without_prefix() -> None:
    from silotune.client.preparation.entity_model import _kind

    kinds = [_kind(name) for name in ("B-PER", "I-person", "S-GPE", "PATIENT", "LOCATION-OTHER")]
    assert kinds == ["person", "person", "address", "person", "address"]
    assert [_kind(name) for name in ("O", "ORG", "B-Disease", "LABEL_0")] == [""] * 4
    assert set(KIND_OF_LABEL.values()) <= set(Deidentify().kinds)


SITE = """
name = "a"
[data]
file = "records.csv"
[prepare.deidentify]
model = "models/names"
[budgets.record]
epsilon = 8.0
delta = 1e-4
[permits]
contracts = []
"""


def test_the_folder_is_relative_to_the_policys_own(tmp_path: Path) -> None:
    found = policy.parse(SITE, tmp_path / "site.toml").prepare.deidentify
    assert found is not None
    assert found.model == tmp_path.resolve() / "models/names"
