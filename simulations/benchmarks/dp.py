"""What a private step costs: `make bench-dp` writes results/dp.json.

The yardstick is plain LoRA without privacy as Hugging Face users train it: PEFT on the stock model
with its default attention, float32, one backward pass of the batch's mean loss. Beside it, in
turns within one run: this engine on the same stock model, in float32 and with bf16 matrix products;
Opacus with hooks and with ghost clipping; and for adapters on the top two layers this project's own
classifier, which keeps the frozen layers' outputs. All sides have the same adapters (A frozen, B
and the head trained), the same 32 sequences of full length, one thread, and SGD; all private sides
clip and add noise. A ratio is that of the medians over the turns, ours over theirs.

Peak memory is the resident set's growth over the loaded model, each side in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from opacus import PrivacyEngine
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModel
from transformers.utils import logging as transformers_logging

from silotune.client.dp import CryptoNoiseOptimizer, private_gradient
from silotune.client.noise import NoiseSource
from silotune.common import model as models
from silotune.common.contract import Contract
from silotune.common.model import Encoder
from silotune.simulations import data

RESULTS = Path("simulations/benchmarks/results")
BATCH, MICRO, LABELS, RANK, TURNS = 32, 16, 3, 8, 7
CLIP, NOISE = 1.0, 1.0
TARGETS = {
    "qv": ["query", "value"],
    "all": ["query", "key", "value", "attention.output.dense", "intermediate.dense",
            "output.dense"],
}
CASES = [(64, "qv", 6), (128, "qv", 6), (128, "all", 6), (64, "qv", 2), (128, "qv", 2)]
Step = Callable[[], object]


class Net(nn.Module):
    """The stock encoder with PEFT's LoRA on its top `layers`, mean pooling and a linear head."""

    def __init__(self, targets: str, layers: int, attention: str) -> None:
        super().__init__()
        base = AutoModel.from_pretrained(
            data.fetch("all-MiniLM-L6-v2"), attn_implementation=attention, dtype=torch.float32,
            add_pooling_layer=False,
        )
        total = base.config.num_hidden_layers
        config = LoraConfig(
            r=RANK, lora_alpha=32, lora_dropout=0.0, target_modules=TARGETS[targets],
            layers_to_transform=list(range(total - layers, total)), layers_pattern="layer",
        )
        self.encoder = get_peft_model(base, config)
        self.head = nn.Linear(base.config.hidden_size, LABELS)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_("lora_B" in name or name.startswith("head."))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.to(hidden.dtype)[:, :, None]
        logits: Tensor = self.head((hidden * weights).sum(1) / weights.sum(1))
        return logits

    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]

    def linears(self) -> list[nn.Linear]:
        return [m for m in self.modules() if isinstance(m, nn.Linear) and m.weight.requires_grad]


def batch(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids [BATCH, tokens], mask, labels."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20_000, (BATCH, tokens), generator=g)
    return ids, torch.ones_like(ids), torch.randint(LABELS, (BATCH,), generator=g)


def plain(tokens: int, targets: str, layers: int) -> Step:
    """PEFT without privacy."""
    net, (ids, mask, labels) = Net(targets, layers, "sdpa"), batch(tokens)
    sgd = torch.optim.SGD(net.trained(), lr=0.01)

    def step() -> None:
        sgd.zero_grad()
        nn.functional.cross_entropy(net(ids, mask), labels).backward()  # type: ignore[no-untyped-call]
        sgd.step()

    return step


def engine(tokens: int, targets: str, layers: int, *, bf16: bool) -> Step:
    """client/dp.py on the stock model, in micro-batches as a worker has them."""
    net, (ids, mask, labels) = Net(targets, layers, "eager"), batch(tokens)

    def losses(index: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = net(ids[index], mask[index])
        return nn.functional.cross_entropy(logits.float(), labels[index], reduction="none")

    blocks = [(part, len(part)) for part in torch.split(torch.arange(BATCH), MICRO)]
    return _private(net.linears(), net.trained(), blocks, losses)


def cached(tokens: int, targets: str, layers: int, *, bf16: bool) -> Step:
    """This project's classifier: the frozen layers' outputs are kept, only the top is run."""
    models.BF16, models.KEPT = bf16, torch.bfloat16 if bf16 else torch.float32
    contract = Contract.model_validate({
        "format": 1, "name": "bench", "quorum": 1, "sites": [{"name": "a"}],
        "task": {"label_column": "y", "labels": [
            {"name": f"l{i}", "values": [str(i)]} for i in range(LABELS)
        ]},
        "input": {"kind": "text", "column": "x"},
        "model": {"kind": "encoder", "name": "all-MiniLM-L6-v2", "max_tokens": tokens,
                  "sha256": data.SOURCES["all-MiniLM-L6-v2"].sha256, "normalise": False},
        "adapter": {"rank": RANK, "alpha": 32.0, "layers": layers, "targets": TARGETS[targets]},
        "privacy": {"expected_records": float(BATCH)},
        "phases": [{"trains": "head+adapter", "rounds": 1, "sampling_rate": 1.0, "head_rate": 0.01,
                    "adapter_rate": 0.01}],
    })
    model = Encoder(contract, data.fetch("all-MiniLM-L6-v2"))
    model.load(model.initial_arrays())
    encoded = model.encode([" ".join(["river"] * (tokens + i)) for i in range(BATCH)])
    assert encoded.starts is not None
    assert int(encoded.starts[-1]) == BATCH * tokens
    labels = batch(tokens)[2]

    def losses(index: Tensor) -> Tensor:
        logits = model(encoded, index, adapter=True)
        return nn.functional.cross_entropy(logits, labels[index], reduction="none")

    blocks = list(model.micro_batches(encoded, torch.arange(BATCH), adapter=True))
    linears = model.trained_linears("head+adapter")
    return _private(linears, [p for m in linears for p in m.parameters()], blocks, losses)


def _private(
    linears: list[nn.Linear], parameters: list[nn.Parameter], blocks: Any,
    losses: Callable[[Tensor], Tensor],
) -> Step:
    sgd = torch.optim.SGD(parameters, lr=0.01)
    optimizer = CryptoNoiseOptimizer(
        sgd, source=NoiseSource(site="bench"), noise_multiplier=NOISE, clip_norm=CLIP,
        divisor=float(BATCH),
    )

    def step() -> None:
        private_gradient(linears, optimizer, blocks, losses)
        sgd.step()

    return step


def opacus(tokens: int, targets: str, layers: int, *, mode: str) -> Step:
    """Opacus' own engine, the whole batch at once, without Poisson sampling."""
    net, (ids, mask, labels) = Net(targets, layers, "sdpa"), batch(tokens)
    net.train()
    sgd = torch.optim.SGD(net.trained(), lr=0.01)
    loader = DataLoader(TensorDataset(ids, mask, labels), batch_size=BATCH)
    criterion: Any = nn.CrossEntropyLoss()
    more = {"criterion": criterion} if mode == "ghost" else {}
    found = PrivacyEngine().make_private(
        module=net, optimizer=sgd, data_loader=loader, noise_multiplier=NOISE,
        max_grad_norm=CLIP, poisson_sampling=False, grad_sample_mode=mode, **more,
    )
    net, optimizer = found[0], found[1]
    if mode == "ghost":
        criterion = found[2]

    def step() -> None:
        optimizer.zero_grad()
        criterion(net(ids, mask), labels).backward()
        optimizer.step()

    return step


def sides(layers: int) -> dict[str, Callable[..., Step]]:
    """Name of a side -> what builds its step."""
    found: dict[str, Callable[..., Step]] = {
        "peft": plain,
        "step": lambda *case: engine(*case, bf16=False),
        "bf16": lambda *case: engine(*case, bf16=True),
        "opacus-hooks": lambda *case: opacus(*case, mode="hooks"),
        "opacus-ghost": lambda *case: opacus(*case, mode="ghost"),
    }
    if layers == 2:
        found |= {
            "cached": lambda *case: cached(*case, bf16=False),
            "cached-bf16": lambda *case: cached(*case, bf16=True),
        }
    return found


def turns(case: tuple[int, str, int]) -> dict[str, list[float]]:
    """Seconds of each side's step, TURNS times in turn, after one that is not counted."""
    steps = {name: build(*case) for name, build in sides(case[2]).items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(TURNS + 1):
        for name, step in steps.items():
            models.BF16 = name == "cached-bf16"  # read when the model runs
            began = time.perf_counter()
            step()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def peak(name: str, case: tuple[int, str, int]) -> int:
    """Bytes by which the resident set grows over the built side, in a process of its own."""
    words = [sys.executable, "-m", "silotune.simulations.benchmarks.dp", "--peak", name,
             *map(str, case)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def measure_peak(name: str, case: tuple[int, str, int]) -> None:
    step = sides(case[2])[name](*case)
    models.BF16 = name == "cached-bf16"
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    for _ in range(3):
        step()
    lines = Path("/proc/self/status").read_text().splitlines()
    high = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    print(high - before)


def main() -> None:
    """Measure every case, print the table and write the results."""
    raw: dict[str, dict[str, list[float]]] = {}
    ratios: dict[str, float] = {}
    for case in CASES:
        tokens, targets, layers = case
        label = f"minilm-{tokens}-{targets}" + ("-top2" if layers == 2 else "")
        raw[label] = turns(case)
        medians = {name: float(np.median(found)) for name, found in raw[label].items()}
        ours = ["step", "bf16", *(["cached", "cached-bf16"] if layers == 2 else [])]
        for name in ours:
            ratios[f"{name}/peft/{label}"] = medians[name] / medians["peft"]
        for rival in ("opacus-hooks", "opacus-ghost"):
            ratios[f"step/{rival}/{label}"] = medians["step"] / medians[rival]
        bytes_ = {name: peak(name, case) for name in ["peft", *ours]}
        raw[label] |= {f"memory-{name}": [found] for name, found in bytes_.items()}
        for name in ours:
            ratios[f"memory/peft/{label}" + ("" if name == "step" else f"-{name}")] = (
                bytes_[name] / bytes_["peft"]
            )
        print(f"{label:20}", *(f"{n} {1000 * m:.0f} ms" for n, m in medians.items()), sep="  ")
    results = {
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread; torch "
        f"{torch.__version__}",
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "batch": BATCH, "turns": TURNS,
        "ratios": {name: round(value, 3) for name, value in ratios.items()}, "raw": raw,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "dp.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results["ratios"], indent=1))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    parser = argparse.ArgumentParser()
    parser.add_argument("--peak", nargs=4)
    asked = parser.parse_args().peak
    if asked:
        measure_peak(asked[0], (int(asked[1]), asked[2], int(asked[3])))
    else:
        main()
