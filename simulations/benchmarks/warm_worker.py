"""A site's worker for rounds.py: the product's Worker, with a clock around each round's training.

Contracts know no causal language model yet. With --llama the worker gets one all the same, as a
Classifier of this file's own: records, ledger, checks, training, messages and socket stay the
product's. The contract that goes with it speaks of a BERT-type encoder with as many layers and the
same sizes of LoRA, so names are translated: its query is q_proj, its attention.output.dense o_proj.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from silotune.client import worker
from silotune.client.keys import Keys
from silotune.client.ledger import Ledger
from silotune.client.policy import permitting
from silotune.client.train import train_round
from silotune.client.wire import listen, serve
from silotune.common.classifier import Classifier, Encoded
from silotune.common.contract import Contract, EncoderModel, load
from silotune.common.model import build
from silotune.common.performance import Performance
from silotune.common.records import Inputs

TARGETS = {"q_proj": "attention.self.query", "o_proj": "attention.output.dense"}


class Llama(Classifier):
    """A causal language model with LoRA on all layers: mean of the last states, a linear head."""

    def __init__(self, contract: Contract, folder: Path) -> None:
        assert isinstance(contract.model, EncoderModel)
        assert contract.adapter is not None
        base = AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        super().__init__(
            base.config.hidden_size, len(contract.label_names), Performance(micro_batch=8)
        )
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.max_tokens = contract.model.max_tokens
        lora = LoraConfig(
            r=contract.adapter.rank, lora_alpha=int(contract.adapter.alpha), lora_dropout=0.0,
            target_modules=list(TARGETS),
        )
        self.base = get_peft_model(base, lora)
        self.requires_grad_(False)
        for name, parameter in self.named_tensors().items():
            parameter.requires_grad_(not name.endswith(".lora_A"))

    def named_tensors(self) -> dict[str, nn.Parameter]:
        found = super().named_tensors()
        for name, parameter in self.base.named_parameters():
            if ".lora_" in name:  # base_model.model.layers.0.self_attn.q_proj.lora_A.default.weight
                *_, layer, _, target, matrix, _, _ = name.split(".")
                found[f"encoder.layer.{layer}.{TARGETS[target]}.{matrix}"] = parameter
        return found

    def encode(self, inputs: Inputs) -> Encoded:
        rows = self.tokenizer(list(inputs), truncation=True, max_length=self.max_tokens)
        ids = [torch.tensor(row) for row in rows["input_ids"]]
        starts = torch.tensor([0, *map(len, ids)]).cumsum(0)
        return Encoded(torch.zeros(len(ids), self.head.in_features), torch.cat(ids), starts)

    def adapted(self, encoded: Encoded, index: Tensor) -> Tensor:
        assert encoded.hidden is not None
        assert encoded.starts is not None
        rows = [encoded.hidden[encoded.starts[i] : encoded.starts[i + 1]] for i in index.tolist()]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
        states = self.base(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        weights = mask[:, :, None].float()
        mean: Tensor = (states * weights).sum(1) / weights.sum(1)
        return mean


def clocked(file: Path) -> Callable[..., Any]:
    """train_round, which adds a line with its seconds to `file`."""

    def train(*args: Any) -> Any:
        began = time.perf_counter()
        found = train_round(*args)
        with file.open("a", encoding="utf-8") as lines:
            lines.write(f"{time.perf_counter() - began}\n")
        return found

    return train


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, help="of the site: keys/, state/, rows.csv")
    parser.add_argument("name")
    parser.add_argument("contract", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--llama", action="store_true")
    words = parser.parse_args()
    torch.set_num_threads(1)
    contract, folder = load(words.contract), words.folder
    keys = Keys.load(folder / "keys")

    def llama(*_: object) -> Classifier:
        return Llama(contract, words.model)

    with (
        mock.patch.object(worker, "train_round", clocked(folder / "seconds")),
        mock.patch.object(worker, "build", llama if words.llama else build),
    ):
        served = worker.Worker(
            permitting(contract, words.name, folder / "rows.csv", words.model), contract,
            Ledger.open(folder / "state", keys),
        )
        serve(served.handle, listen(folder / "socket" / "worker.sock"))


if __name__ == "__main__":
    main()
