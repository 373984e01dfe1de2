"""What a private step costs: `make bench-dp` writes results/dp.json.

The yardstick is plain LoRA without privacy as Hugging Face users train it: PEFT on the stock model
with its default attention, float32, one backward pass of the batch's mean loss. The same in bf16
autocast and in micro-batches stand beside it, so that what these save is not counted as ours. In
turns within one run: this engine on the same stock model, in float32 and with bf16 matrix products;
Opacus with hooks and with ghost clipping; and for adapters on the top two layers this project's own
classifier, which keeps the frozen layers' outputs. All sides have the same adapters (A frozen, B
and the classifier's head trained), the same sequences of full length, one thread, and SGD; all
private sides clip and add noise. A ratio is that of the medians over the turns, ours over theirs.

MiniLM classifies 32 sequences into three; SmolLM2 (135M parameters) predicts the next tokens of 8.

Peak memory is the resident set's growth over the loaded model (on a GPU: that of what torch has
allocated there), each side in a process of its own. `--device cuda` measures on a GPU and writes
dp-cuda.json; a step ends there when the GPU has done it.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from opacus import PrivacyEngine
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModel, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from silotune.client.training.dp_optimizer import DPOptimizer, private_gradient
from silotune.client.training.noise import NoiseSource
from silotune.client.training.per_sample_gradients import Losses
from silotune.client.training.privacy_units import Group, of_records
from silotune.common.contract.compute import Performance
from silotune.common.contract.contract import Contract
from silotune.common.models.attention import fuse_lora, register_attention
from silotune.common.models.batching import Block
from silotune.common.models.encoder import Encoder
from silotune.simulations.benchmarks import command_line
from silotune.simulations.datasets import catalog

RESULTS = Path("simulations/benchmarks/results")
MICRO, LABELS, RANK, TURNS = 16, 3, 8, 7
CLIP, NOISE = 1.0, 1.0
SOURCES = {"minilm": "all-MiniLM-L6-v2", "smollm2": "SmolLM2-135M-Instruct"}
TARGETS = {
    "minilm": {
        "qv": ["query", "value"],
        "all": [
            "query",
            "key",
            "value",
            "attention.output.dense",
            "intermediate.dense",
            "output.dense",
        ],
    },
    "smollm2": {"qv": ["q_proj", "v_proj"]},
}
Step = Callable[[], object]
HERE = torch.device("cpu")


class Case(NamedTuple):
    """layers: how many of the top ones carry adapters; 0 for all."""

    model: str
    tokens: int
    targets: str
    layers: int
    batch: int

    @property
    def label(self) -> str:
        top = f"-top{self.layers}" if self.layers else ""
        return f"{self.model}-{self.tokens}-{self.targets}{top}"


CASES = [
    Case("minilm", 64, "qv", 0, 32),
    Case("minilm", 128, "qv", 0, 32),
    Case("minilm", 128, "all", 0, 32),
    Case("minilm", 64, "qv", 2, 32),
    Case("minilm", 128, "qv", 2, 32),
    Case("smollm2", 64, "qv", 0, 8),
]


class Net(nn.Module):
    """The stock model with PEFT's LoRA: an encoder with mean pooling and a linear head, or a causal
    language model with its own frozen head."""

    def __init__(self, case: Case, attention: str) -> None:
        super().__init__()
        causal = case.model == "smollm2"
        kind: Any = AutoModelForCausalLM if causal else AutoModel
        more = {} if causal else {"add_pooling_layer": False}
        base = kind.from_pretrained(
            catalog.fetch(SOURCES[case.model]),
            attn_implementation=attention,
            dtype=torch.float32,
            trust_remote_code=False,
            **more,
        )
        total = base.config.num_hidden_layers
        config = LoraConfig(
            r=RANK,
            lora_alpha=32,
            lora_dropout=0.0,
            target_modules=TARGETS[case.model][case.targets],
            layers_to_transform=list(range(total - (case.layers or total), total)),
            layers_pattern="layers" if causal else "layer",
        )
        self.base = get_peft_model(base, config)
        self.head = None if causal else nn.Linear(base.config.hidden_size, LABELS)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_("lora_B" in name or name.startswith("head."))
        self.to(HERE)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits [n, labels], or [n, T - 1, vocabulary] for the tokens after the first."""
        found = self.base(input_ids=ids, attention_mask=mask)
        if self.head is None:
            after: Tensor = found.logits[:, :-1]
            return after
        weights = mask.to(found.last_hidden_state.dtype)[:, :, None]
        logits: Tensor = self.head((found.last_hidden_state * weights).sum(1) / weights.sum(1))
        return logits

    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]

    def linears(self) -> list[nn.Linear]:
        return [m for m in self.modules() if isinstance(m, nn.Linear) and m.weight.requires_grad]


class Criterion(nn.Module):
    """Cross entropy over each sequence's own targets; `reduction` as torch's losses have it."""

    def __init__(self) -> None:
        super().__init__()
        self.reduction = "mean"

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        each = (
            nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
            .view(len(targets), -1)
            .mean(dim=1)
        )
        return each.mean() if self.reduction == "mean" else each


def batch(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """ids [batch, tokens], mask, targets: labels, or the tokens after the first."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20_000, (case.batch, case.tokens), generator=g)
    labels = torch.randint(LABELS, (case.batch,), generator=g)
    ids, labels = ids.to(HERE), labels.to(HERE)
    return ids, torch.ones_like(ids), ids[:, 1:] if case.model == "smollm2" else labels


def plain(case: Case, *, bf16: bool = False, micro: int = 0) -> Step:
    """PEFT without privacy; `micro`: rows at once, with accumulated gradients."""
    net, (ids, mask, targets) = Net(case, "sdpa"), batch(case)
    sgd, criterion = torch.optim.SGD(net.trained(), lr=0.01), Criterion()
    parts = torch.split(torch.arange(case.batch), micro or case.batch)

    def step() -> None:
        sgd.zero_grad()
        for part in parts:
            with torch.autocast(HERE.type, torch.bfloat16, enabled=bf16):
                logits = net(ids[part], mask[part])
            (criterion(logits.float(), targets[part]) / len(parts)).backward()
        sgd.step()

    return step


def engine(case: Case, *, bf16: bool) -> Step:
    """client/training/dp_optimizer.py on the stock model, in micro-batches as a worker has them."""
    net, (ids, mask, targets) = Net(case, register_attention()), batch(case)
    fuse_lora(net)
    criterion = Criterion()
    criterion.reduction = "none"

    def losses(index: Tensor) -> Tensor:
        with torch.autocast(HERE.type, torch.bfloat16, enabled=bf16):
            logits = net(ids[index], mask[index])
        found: Tensor = criterion(logits.float(), targets[index])
        return found

    blocks = [Block(part, len(part)) for part in torch.split(torch.arange(case.batch), MICRO)]
    return _private(net.linears(), net.trained(), blocks, losses, case.batch)


def cached(case: Case, *, bf16: bool) -> Step:
    """This project's classifier: the frozen layers' outputs are kept, only the top is run."""
    contract = Contract.model_validate(
        {
            "format": 1,
            "name": "bench",
            "quorum": 1,
            "sites": [{"name": "a"}],
            "task": {
                "label_column": "y",
                "labels": [{"name": f"l{i}", "values": [str(i)]} for i in range(LABELS)],
            },
            "input": {"kind": "text", "column": "x"},
            "model": {
                "kind": "encoder",
                "name": SOURCES[case.model],
                "max_tokens": case.tokens,
                "sha256": catalog.SOURCES[SOURCES[case.model]].sha256,
                "normalise": False,
            },
            "adapter": {
                "rank": RANK,
                "alpha": 32.0,
                "layers": case.layers,
                "targets": TARGETS[case.model][case.targets],
            },
            "privacy": {"expected_units": float(case.batch)},
            "phases": [
                {
                    "trains": "head+adapter",
                    "rounds": 1,
                    "sampling_rate": 1.0,
                    "head_lr": 0.01,
                    "adapter_lr": 0.01,
                }
            ],
        }
    )
    # The batch is one block, as it is for the yardstick.
    performance = Performance(
        bf16="on" if bf16 else "off",
        micro_batch=case.batch,
        device=HERE.type,
    )
    model = Encoder(contract, catalog.fetch(SOURCES[case.model]), performance)
    model.load(model.initial_arrays())
    texts = [" ".join(["river"] * (case.tokens + i)) for i in range(case.batch)]
    encoded, targets = model.encode(texts), batch(case)[2]
    assert encoded.starts is not None
    assert int(encoded.starts[-1]) == case.batch * case.tokens
    criterion = Criterion()
    criterion.reduction = "none"

    def losses(index: Tensor) -> Tensor:
        found: Tensor = criterion(model(encoded, index, adapter=True), targets[index])
        return found

    blocks = list(model.micro_batches(encoded, torch.arange(case.batch), adapter=True))
    modules = model.trained_modules({"head", "adapter"})
    parameters = [p for module in modules for p in module.parameters()]
    return _private(modules, parameters, blocks, losses, case.batch)


def _private(
    modules: Sequence[nn.Module],
    parameters: list[nn.Parameter],
    blocks: list[Block],
    losses: Losses,
    size: int,
) -> Step:
    sgd = torch.optim.SGD(parameters, lr=0.01)
    optimizer = DPOptimizer(
        sgd,
        source=NoiseSource(site="bench"),
        noise_multiplier=NOISE,
        clip_norm=CLIP,
        divisor=float(size),
    )

    groups: list[Group] = list(of_records(size).groups(torch.arange(size), lambda _: blocks))

    def step() -> None:
        private_gradient(modules, optimizer, groups, losses)
        sgd.step()

    return step


def opacus(case: Case, *, mode: str) -> Step:
    """Opacus' own engine, the whole batch at once, without Poisson sampling."""
    net, (ids, mask, targets) = Net(case, "sdpa"), batch(case)
    net.train()
    sgd = torch.optim.SGD(net.trained(), lr=0.01)
    loader = DataLoader(TensorDataset(ids, mask, targets), batch_size=case.batch)
    criterion: Any = Criterion()
    more = {"criterion": criterion} if mode == "ghost" else {}
    found = PrivacyEngine().make_private(
        module=net,
        optimizer=sgd,
        data_loader=loader,
        noise_multiplier=NOISE,
        max_grad_norm=CLIP,
        poisson_sampling=False,
        grad_sample_mode=mode,
        **more,
    )
    wrapped, optimizer = found[0], found[1]
    if mode == "ghost":
        criterion = found[2]

    def step() -> None:
        optimizer.zero_grad()
        criterion(wrapped(ids, mask), targets).backward()
        optimizer.step()

    return step


SIDES: dict[str, Callable[[Case], Step]] = {
    "peft": plain,
    "peft-bf16": lambda case: plain(case, bf16=True),
    "peft-micro": lambda case: plain(case, micro=MICRO),
    "step": lambda case: engine(case, bf16=False),
    "bf16": lambda case: engine(case, bf16=True),
    "opacus-hooks": lambda case: opacus(case, mode="hooks"),
    "opacus-ghost": lambda case: opacus(case, mode="ghost"),
    "cached": lambda case: cached(case, bf16=False),
    "cached-bf16": lambda case: cached(case, bf16=True),
}
RIVALS = ("peft", "peft-bf16", "peft-micro", "opacus-hooks", "opacus-ghost")


def sides(case: Case) -> list[str]:
    return [name for name in SIDES if case.layers or not name.startswith("cached")]


def turns(case: Case) -> dict[str, list[float]]:
    """Seconds of each side's step, TURNS times in turn, after one that is not counted."""
    steps = {name: SIDES[name](case) for name in sides(case)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(TURNS + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            _finish()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def _finish() -> None:
    """Wait for what a GPU still has to do."""
    if HERE.type == "cuda":
        torch.cuda.synchronize()


def peak(name: str, case: Case) -> int:
    """Bytes by which the resident set grows over the built side, in a process of its own."""
    words = [
        sys.executable,
        "-m",
        "silotune.simulations.benchmarks.dp",
        "--peak",
        name,
        case.label,
        "--device",
        HERE.type,
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def measure_peak(name: str, case: Case) -> None:
    step = SIDES[name](case)
    if HERE.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            step()
        print(torch.cuda.max_memory_allocated() - before)
        return
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    for _ in range(3):
        step()
    lines = Path("/proc/self/status").read_text().splitlines()
    high = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    print(high - before)


def main(cases: list[Case]) -> None:
    """Measure the cases, print the table and write the results."""
    raw: dict[str, dict[str, list[float]]] = {}
    ratios: dict[str, float] = {}
    for case in cases:
        label = case.label
        raw[label] = turns(case)
        medians = {name: float(np.median(found)) for name, found in raw[label].items()}
        ours = [name for name in sides(case) if name not in RIVALS]
        for name in ours:
            ratios[f"{name}/peft/{label}"] = medians[name] / medians["peft"]
        ratios[f"bf16/peft-bf16/{label}"] = medians["bf16"] / medians["peft-bf16"]
        for rival in RIVALS[2:]:
            ratios[f"step/{rival}/{label}"] = medians["step"] / medians[rival]
        bytes_ = {name: peak(name, case) for name in ["peft", "peft-micro", *ours]}
        raw[label] |= {f"memory-{name}": [found] for name, found in bytes_.items()}
        for name in ours:
            ratios[f"memory/peft/{label}" + ("" if name == "step" else f"-{name}")] = (
                bytes_[name] / bytes_["peft"]
            )
        ratios[f"memory/peft-micro/{label}"] = bytes_["step"] / bytes_["peft-micro"]
        print(f"{label:20}", *(f"{n} {1000 * m:.0f} ms" for n, m in medians.items()), sep="  ")
    results = {
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip(),
        "machine": (
            torch.cuda.get_device_name()
            if HERE.type == "cuda"
            else f"{platform.machine()}, {os.cpu_count()} cores, one thread"
        )
        + f"; torch {torch.__version__}",
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "batch": {case.label: case.batch for case in cases},
        "turns": TURNS,
        "ratios": {name: round(value, 3) for name, value in ratios.items()},
        "raw": raw,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    name = "dp.json" if HERE.type == "cpu" else "dp-cuda.json"
    (RESULTS / name).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results["ratios"], indent=1))


if __name__ == "__main__":
    known = {case.label: case for case in CASES}
    parser = command_line.parser(__doc__)
    parser.add_argument(
        "--peak", nargs=2, metavar=("SIDE", "CASE"), help="only the peak memory of a side"
    )
    parser.add_argument(
        "--device", default="cpu", choices=["cpu", "cuda"], help="where to compute; cpu by default"
    )
    parser.add_argument(
        "cases",
        nargs="*",
        metavar="CASE",
        help=f"all if none is named; one of: {', '.join(known)}".replace("%", "%%"),
    )
    asked = parser.parse_args()
    if unknown := [case for case in asked.cases if case not in known]:
        parser.error(f"there is no case {', '.join(unknown)}; known: {', '.join(known)}")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    HERE = torch.device(asked.device)
    if asked.peak:
        measure_peak(asked.peak[0], known[asked.peak[1]])
    else:
        main([known[label] for label in asked.cases] or CASES)
