"""Tiny models with random weights, and contracts and made-up rows for each kind of task."""

from __future__ import annotations

import csv
from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    BertTokenizer,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from silotune.client.training import dataset
from silotune.client.training.dataset import Dataset
from silotune.common.contract.contract import Contract
from silotune.common.data.records import Table
from silotune.common.model_files import model_folder
from silotune.common.models.base import Network
from silotune.common.protocol.messages import Arrays
from silotune.simulations.recipes.recipe_config import RecipeConfig

WORDS = ["pain", "in", "the", "chest", "arm", "left", "right", "no", "today", "burn"]
PIECES = ["##ing", "##s", "##ed"]
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
TARGETS = {
    "bert": ["query", "value", "dense"],
    **{kind: ["q_proj", "v_proj", "down_proj"] for kind in ("llama", "mistral", "qwen2")},
}
HEADER = ["id", "person", "query", "text", "question", "answer", "age", "smoker", "label"]
CHAT = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
# Each task on each kind of model; "bi" and "cross" are rankings.
CASES = [
    ("classification", "one-hot"),
    ("multi-label", "one-hot"),
    ("regression", "one-hot"),
    ("classification", "bert"),
    ("multi-label", "bert"),
    ("tokens", "bert"),
    ("regression", "bert"),
    ("bi", "bert"),
    ("cross", "bert"),
    ("classification", "llama"),
    ("tokens", "llama"),
    ("bi", "llama"),
    ("cross", "llama"),
    ("language", "llama"),
]


@lru_cache
def folder_of(kind: str, tied: bool = True, chat: bool = False, window: int | None = None) -> Path:
    """A tiny BERT, Llama, Mistral (with a sliding window) or Qwen2 as a folder, made once a
    process."""
    path = Path(mkdtemp(prefix="tiny-"))
    torch.manual_seed(0)
    if kind == "bert":
        names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *PIECES]
        config = BertConfig(vocab_size=len(names), num_attention_heads=2, **SIZES)
        BertModel(config, add_pooling_layer=False).save_pretrained(path)
        (path / "vocab.txt").write_text("\n".join(names) + "\n")
        BertTokenizer(vocab=str(path / "vocab.txt")).save_pretrained(path)
        return path
    names = ["<pad>", "</s>", "<unk>", *WORDS, *PIECES, "<system>", "<user>", "<assistant>"]
    config_class: Any = {
        "llama": LlamaConfig,
        "mistral": MistralConfig,
        "qwen2": Qwen2Config,
    }[kind]
    more = {"sliding_window": window} if kind == "mistral" else {}
    config = config_class(
        vocab_size=len(names),
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        **SIZES,
        **more,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer = Tokenizer(WordPiece({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = CHAT if chat else None
    fast.save_pretrained(path)
    return path


def sha256(folder: Path) -> str:
    return model_folder.manifest(folder).sha256


def task_of(kind: str) -> dict[str, Any]:
    labels = [{"name": name, "values": [name]} for name in "abc"]
    settings: dict[str, Any] = {
        "classification": {"labels": labels},
        "multi-label": {"labels": labels},
        "tokens": {"entities": ["site", "sign"]},
        "regression": {"lowest": 0.0, "highest": 100.0},
        "ranking": {"query_column": "query", "relevant": ["yes"], "others": ["no"]},
        "language": {},
    }
    kind = "ranking" if kind in ("bi", "cross") else kind
    return {"kind": kind, "label_column": "label", **settings[kind]}


def contract_of(
    kind: str, model: str, folder: Path | None = None, unit: str = "record", **more: Any
) -> Contract:
    """kind: a task, or "bi" or "cross" for the two rankings. more: sections, as in a file."""
    inputs: dict[str, Any] = {"kind": "text", "column": "text"}
    if kind in ("bi", "cross"):
        inputs = {"kind": "pair", "first": "question", "second": "answer", "by": kind}
    base: dict[str, Any] = {"name": "tiny", "max_tokens": 32}
    phase: dict[str, Any] = {"rounds": 1, "sampling_rate": 1.0, "budget_share": 0.5}
    head = phase | {"trains": "head", "head_lr": 1.0}
    both = phase | {"trains": "head+adapter", "head_lr": 1.0, "adapter_lr": 1.0}
    parts: dict[str, Any] = {"phases": [head, both]}
    if model == "one-hot":
        columns = [
            {
                "kind": "number",
                "name": "age",
                "phrase": "age",
                "edges": [40.0, 60.0],
                "words": ["young", "grown", "old"],
            },
            {
                "kind": "category",
                "name": "smoker",
                "phrase": "smoker",
                "values": {"yes": "yes", "no": "no"},
            },
        ]
        inputs = {"kind": "table", "columns": columns}
        parts = {"phases": [head | {"budget_share": 1.0}], "model": {"kind": "one-hot"}}
    else:
        base |= {"sha256": sha256(folder or folder_of(model))}
        base |= {"kind": "language-model" if kind == "language" else "encoder"}
        lora = {"rank": 2, "alpha": 8.0, "layers": 2, "targets": TARGETS[model]}
        parts |= {"model": base, "adapter": lora}
    if kind == "language":
        parts["phases"] = [
            phase | {"trains": "adapter", "adapter_lr": 1.0, "rounds": 2, "budget_share": 1.0}
        ]
    privacy: dict[str, Any] = {"clip_norm": 0.1, "expected_units": 16.0, "unit": unit}
    if unit == "entity":
        privacy["entity"] = {"key": ["person"], "max_records_per_entity": 3}
    return Contract.model_validate(
        {
            "format": 1,
            "name": "tiny",
            "quorum": 1,
            "sites": [{"name": "north"}],
            "task": task_of(kind),
            "input": inputs,
            "privacy": privacy,
            **parts,
            **more,
        }
    )


def label_of(kind: str, words: list[str], rng: np.random.Generator) -> str:
    if kind == "classification":
        return str(rng.choice(list("abc")))
    if kind == "multi-label":
        return "|".join(name for name in "abc" if rng.random() < 0.5)
    if kind == "tokens":
        return " ".join(str(rng.choice(["O", "B-site", "I-site", "B-sign"])) for _ in words)
    if kind == "regression":
        return f"{rng.uniform(-10, 110):.1f}"
    if kind == "language":
        return " ".join(rng.choice(WORDS, size=int(rng.integers(1, 6))))
    return str(rng.choice(["yes", "no"]))


def rows_of(kind: str, n: int, seed: int = 0) -> list[dict[str, str]]:
    """n records of 6 people, of different lengths, some of one text."""
    rng = np.random.default_rng(seed)
    found = []
    for row in range(n):
        words = [str(w) for w in rng.choice(WORDS[:9], size=int(rng.integers(2, 24)))]
        words += ["burning"] * int(rng.integers(2))
        found.append(
            {
                "id": str(row),
                "person": f"p{row % 6}",
                "query": f"q{row % 4}",
                "text": " ".join(words),
                "question": " ".join(WORDS[: row % 4 + 2]),
                "answer": " ".join(words[:12]),
                "age": str(rng.integers(20, 90)),
                "smoker": str(rng.choice(["yes", "no"])),
                "label": label_of(kind, words, rng),
            }
        )
    return found


def table_of(rows: list[dict[str, str]]) -> Table:
    return Table(
        "rows.csv",
        HEADER,
        [(line, [row[column] for column in HEADER]) for line, row in enumerate(rows, 2)],
    )


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([HEADER, *([row[c] for c in HEADER] for row in rows)])
    return path


def load(rows: list[dict[str, str]], contract: Contract, model: Network) -> Dataset:
    """Encoded anew, in blocks of its own."""
    dataset._encode.cache_clear()
    return dataset.load(table_of(rows), contract, model)


def moved(model: Network, seed: int = 0, by: float = 0.3) -> Arrays:
    """An adapter that is not zero."""
    rng = np.random.default_rng(seed)
    return {
        name: array
        if name.endswith("lora_A")
        else (array + rng.normal(0, by, array.shape)).astype(np.float32)
        for name, array in model.initial_arrays().items()
    }


def recipe_config(title: str, metric: str = "auc") -> RecipeConfig:
    """The least that a recipe's page says."""
    return RecipeConfig(
        title=title,
        about="Made-up rows.",
        metric=metric,
        repeats=1,
        baseline_repeats=1,
        evaluate_every=1,
        variants={},
    )
