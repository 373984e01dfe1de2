"""The character model: what its pre-training masks and learns, what is saved and shipped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast

from silotune.common.contract.model import EncoderModel
from silotune.common.errors import DataError
from silotune.common.model_files import model_folder
from silotune.common.models import backbone
from silotune.simulations.comparison.recipe import load_recipe
from silotune.simulations.datasets import catalog, character_model
from silotune.simulations.datasets.character_model import (
    FIRST,
    LAST,
    MASK,
    NO_WORD,
    PAD,
    SPECIAL,
    UNKNOWN,
    Settings,
    Text,
)

TAGGED = (
    """
迈向/v  充满/v  希望/n  的/u  新/a  世纪/n  ——/w  １９９８年/t  ＡＢ/nx  １/２/m

我们/r  十分/m  高兴/a  地/u  通过/p  中央/n  人民/n  广播/vn  电台/n  向/p  大家/r  问候/vn  。/w
"""
    * 400
)
TINY = Settings(
    known=60, hidden=32, layers=1, heads=2, inner=64, steps=150, tokens=1024, rate=1e-2, seconds=0
)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    file = tmp_path_factory.mktemp("corpus") / "tagged.txt"
    file.write_text(TAGGED, encoding="utf-8")
    return character_model.read_words(file)


@pytest.fixture(scope="module")
def tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    return character_model.make_tokenizer(words, TINY.known)


@pytest.fixture(scope="module")
def text(words: list[str], tokenizer: PreTrainedTokenizerFast) -> Text:
    return Text.of(words, tokenizer)


def test_words_lose_their_tags_and_take_the_tokenizers_form(words: list[str]) -> None:
    assert words[:10] == [
        "迈向",
        "充满",
        "希望",
        "的",
        "新",
        "世纪",
        "——",
        "1998年",
        "ab",
        "1/2",
    ]
    assert len(words) == 400 * 23


def test_a_character_is_a_token(tokenizer: PreTrainedTokenizerFast) -> None:
    found = tokenizer("我们 １９９８ 鄙Ab。")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(found) == [
        "[CLS]",
        "我",
        "们",
        "1",
        "9",
        "9",
        "8",
        "[UNK]",
        "a",
        "b",
        "。",
        "[SEP]",
    ]
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL] == [0, 1, 2, 3, 4]


def test_the_least_frequent_characters_are_unknown() -> None:
    found = character_model.make_tokenizer(["的的", "新", "的新", "世"], len(SPECIAL) + 2)
    assert set(found.get_vocab()) == {*SPECIAL, "的", "新"}


def test_a_text_is_read_as_the_tokenizer_reads_it(
    words: list[str], tokenizer: PreTrainedTokenizerFast, text: Text
) -> None:
    assert text.ids.tolist() == tokenizer("".join(words), add_special_tokens=False)["input_ids"]
    assert [int(word) for word in text.word[text.starts]] == list(range(len(words)))


def test_a_piece_is_whole_words_and_the_next_begins_behind_it(
    words: list[str], tokenizer: PreTrainedTokenizerFast, text: Text
) -> None:
    begin = torch.tensor([0, 7, 11])
    ids, own, after = character_model.pieces(text, begin, 12)
    assert ids.shape == own.shape == (3, 12)
    for row, first, behind in zip(ids.tolist(), begin.tolist(), after.tolist(), strict=True):
        inside = "".join(words[first:behind])
        expected = tokenizer(inside)["input_ids"]
        assert row == expected + [PAD] * (12 - len(expected))
        assert len(inside + words[behind]) > 10  # one word more would not have fitted
    special = torch.isin(ids, torch.tensor([PAD, FIRST, LAST]))
    assert ((own == NO_WORD) == special).all()


def test_masks_cover_whole_words_and_no_special_token(text: Text) -> None:
    rng = torch.Generator().manual_seed(0)
    begin = torch.randint(1000, (400,), generator=rng)
    ids, words, _ = character_model.pieces(text, begin, 32)
    new, hidden = character_model.mask_words(ids, words, 60, rng)
    assert not hidden[words == NO_WORD].any()
    assert (new[~hidden] == ids[~hidden]).all()
    same_word = words[:, 1:] == words[:, :-1]
    assert (hidden[:, 1:] == hidden[:, :-1])[same_word].all()
    # A word is masked, kept or swapped as a whole.
    masked = new == MASK
    assert (masked[:, 1:] == masked[:, :-1])[same_word].all()
    assert float(hidden[words != NO_WORD].float().mean()) == pytest.approx(0.15, abs=0.02)
    assert float(masked[hidden].float().mean()) == pytest.approx(0.8, abs=0.05)
    swapped = hidden & ~masked & (new != ids)
    assert float(swapped[hidden].float().mean()) == pytest.approx(0.1, abs=0.04)
    assert int(new[swapped].min()) >= len(SPECIAL)


@pytest.fixture(scope="module")
def trained(
    words: list[str], tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str]]:
    """The folder of a tiny model, and the lines that its training printed."""
    folder, lines = tmp_path_factory.mktemp("model"), list[str]()
    model = character_model.train(words, tokenizer, TINY, lines.append)
    character_model.save(model, tokenizer, folder)
    return folder, lines


def test_training_learns_and_says_how_long_it_takes(trained: tuple[Path, list[str]]) -> None:
    _, lines = trained
    held_out = [float(line.split("held out ")[1].split(")")[0]) for line in lines]
    assert held_out[-1] < held_out[0] - 1
    assert lines[-1].startswith(f"  {TINY.steps}/{TINY.steps}")
    assert lines[-1].endswith(" 0 s left")


def test_the_same_seed_makes_the_same_model(
    words: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    short = Settings(**{**vars(TINY), "steps": 2})
    one, same = (character_model.train(words, tokenizer, short, lambda _: None) for _ in "12")
    for a, b in zip(one.parameters(), same.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_is_saved_is_loaded_offline(
    trained: tuple[Path, list[str]], tokenizer: PreTrainedTokenizerFast
) -> None:
    folder, _ = trained
    assert {path.name for path in folder.iterdir()} == set(SHIPPED.members)
    weights = load_file(folder / model_folder.WEIGHTS)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert not [name for name in weights if "guess" in name or name == "bias"]
    loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert loaded("我们鄙")["input_ids"] == tokenizer("我们鄙")["input_ids"]
    model = AutoModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False)
    assert model.config.hidden_size == TINY.hidden
    assert {name for name, _ in model.named_parameters()} == set(weights)


SHIPPED = catalog.SOURCES["chinese-characters"]


def test_the_shipped_model_is_the_one_that_the_recipe_names() -> None:
    spec = load_recipe("chinese-sentiment").contract.model
    assert isinstance(spec, EncoderModel)
    folder = catalog.fetch(spec.name)
    assert spec.sha256 == SHIPPED.sha256
    read = backbone.read(folder, spec.sha256, torch.device("cpu"))
    assert read.size == Settings().hidden
    assert len(read.layers) == Settings().layers
    found = read.tokenizer("房间很干净")["input_ids"]
    assert len(found) == 7
    assert UNKNOWN not in found
    assert read.tokenizer.model_max_length >= spec.max_tokens


def test_a_changed_shipped_model_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for member in SHIPPED.members:
        (tmp_path / "models" / "chinese-characters").mkdir(parents=True, exist_ok=True)
        content = (SHIPPED.path / member).read_bytes()
        (tmp_path / SHIPPED.folder / member).write_bytes(content)
    monkeypatch.setattr(catalog.resources, "files", lambda _: tmp_path)
    assert catalog.fetch(SHIPPED.name) == tmp_path / SHIPPED.folder
    (tmp_path / SHIPPED.folder / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"another model than .* Install Silotune again"):
        catalog.fetch(SHIPPED.name)
