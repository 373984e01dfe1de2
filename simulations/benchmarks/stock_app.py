"""LoRA in a Flower app as Flower's and PEFT's documentation teach it: the rival in rounds.py.

Each message runs in a new process: it loads the model, tokenises the site's records, trains and
sends the adapter and the head. rounds.py copies this file into the folder of a Flower app, as it
is, so nothing here knows of Silotune.

Run config: `model` (folder), `targets` (of LoRA, by commas), `rank`, `alpha`, `tokens`, `rounds`;
`marks`, the server's file, gets a line when a round is done. Node config: `data` (CSV with the
columns text and label), `seconds`, the node's file, gets a line with the seconds of each training.
"""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForSequenceClassification, AutoTokenizer

LABELS = 2
RATE = 1e-3

client = ClientApp()
server = ServerApp()


def load_model(context: Context) -> Any:
    config = context.run_config
    model = AutoModelForSequenceClassification.from_pretrained(
        str(config["model"]),
        num_labels=LABELS,
        dtype=torch.float32,
        local_files_only=True,
        trust_remote_code=False,
    )
    lora = LoraConfig(
        task_type="SEQ_CLS",
        r=int(config["rank"]),
        lora_alpha=int(config["alpha"]),
        lora_dropout=0.0,
        target_modules=str(config["targets"]).split(","),
    )
    return get_peft_model(model, lora)


def load_data(context: Context) -> Any:
    """The site's records as one batch."""
    with Path(str(context.node_config["data"])).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    tokenizer = AutoTokenizer.from_pretrained(
        str(context.run_config["model"]), local_files_only=True, trust_remote_code=False
    )
    batch = tokenizer(
        [row["text"] for row in rows],
        truncation=True,
        padding=True,
        return_tensors="pt",
        max_length=int(context.run_config["tokens"]),
    )
    batch["labels"] = torch.tensor([int(row["label"]) for row in rows])
    return batch


@client.train()
def train(message: Message, context: Context) -> Message:
    model, batch = load_model(context), load_data(context)
    arrays = message.content["arrays"]
    assert isinstance(arrays, ArrayRecord)
    set_peft_model_state_dict(model, arrays.to_torch_state_dict())
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)

    began = time.perf_counter()
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    with Path(str(context.node_config["seconds"])).open("a", encoding="utf-8") as file:
        file.write(f"{time.perf_counter() - began}\n")

    metrics = MetricRecord({"train_loss": loss.item(), "num-examples": len(batch["labels"])})
    adapter = ArrayRecord(get_peft_model_state_dict(model))
    return Message(RecordDict({"arrays": adapter, "metrics": metrics}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    def mark(server_round: int, _arrays: ArrayRecord) -> None:
        line = json.dumps({"at": time.time(), "event": "committed", "round": server_round})
        if server_round:  # 0 is before the first
            with Path(str(context.run_config["marks"])).open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    FedAvg(fraction_evaluate=0.0).start(
        grid,
        ArrayRecord(get_peft_model_state_dict(load_model(context))),
        num_rounds=int(context.run_config["rounds"]),
        evaluate_fn=mark,
    )
