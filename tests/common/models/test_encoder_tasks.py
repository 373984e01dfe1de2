"""What tiny models make of words, pairs and answers, against the library's own models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, LlamaForCausalLM

from silotune.common.contract.compute import Performance
from silotune.common.contract.contract import Contract
from silotune.common.data.records import parse
from silotune.common.errors import DataError
from silotune.common.models.base import Encoded
from silotune.common.models.batching import BUCKET
from silotune.common.models.causal_lm import LanguageModel
from silotune.common.models.encoder import NO_WORD, Encoder
from silotune.common.tasks.token_classification import IGNORED
from silotune.server.rounds.evaluation import PublicTest
from tests import tiny

EXACT = Performance(bf16="off", device="cpu", micro_batch=4)
LONG = "pain in the left arm today and " * 3


def encoder_of(kind: str, of: str, **more: Any) -> Encoder:
    contract = tiny.contract_of(kind, of).changed(**more)
    found = Encoder(contract, tiny.folder_of(of), EXACT)
    found.load(tiny.moved(found))
    return found


def language_model(tied: bool = True, chat: bool = False, **more: Any) -> LanguageModel:
    folder = tiny.folder_of("llama", tied, chat)
    contract = tiny.contract_of("language", "llama", folder).changed(**more)
    found = LanguageModel(contract, folder, EXACT)
    found.load(tiny.moved(found))
    return found


@torch.no_grad()
def adapter_active(whole: Any, model: Encoder | LanguageModel) -> Any:
    """The library's model with the adapter's product added to its weights."""
    arrays = {n: p.numpy(force=True).copy() for n, p in model.named_tensors().items()}
    for name, b in arrays.items():
        if name.endswith(".lora_B"):
            place = name.removesuffix(".lora_B")
            change = torch.from_numpy(b @ arrays[f"{place}.lora_A"]) * (8.0 / 2)
            assert float(change.norm()) > 0.1
            whole.get_submodule(place).weight += change
    return whole


@torch.no_grad()
def pooled(whole: Any, *texts: list[str], folder: Path) -> Tensor:
    """The library's mean pooling, each text, or pair of texts, by itself and without padding."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for text in zip(*texts, strict=True):
        tokens = tokenizer(*text, truncation=True, max_length=32, return_tensors="pt")
        found.append(whole(**tokens).last_hidden_state.mean(1))
    return nn.functional.normalize(torch.cat(found), dim=-1)


def seen(model: Encoder, inputs: list[Any], adapter: bool) -> Tensor:
    """The head's inputs, [N, H], from blocks as in training."""
    encoded = model.encode(inputs)
    out = torch.zeros(len(inputs), model.backbone.size)
    for block, n in model.micro_batches(encoded, torch.arange(len(inputs)), adapter=adapter):
        with torch.no_grad():
            out[block[:n]] = model.features(encoded, block, adapter=adapter)[:n]
    return out


TEXTS = ["pain", "burning pain in the chest", LONG, "no pain today", "pain in arms " * 4]
OTHERS = ["arm", "no", "the chest burned " * 3, "left arm", LONG]


# --- words -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_words_first_piece_carries_its_tag(kind: str) -> None:
    model = encoder_of("tokens", kind)
    encoded = model.encode(["burning pain", "arms in chests today"])
    assert encoded.marks is not None
    assert encoded.starts is not None
    first, second = (
        [0, NO_WORD, 1],
        [0, NO_WORD, 1, 2, NO_WORD, 3],
    )  # burn ##ing pain; arm ##s …
    around = [NO_WORD] if kind == "bert" else []
    assert encoded.marks.tolist() == [*around, *first, *around, *around, *second, *around]
    labels = model.objective.tensor([[3, 0], [1, 0, 2, 4]])
    found = model.targets(encoded, labels, torch.tensor([1, 0, 1]))
    none = [IGNORED] * len(around)
    tags = [*none, 1, IGNORED, 0, 2, IGNORED, 4, *none]
    assert found.tolist()[0] == tags + [IGNORED] * (BUCKET - len(tags))
    assert found.tolist()[2] == found.tolist()[0]
    assert [t for t in found.tolist()[1] if t != IGNORED] == [3, 0]


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("adapter", [False, True])
def test_words_beyond_the_models_reach_do_not_count(kind: str, adapter: bool) -> None:
    model = encoder_of("tokens", kind, model={"max_tokens": 8})
    texts, room = ["burning " * 9, "pain " * 20], 6 if kind == "bert" else 8
    labels = model.objective.tensor([[1] * 9, [2] * 20])
    encoded = model.encode(texts)
    kept = model.predict(encoded, labels, adapter=adapter)
    assert list(map(len, kept)) == [room // 2, room]
    # What stands there changes nothing.
    short = model.encode(["burning " * (room // 2), "pain " * room])
    for found, same in zip(kept, model.predict(short, labels, adapter=adapter), strict=True):
        np.testing.assert_allclose(found, same, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("adapter", [False, True])
@torch.no_grad()
def test_each_token_has_the_librarys_state(kind: str, adapter: bool) -> None:
    model, folder = encoder_of("tokens", kind), tiny.folder_of(kind)
    whole = AutoModel.from_pretrained(folder).eval()
    if adapter:
        adapter_active(whole, model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = model.encode(TEXTS)
    for row, text in enumerate(TEXTS):
        ids = tokenizer(text, truncation=True, max_length=32, return_tensors="pt")["input_ids"]
        states = nn.functional.normalize(whole(ids).last_hidden_state[0], dim=-1)
        found = model(encoded, torch.tensor([row]), adapter=adapter)[0, : len(states)]
        torch.testing.assert_close(found, model.head(states), rtol=0, atol=1e-5)


@pytest.mark.parametrize("invisible", ["\u200b", "\u200d", "\xad", "\ufffd"])
def test_a_word_of_which_nothing_is_left_shifts_no_other_words_tag(invisible: str) -> None:
    """BERT's tokenizer drops such characters: the words behind must keep their places."""
    model = encoder_of("tokens", "bert")
    text = f"pain {invisible} in the arm {invisible}"
    labels = model.objective.tensor([[1, 0, 2, 3, 4, 0]])
    encoded = model.encode([text])
    counted = model.targets(encoded, labels, torch.tensor([0]))
    assert [t for t in counted[0].tolist() if t != IGNORED] == [1, 0, 2, 3, 4, 0]
    (logits,) = model.predict(encoded, labels, adapter=True)
    assert len(logits) == 6


@pytest.mark.parametrize("adapter", [False, True])
def test_sentences_without_a_word(adapter: bool) -> None:
    """Also where no record has one: that a site has such records only must not fail its round."""
    model = encoder_of("tokens", "bert")
    for texts, targets in ((["", "pain"], [[], [1]]), (["", " "], [[], []])):
        encoded, labels = model.encode(texts), model.objective.tensor(targets)
        kept = model.predict(encoded, labels, adapter=adapter)
        assert list(map(len, kept)) == list(map(len, targets))


# --- pooled texts and pairs --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("adapter", [False, True])
def test_features_are_the_librarys_mean_pooling(kind: str, adapter: bool) -> None:
    model, folder = encoder_of("classification", kind), tiny.folder_of(kind)
    whole = AutoModel.from_pretrained(folder).eval()
    if adapter:
        adapter_active(whole, model)
    expected = pooled(whole, TEXTS, folder=folder)
    torch.testing.assert_close(seen(model, TEXTS, adapter), expected, rtol=0, atol=1e-5)


def test_a_token_does_not_see_those_behind_it() -> None:
    model = encoder_of("tokens", "llama")
    encoded = model.encode(["pain in the arm", "pain in the chest today"])
    with torch.no_grad():
        one, other = model(encoded, torch.tensor([0, 1]), adapter=True)
    torch.testing.assert_close(one[:3], other[:3], rtol=0, atol=1e-6)
    assert float((one[3] - other[3]).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("adapter", [False, True])
def test_a_pair_read_apart_is_the_product_of_its_texts(kind: str, adapter: bool) -> None:
    model = encoder_of("bi", kind)
    whole = adapter_active(AutoModel.from_pretrained(tiny.folder_of(kind)).eval(), model)
    if not adapter:
        whole = AutoModel.from_pretrained(tiny.folder_of(kind)).eval()
    one, other = (pooled(whole, texts, folder=tiny.folder_of(kind)) for texts in (TEXTS, OTHERS))
    pairs = list(zip(TEXTS, OTHERS, strict=True))
    torch.testing.assert_close(seen(model, pairs, adapter), one * other, rtol=0, atol=1e-5)
    # Both ways round it is the same, and the head begins as the dot product.
    turned = [(b, a) for a, b in pairs]
    torch.testing.assert_close(
        seen(model, turned, adapter), seen(model, pairs, adapter), rtol=0, atol=1e-6
    )
    model.load(model.initial_arrays())
    with torch.no_grad():
        found = model(model.encode(pairs), torch.arange(5), adapter=False)[:, 0]
    scale = np.sqrt(model.backbone.size)
    plain = AutoModel.from_pretrained(tiny.folder_of(kind)).eval()
    one, other = (pooled(plain, texts, folder=tiny.folder_of(kind)) for texts in (TEXTS, OTHERS))
    torch.testing.assert_close(found, (one * other).sum(1) / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("adapter", [False, True])
def test_a_pair_read_as_one_is_the_tokenizers_pair(kind: str, adapter: bool) -> None:
    model, folder = encoder_of("cross", kind), tiny.folder_of(kind)
    whole = AutoModel.from_pretrained(folder).eval()
    if adapter:
        adapter_active(whole, model)
    pairs = list(zip(TEXTS, OTHERS, strict=True))
    expected = pooled(whole, TEXTS, OTHERS, folder=folder)
    torch.testing.assert_close(seen(model, pairs, adapter), expected, rtol=0, atol=1e-5)
    turned = seen(model, [(b, a) for a, b in pairs], adapter)
    assert float((turned - expected).norm(dim=1).min()) > 1e-3


def test_equal_texts_are_encoded_once() -> None:
    model = encoder_of("bi", "bert")
    encoded = model.encode([("pain", "arm"), ("pain", "no"), ("arm", "pain"), ("pain", "arm")])
    assert encoded.texts.tolist() == [[0, 1], [0, 2], [1, 0], [0, 1]]
    assert len(encoded) == 4
    assert len(encoded.features) == 3
    assert encoded.starts is not None
    assert encoded.hidden is not None
    assert len(encoded.hidden) == int(encoded.starts[-1]) == 3 * 3
    single = encoder_of("regression", "bert").encode(["pain", "arm", "pain"])
    assert single.texts.tolist() == [[0], [1], [0]]
    assert len(single.features) == 2


def test_public_texts_count_as_often_as_they_are_listed() -> None:
    """The mean and the whitener are those of the sentences in the contract, not of its words."""
    sentences = ["pain", "pain", "pain", "burning arm", LONG]
    plain = encoder_of("classification", "bert")
    found = encoder_of(
        "classification",
        "bert",
        model={"standardise": {"sentences": sentences, "whiten": False, "norm": 1.0}},
    )
    x = seen(plain, sentences, adapter=False)
    torch.testing.assert_close(found.mean, x.mean(0), rtol=0, atol=1e-6)
    rms = float((x - x.mean(0)).square().sum(1).mean().sqrt())
    torch.testing.assert_close(found.whitener, torch.eye(16) / rms, rtol=1e-5, atol=1e-6)


# --- answers -----------------------------------------------------------------------------------

ASKED = ["pain in the chest", "no pain", "burning " * 6, "pain today"]
ANSWERS = ["left arm", "no", "the right arms burned today", "chest"]
PAIRS = list(zip(ASKED, ANSWERS, strict=True))


def library(model: LanguageModel, tied: bool = True, chat: bool = False) -> Any:
    whole = LlamaForCausalLM.from_pretrained(tiny.folder_of("llama", tied, chat)).eval()
    adapter_active(whole.model, model)
    return whole


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_logits_and_losses_are_the_librarys(tied: bool, chat: bool) -> None:
    model = language_model(tied, chat)
    whole, encoded = library(model, tied, chat), model.encode(PAIRS)
    labels = model.objective.tensor(ANSWERS)
    kept = model.predict(encoded, labels, adapter=True)
    index = torch.arange(len(PAIRS))
    outputs = model(encoded, index, adapter=True)
    losses = model.objective.losses(outputs, model.targets(encoded, labels, index))
    for row, (asked, answer) in enumerate(PAIRS):
        ids, before = model.prompts.tokens(asked, answer)
        own = torch.tensor([ids])
        marks = own.clone()
        marks[0, :before] = IGNORED
        expected = whole(own, labels=marks)
        asks = expected.logits[0, before - 1 : -1]
        torch.testing.assert_close(outputs[row, -len(asks) :], asks, rtol=0, atol=1e-4)
        assert float(losses[row]) == pytest.approx(float(expected.loss), rel=1e-5)
        nll, tokens, right = kept[row]
        assert tokens == len(ids) - before
        assert nll / tokens == pytest.approx(float(expected.loss), rel=1e-5)
        told = expected.logits[0, before - 1 : -1].argmax(1)
        assert right == int((told == own[0, before:]).sum())


def test_no_block_has_answers_of_two_lengths() -> None:
    """How many logits a block has would else depend on who is in it, and with it how they round."""
    model = language_model(model={"max_tokens": 64})
    pairs = [("no " * (24 - n), "left " * n) for n in (1, 20, 3, 22, 13)]  # of one bucket
    labels = model.objective.tensor(["left"] * len(pairs))
    encoded = model.encode(pairs)
    told = []
    for rows, n in model.micro_batches(encoded, torch.arange(len(pairs)), adapter=True):
        answers = (model.targets(encoded, labels, rows) != IGNORED).sum(dim=1)
        assert len(set((-(-answers // BUCKET)).tolist())) == 1
        told += rows[:n].tolist()
    assert sorted(told) == list(range(len(pairs)))


def test_marks_are_on_the_answer_and_its_end_alone() -> None:
    model = language_model()
    encoded, labels = model.encode(PAIRS), model.objective.tensor(ANSWERS)
    found = model.targets(encoded, labels, torch.arange(len(PAIRS)))
    tokenizer = model.backbone.tokenizer
    for row, (_, answer) in enumerate(PAIRS):
        own = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
        assert len(own) < found.shape[1]
        assert found[row].tolist() == [*[IGNORED] * (found.shape[1] - len(own)), *own]


@pytest.mark.parametrize("system", [None, "no pain"])
def test_the_prompt_is_in_the_models_own_template(system: str | None) -> None:
    model = language_model(chat=True, task={"system": system})
    said = model.backbone.tokenizer.decode(model.prompts.prompt("left arm"))
    start = f"<system> {system} </s> " if system else ""
    assert said == f"{start}<user> left arm </s> <assistant>"
    plain = language_model(task={"system": system})
    assert plain.backbone.tokenizer.decode(plain.prompts.prompt("left arm")) == " ".join(
        [*([system] if system else []), "left arm"]
    )


def test_of_what_is_too_long_the_beginning_of_the_users_text_is_left_out() -> None:
    model = language_model(model={"max_tokens": 8})
    tokenizer = model.backbone.tokenizer
    words = tiny.WORDS
    ids, before = model.prompts.tokens(" ".join(words), "left arm")
    assert tokenizer.convert_ids_to_tokens(ids) == [*words[-5:], "left", "arm", "</s>"]
    assert before == 5


def test_an_answer_that_is_cut_has_no_end_token() -> None:
    """A model must not learn to stop in the middle of a sentence."""
    model = language_model(model={"max_tokens": 8})
    tokenizer, words = model.backbone.tokenizer, tiny.WORDS
    for n in range(1, 8):
        ids, before = model.prompts.tokens("left arm", " ".join(words[:n]))
        answered = tokenizer.convert_ids_to_tokens(ids)[before:]
        assert answered == (words[:4] if n > 3 else [*words[:n], "</s>"])
    ids, before = model.prompts.tokens(" ".join(words), " ".join(words))
    assert tokenizer.convert_ids_to_tokens(ids) == [*words[-4:], *words[:4]]
    assert before == 4


# Chat templates, on the words of tests/tiny.py: as Gemma and Mistral have them, as others do.
REFUSES_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}<user> {{ m.content | trim }} </s> {% endfor %}<assistant>"
)
LEAVES_SYSTEM_OUT = (
    "{% for m in messages if m.role == 'user' %}<user> {{ m.content }} </s> {% endfor %}<assistant>"
)
FOLDS_SYSTEM_IN = (
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content ~ ' no ' %}{% else %}"
    "{% set s = '' %}{% endif %}<user> {{ s }}{{ messages[-1].content }} </s> <assistant>"
)
TEMPLATES = {
    "a system role": tiny.CHAT,
    "refuses it": REFUSES_SYSTEM,
    "leaves it out": LEAVES_SYSTEM_OUT,
    "folds it in": FOLDS_SYSTEM_IN,
}


def chat_model(folder: Path, template: str, **more: Any) -> LanguageModel:
    """A tiny model with a chat template of its own."""
    shutil.copytree(tiny.folder_of("llama"), folder)
    (folder / "chat_template.jinja").write_text(template)
    contract = tiny.contract_of("language", "llama", folder)
    return LanguageModel(contract.changed(**more), folder, EXACT)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_the_system_message_is_in_the_prompt_by_every_template(
    template: str, tmp_path: Path
) -> None:
    model = chat_model(tmp_path / "m", template, task={"system": "the burn today"})
    said = model.backbone.tokenizer.decode(model.prompts.prompt("left arm"))
    assert said.count("the burn today") == 1
    assert said.index("the burn today") < said.index("left arm")
    assert said.endswith("</s> <assistant>")
    plain = chat_model(tmp_path / "plain", template)
    assert "<user> left arm </s> <assistant>" in plain.backbone.tokenizer.decode(
        plain.prompts.prompt("left arm")
    )


@pytest.mark.parametrize("system", [None, "the burn today"])
@pytest.mark.parametrize("template", [*TEMPLATES.values(), ""], ids=[*TEMPLATES.keys(), "none"])
def test_a_long_prompt_keeps_the_system_message_and_the_template(
    template: str, system: str | None, tmp_path: Path
) -> None:
    """Before, the first tokens of the whole were left out: the system message, then the frame."""
    more: dict[str, Any] = {"task": {"system": system}, "model": {"max_tokens": 24}}
    model = chat_model(tmp_path / "m", template, **more)
    tokenizer = model.backbone.tokenizer
    rng = np.random.default_rng(0)
    words = [str(word) for word in rng.choice(["pain", "chest", "arm", "left", "right"], 60)]
    whole = model.prompts.prompt(" ".join(words))
    for answer in ("no", " ".join(words)):
        ids, before = model.prompts.tokens(" ".join(words), answer)
        assert len(ids) == 24  # no room is left, and none is wanting
        kept = [w for w in tokenizer.convert_ids_to_tokens(ids[:before]) if w in set(words)]
        assert kept == words[len(words) - len(kept) :]  # the end of the user's text
        # What stands about the user's text is there whole, at both ends.
        frame = [token for token in whole if tokenizer.decode([token]) not in set(words)]
        assert [token for token in ids[:before] if token in set(frame)] == frame
    assert len(model.prompts.prompt(" ".join(words), 24)) == 24


def test_a_frame_that_leaves_no_room_is_refused_at_the_start(tmp_path: Path) -> None:
    more: dict[str, Any] = {"task": {"system": " ".join(tiny.WORDS)}, "model": {"max_tokens": 16}}
    with pytest.raises(DataError, match=r"Raise model\.max_tokens") as error:
        chat_model(tmp_path / "m", tiny.CHAT, **more)
    assert error.value.code == "E310"
    more["model"]["max_tokens"] = 40  # as it says
    assert chat_model(tmp_path / "n", tiny.CHAT, **more).prompts.prompt("left arm")


def test_a_template_that_cannot_be_used_is_refused_at_the_start(tmp_path: Path) -> None:
    template = "{{ raise_exception('an image is needed') }}"
    with pytest.raises(DataError, match="an image is needed") as error:
        chat_model(tmp_path / "m", template)
    assert error.value.code == "E310"


def test_a_tokenizer_without_an_end_token_is_refused_at_the_start(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny.folder_of("llama"), folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in settings.items() if k != "eos_token"}))
    contract = tiny.contract_of("language", "llama", folder)
    with pytest.raises(DataError, match="names no eos_token") as error:
        LanguageModel(contract, folder, EXACT)
    assert error.value.code == "E310"


@pytest.mark.parametrize("model", ["bert", "llama"])
@pytest.mark.parametrize("kind", ["classification", "tokens", "cross", "bi"])
def test_a_text_of_nothing_is_read_too(kind: str, model: str) -> None:
    """Llama's tokenizers put nothing before or behind it. One such record must not stop a site."""
    contract = tiny.contract_of(kind, model)
    network = Encoder(contract, tiny.folder_of(model), EXACT)
    pair = kind in ("cross", "bi")
    texts: list[Any] = [("", ""), ("no pain", "")] if pair else ["", "no pain", " "]
    encoded = network.encode(texts)
    for adapter in (False, True):
        found = network.features(encoded, torch.tensor([0]), adapter=adapter)
        assert torch.isfinite(found).all()


def test_an_empty_prompt_moves_no_other_records_marks() -> None:
    """Where a tokenizer makes nothing of it, the answer's first token has nothing before it."""
    model = language_model()
    texts = [("", "left arm"), PAIRS[0], ("", "no"), PAIRS[1]]
    labels = model.objective.tensor([answer for _, answer in texts])
    encoded = model.encode(texts)
    assert encoded.marks is not None
    assert encoded.starts is not None
    assert len(encoded.marks) == int(encoded.starts[-1])
    found = model.predict(encoded, labels, adapter=True)
    alone = [model.predict(model.encode([pair]), labels[:1], adapter=True)[0] for pair in texts]
    np.testing.assert_allclose(found, alone, rtol=1e-5)
    assert [tokens for _, tokens, _ in found] == [2, 3, 1, 2]  # with the end; less the first


@pytest.mark.parametrize("chat", [False, True])
def test_it_answers_as_the_library_generates(chat: bool) -> None:
    model = language_model(chat=chat)
    whole, tokenizer = library(model, chat=chat), model.backbone.tokenizer
    told = set()
    for asked in ASKED:
        ids = torch.tensor([model.prompts.prompt(asked)])
        found = whole.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=6,
            pad_token_id=0,
        )[0, ids.shape[1] :]
        told.add(model.answer(asked, most=6))
        assert (
            model.answer(asked, most=6) == tokenizer.decode(found, skip_special_tokens=True).strip()
        )
    assert len(told) > 1


@torch.no_grad()
def greedy(model: LanguageModel, ids: list[int], most: int) -> list[int]:
    """The likeliest next tokens by what training computes."""
    start = len(ids)
    for _ in range(most):
        (lower,) = model._lower([[*ids, 0]])  # any token stands for the one that is asked for
        n = len(ids)
        encoded = Encoded(
            torch.tensor([[0]]),
            torch.zeros(1, 0),
            lower.hidden[0, : n + 1],
            torch.tensor([0, n + 1]),
            torch.tensor([*[IGNORED] * (n - 1), 0, IGNORED]),
        )
        logits = model(encoded, torch.tensor([0]), adapter=True)[0, -1]
        ids = [*ids, int(logits.argmax())]
        if ids[-1] == model.backbone.tokenizer.eos_token_id:
            break
    return ids[start:]


@pytest.mark.parametrize(
    "adapter",
    [
        {"kind": "ia3", "targets": ["q_proj", "down_proj"]},
        {"kind": "prefix", "length": 3},
        {"kind": "prompt", "length": 3},
    ],
    ids=lambda adapter: adapter["kind"],
)
def test_it_answers_as_it_was_trained(adapter: dict[str, Any]) -> None:
    """With every kind of adapter in its place."""
    dump = tiny.contract_of("language", "llama").model_dump(mode="json")
    contract = Contract.model_validate(dump | {"adapter": adapter})
    model, told = LanguageModel(contract, tiny.folder_of("llama"), EXACT), []
    for by in (0.0, 2.0):
        model.load(tiny.moved(model, by=by))
        for asked in ASKED:
            expected = greedy(model, model.prompts.prompt(asked), 6)
            told.append(model.answer(asked, most=6))
            decoded = model.backbone.tokenizer.decode(expected, skip_special_tokens=True)
            assert told[-1] == decoded.strip()
    assert told[: len(ASKED)] != told[len(ASKED) :]  # the adapter has a part in it


def test_only_the_adapter_can_be_trained() -> None:
    model = language_model()
    assert {name.rsplit(".", 1)[1] for name in model.named_tensors()} == {"lora_A", "lora_B"}
    assert model.trained_modules({"head"}) == []
    held = {p for module in model.trained_modules({"adapter"}) for p in module.parameters()}
    assert held == {p for p in model.parameters() if p.requires_grad}
    assert held == {p for n, p in model.named_tensors().items() if n.endswith("lora_B")}


def test_a_model_that_reads_both_ways_cannot_answer() -> None:
    folder = tiny.folder_of("bert")
    contract = tiny.contract_of("language", "llama").changed(
        model={"sha256": tiny.sha256(folder)}, adapter={"targets": tiny.TARGETS["bert"]}
    )
    with pytest.raises(DataError, match="reads both ways") as caught:
        LanguageModel(contract, folder, EXACT)
    assert caught.value.code == "E310"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"layers": 4}, "adapter.layers is more than the 3 layers of 'tiny'"),
        ({"targets": ["q_proj"]}, "names 'q_proj', which no adapted layer of this model is called"),
    ],
)
def test_an_adapter_that_the_model_has_no_place_for(more: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError) as caught:
        encoder_of("classification", "bert", adapter=more)
    assert words in str(caught.value)
    assert caught.value.code == "E310"


# --- public rows -------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "model"), tiny.CASES)
def test_every_task_is_scored_on_public_rows(kind: str, model: str, tmp_path: Path) -> None:
    from silotune.common.models.factory import build

    contract, rows = tiny.contract_of(kind, model), tiny.rows_of(kind, 24)
    network = build(contract, None if model == "one-hot" else tiny.folder_of(model), EXACT)
    test = PublicTest(
        contract,
        network,
        {
            "one": tiny.write(tmp_path / "one.csv", rows[:10]),
            "two": tiny.write(tmp_path / "two.csv", rows[10:]),
        },
    )
    adapter, adapter_active = tiny.moved(network), model != "one-hot"
    found = test.scores(adapter, adapter_active=adapter_active)
    assert list(found) == ["", "one", "two"]
    for name in contract.task.metrics:
        assert (found[""][name] is None) == (
            name in ("auc", "auprc") and contract.task.kind != "ranking"
        )
    # The rows of a group are scored as they are by themselves.
    alone = PublicTest(contract, network, {"one": tmp_path / "one.csv"})
    for name, value in alone.metrics(adapter, adapter_active).items():
        expected = found["one"][name]
        assert value == (None if expected is None else pytest.approx(expected, rel=1e-4)), name
    assert len(parse(tiny.table_of(rows), contract).inputs) == len(test.groups)
