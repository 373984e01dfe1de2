"""What every side of sim.py does: the clients' texts, the contract, the model and its one step.

A side is a process that gets a folder (`lay`), a case and a number of rounds. It imports its
libraries, starts its clock, and prints a line of JSON: when each round was done, its memory, and
how far its weights are after AGREE rounds (as a file).
"""

from __future__ import annotations

import csv
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

CLIENTS, TEXTS, PUBLIC = 20, 64, 64  # TEXTS a client; PUBLIC: for ours, which scores at the end
TOKENS, RANK, ALPHA, LAYERS = 48, 8, 16.0, (4, 5)
TARGETS = "query", "key", "value", "dense"
RATE = 2.0  # of head and LoRA alike
AGREE = 2  # the round after which the sides' weights are compared
LABELS = "negative", "neutral", "positive"
MODEL = "all-MiniLM-L6-v2"
HEAD, ADAPTER = "head", "adapter"
WHO = tuple(f"client-{at:02d}" for at in range(CLIENTS))

Weights = dict[str, Any]  # public name (common/protocol/tensors.py) -> array


def contract(sha256: str, case: str, rounds: int, *, private: bool = False) -> Any:
    """One step a round over all of a client's texts; in mode "dp" with noise for epsilon 8."""
    from silotune.common.contract.contract import Contract

    adapts = case == ADAPTER
    lora = {"rank": RANK, "alpha": ALPHA, "layers": len(LAYERS), "targets": TARGETS, "seed": 11}
    phase = {"trains": "head+adapter", "adapter_lr": RATE} if adapts else {"trains": "head"}
    return Contract.model_validate(
        {
            "format": 1,
            "name": "bench-sim",
            "quorum": CLIENTS,
            "task": {
                "label_column": "sentiment",
                "labels": [{"name": name, "values": [name]} for name in LABELS],
            },
            "input": {"kind": "text", "column": "text"},
            "model": {"kind": "encoder", "name": MODEL, "sha256": sha256, "max_tokens": TOKENS},
            "adapter": lora if adapts else None,
            "privacy": {
                "mode": "dp" if private else "none",
                "epsilon": 8.0,
                "delta": 1e-4,
                "expected_units": float(TEXTS),
            },
            "phases": [phase | {"rounds": rounds, "sampling_rate": 1.0, "head_lr": RATE}],
            "aggregation": {"server_momentum": 0.0},
            "sites": [{"name": name} for name in WHO],
        }
    )


def lay(folder: Path) -> Path:
    """Write the rows as run_job reads them, and each case's first weights; returns the model's
    folder. The texts are the airline tweets of a shipped recipe, in one fixed order."""
    from silotune.common.models.factory import build
    from silotune.simulations.comparison.recipe import load_recipe
    from silotune.simulations.datasets import catalog

    place = load_recipe("service-sentiment").rows(folder).folder
    with (place / "pooled.csv").open(newline="", encoding="utf-8") as file:
        rows = [(row["text"], row["sentiment"]) for row in csv.DictReader(file)]
    drawn = [rows[at] for at in np.random.default_rng(0).permutation(len(rows))]
    for at, name in enumerate(WHO):
        _write(folder / "train" / f"{name}.csv", drawn[TEXTS * at : TEXTS * (at + 1)])
    _write(folder / "test" / "public.csv", drawn[TEXTS * CLIENTS :][:PUBLIC])
    model = catalog.fetch(MODEL)
    for case in (HEAD, ADAPTER):
        first = build(contract(catalog.SOURCES[MODEL].sha256, case, AGREE), model).initial_arrays()
        keep(folder / case, first)
    facts = {"model": str(model), "sha256": catalog.SOURCES[MODEL].sha256}
    (folder / "facts.json").write_text(json.dumps(facts))
    return model


def _write(path: Path, rows: list[tuple[str, str]]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "sentiment"), *rows])


def facts_of(folder: Path) -> dict[str, str]:
    """model: its folder; sha256: as a contract names it."""
    found: dict[str, str] = json.loads((folder / "facts.json").read_text())
    return found


def rows_of(folder: Path, who: str) -> tuple[list[str], list[int]]:
    """A client's texts and labels."""
    with (folder / "train" / f"{who}.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [row["text"] for row in rows], [LABELS.index(row["sentiment"]) for row in rows]


def keep(path: Path, weights: Mapping[str, Any]) -> None:
    """Write weights; `read` has them back. What `lay` writes under a case's name are the first."""
    from safetensors.numpy import save_file

    save_file({name: np.array(array, np.float32) for name, array in weights.items()}, path)


def read(path: Path) -> Weights:
    from safetensors.numpy import load_file

    return load_file(path)


def encoder(model: str, case: str) -> Any:
    """A rival's model: MiniLM by transformers in float32, by PEFT with LoRA in the adapter case.
    Everything is frozen but B; dropout is off, as in ours."""
    import torch
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import AutoModel, logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    base: Any = AutoModel.from_pretrained(
        model,
        dtype=torch.float32,
        local_files_only=True,
        trust_remote_code=False,
        add_pooling_layer=False,
    )
    base.requires_grad_(False)
    if case == ADAPTER:
        lora = LoraConfig(
            r=RANK,
            lora_alpha=int(ALPHA),
            lora_dropout=0.0,
            target_modules=list(TARGETS),
            layers_to_transform=list(LAYERS),
            layers_pattern="layer",
        )
        base = inject_adapter_in_model(lora, base)
        for name, parameter in base.named_parameters():
            parameter.requires_grad_("lora_B" in name)
    return base.eval()


def logits(base: Any, head: Any, ids: Any, mask: Any) -> Any:
    """What the contract's model computes: the mean token, normalised, then a linear head."""
    from torch.nn import functional

    states = base(input_ids=ids, attention_mask=mask).last_hidden_state
    weights = mask.to(states.dtype)[:, :, None]
    mean = (states * weights).sum(1) / weights.sum(1)
    return head(functional.normalize(mean.float(), dim=-1))


def batch(tokenizer: Any, texts: list[str], labels: list[int]) -> dict[str, Any]:
    """A client's texts as one batch, padded to its longest."""
    import torch

    found = tokenizer(texts, truncation=True, max_length=TOKENS, padding=True, return_tensors="pt")
    return {
        "ids": found["input_ids"],
        "mask": found["attention_mask"],
        "labels": torch.tensor(labels),
    }


def tensors(base: Any, head: Any) -> dict[str, Any]:
    """A rival's head and LoRA factors by their public names."""
    found = {f"head.{name}": p for name, p in head.named_parameters()}
    return found | {
        name.replace(".default.weight", ""): p
        for name, p in base.named_parameters()
        if "lora_" in name
    }


def libraries() -> None:
    """Import what a side needs, so that neither its clock nor its memory counts that."""
    import peft
    import torch
    from transformers.models.bert import modeling_bert

    del peft, modeling_bert
    torch.set_num_threads(cores())
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def cores() -> int:
    return len(os.sched_getaffinity(0))


@dataclass
class Clock:
    """When rounds were done, in seconds since it was made; where the weights of AGREE go."""

    out: Path
    began: float = field(default_factory=time.perf_counter)
    marks: list[float] = field(default_factory=list)

    def done(self, weights: Mapping[str, Any] | None = None) -> None:
        """A round is done. weights: as they are now, where they are at hand."""
        self.marks.append(time.perf_counter() - self.began)
        if weights is not None and len(self.marks) == AGREE:
            keep(self.out, weights)


class Memory:
    """By how many bytes this process grows from here on: at its peak, in the end, and of that the
    libraries' own code, which is read as it is used."""

    def __init__(self) -> None:
        self._before, self._code_before = self._status("VmRSS"), self._code()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts here

    def found(self) -> dict[str, int]:
        return {
            "peak": self._status("VmHWM") - self._before,
            "after": self._status("VmRSS") - self._before,
            "code": self._code() - self._code_before,
            "libraries": self._before,
        }

    @staticmethod
    def _status(key: str) -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split(f"{key}:")[1].split()[0]) * 1024

    @staticmethod
    def _code() -> int:
        total, library = 0, False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if line.startswith("Rss:"):
                total += library * int(line.split()[1]) * 1024
            elif "-" in line.split(maxsplit=1)[0]:  # a mapping's addresses; its file ends the line
                library = ".so" in line
        return total


def report(clock: Clock, memory: Mapping[str, int], **more: int) -> None:
    """A side's last line."""
    print(json.dumps({"marks": clock.marks, "memory": dict(memory), **more}), flush=True)
