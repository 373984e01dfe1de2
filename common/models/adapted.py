"""A base model whose lower layers are frozen and whose top layers carry the adapter.

Frozen and adapted layers run their matrix products in bfloat16 where the device is made for it;
weights, normalisation, the head, per-record gradients and everything after them are float32.

Shapes: U texts, n of them in a block, T tokens, H hidden size, r rank.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from silotune.common.contract.adapter import Lora
from silotune.common.contract.compute import Performance
from silotune.common.contract.contract import Contract
from silotune.common.contract.model import LanguageModel, OneHotModel
from silotune.common.contract.schedule import TensorGroup
from silotune.common.errors import DataError
from silotune.common.models import adapters, backbone
from silotune.common.models.activation_cache import allocate
from silotune.common.models.backbone import Around, Backbone
from silotune.common.models.base import Encoded, Network, device_of, has_bf16
from silotune.common.models.batching import BUCKET, blocks_of
from silotune.common.protocol.messages import Arrays
from silotune.common.protocol.tensors import trained_names

STEP = 4  # BUCKET where nothing is private


class FrozenBlock(NamedTuple):
    """A block of texts behind the frozen layers. rows: their numbers, [n]; hidden [n, T, H]."""

    rows: Tensor
    hidden: Tensor
    around: Around
    mask: Tensor


class Adapted(Network):
    """`contract.adapter` says what the top layers carry; the base is shared in the process."""

    def __init__(
        self, contract: Contract, folder: Path, performance: Performance | None = None
    ) -> None:
        performance, spec = performance or Performance(), contract.model
        assert not isinstance(spec, OneHotModel)
        base = backbone.read(folder, spec.sha256, device_of(performance))
        super().__init__(base.size, contract.task, performance)
        self.bf16 = performance.bf16 == "on" or (
            performance.bf16 == "auto"
            and performance.gradients == "expanded"
            and has_bf16(self.device)
        )
        self.max_tokens = spec.max_tokens
        self.adapter = contract.adapter
        # A tuple keeps the shared base out of this module's parameters and state.
        self._shared = (base,)
        self.first_adapted, self.top, self.virtual = adapt(contract, base, performance)
        self.requires_grad_(False)
        tensors = self.named_tensors()
        for name in trained_names(tensors, {"head", "adapter"}):
            tensors[name].requires_grad_()
        self.eval()
        self.to(self.device)

    @property
    def backbone(self) -> Backbone:
        return self._shared[0]

    def named_tensors(self) -> dict[str, nn.Parameter]:
        found = super().named_tensors()
        for name, parameter in self.top.named_parameters():
            if public := adapters.public_name(name):
                number, rest = public.split(".", 1)
                layer = self.first_adapted + int(number)
                found[f"{self.backbone.prefix}.{layer}.{rest}"] = parameter
        if self.virtual is not None:
            found["prompt.tokens"] = self.virtual.tokens
        return found

    def trained_modules(self, groups: Collection[TensorGroup]) -> list[nn.Module]:
        found = super().trained_modules(groups)
        if "A" in groups:
            found += adapters.lora_a_modules(self.top)
        if "adapter" in groups:
            found += adapters.trainable_modules(self.top)
            found += [self.virtual] if self.virtual is not None else []
        return found

    def initial_arrays(self) -> Arrays:
        """The head zero; the adapter such that it changes nothing, or little, at first."""
        arrays = super().initial_arrays()
        if self.adapter:
            adapters.begin(arrays, self.adapter, dict(self._named_layers()))
        return arrays

    @torch.no_grad()
    def forward_error(self, lengths: Sequence[int], *, bf16: bool) -> float:
        """Against transformers' own forward pass `base(input_ids, attention_mask)`, with its own
        attention and masks; the tokens are random ones."""
        base, before = self.backbone, self.bf16
        ids, mask = (t.to(self.device) for t in base.made_up(lengths, _width_of(max(lengths))))
        expected = _sharing(base.base)  # with a configuration of its own, which no other thread has
        expected.set_attn_implementation("eager")
        wanted = expected(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        self.bf16 = bf16
        try:
            states = self._layers(base.embed(ids), base.around(mask), base.layers)
            found = base.last(states)
        finally:
            self.bf16 = before
        errors = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        return float(errors[mask].max())  # NaN stays NaN

    def _named_layers(self) -> Iterator[tuple[str, nn.Module]]:
        """The modules of the adapted layers by their public names."""
        for name, module in self.top.named_modules():
            if name:
                number, _, rest = name.partition(".")
                layer = f"{self.backbone.prefix}.{self.first_adapted + int(number)}"
                yield f"{layer}.{rest}" if rest else layer, module

    @staticmethod
    def _starts(rows: Sequence[Sequence[int]]) -> Tensor:
        """[U + 1], where each text's tokens begin."""
        return torch.tensor([0, *map(len, rows)]).cumsum(0)

    def _lower(self, rows: Sequence[Sequence[int]]) -> Iterator[FrozenBlock]:
        """Texts, as token numbers, through the frozen layers, block by block."""
        base = self.backbone
        lengths = torch.tensor([len(row) for row in rows])
        frozen = base.layers[: self.first_adapted]
        for index, n in blocks_of(torch.arange(len(rows)), lengths, self.performance.micro_batch):
            width = _width_of(int(lengths[index].max()))
            ids = torch.full((len(index), width), base.tokenizer.pad_token_id)
            mask = torch.zeros(ids.shape, dtype=torch.bool)
            for i, row in enumerate(index.tolist()):
                ids[i, : len(rows[row])] = torch.tensor(rows[row])
                mask[i, : len(rows[row])] = True
            ids, mask = ids.to(self.device), mask.to(self.device)
            around = base.around(mask)
            hidden = self._layers(base.embed(ids), around, frozen)
            yield FrozenBlock(index[:n], hidden, around, mask)

    def _room(self, tokens: int) -> Tensor:
        """[tokens, H] for the input of the adapted layers."""
        return allocate(
            tokens,
            self.backbone.size,
            torch.bfloat16 if self.bf16 else torch.float32,
            most_bytes=self.performance.cache_megabytes << 20,
            folder=self.performance.cache_folder,
        )

    @staticmethod
    def _keep(place: Tensor, values: Tensor, index: Tensor, starts: Tensor) -> None:
        """Put the texts' values [n, T, ...] where they belong in what is by token."""
        for i, states in zip(index.tolist(), values.to(place.dtype).cpu(), strict=False):
            place[starts[i] : starts[i + 1]] = states[: int(starts[i + 1] - starts[i])]

    def _upper(self, encoded: Encoded, texts: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """The adapted layers on texts [n] of one bucket: [n, width, H], and their mask."""
        assert encoded.hidden is not None
        assert encoded.starts is not None
        hidden = encoded.padded(encoded.hidden, texts, width).to(self.device).float()
        lengths = (encoded.starts[1:] - encoded.starts[:-1])[texts]
        mask = (torch.arange(width)[None, :] < lengths[:, None]).to(self.device)
        more, seen = 0, mask
        if self.virtual is not None:
            hidden, more = self.virtual.before(hidden), len(self.virtual.tokens)
            seen = nn.functional.pad(mask, (more, 0), value=True)
        states = self._layers(hidden, self.backbone.around(seen), self.top)
        return self.backbone.last(states)[:, more:], mask

    def _width(self, encoded: Encoded, index: Tensor) -> int:
        """The padded length of a block of records; where they are private all of one bucket."""
        step = BUCKET if self.private else STEP
        return -(-int(encoded.lengths(index).max()) // step) * step

    def _layers(self, hidden: Tensor, around: Around, layers: Iterable[nn.Module]) -> Tensor:
        """hidden [n, T, H] through layers."""
        base = self.backbone
        checkpointed = self.performance.checkpointing and torch.is_grad_enabled()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            for layer in layers:
                if checkpointed:
                    hidden = checkpoint(base.through, layer, hidden, around, use_reentrant=False)
                else:
                    hidden = base.through(layer, hidden, around)
        return hidden.float()


def adapt(
    contract: Contract, base: Backbone, performance: Performance
) -> tuple[int, nn.ModuleList, adapters.VirtualTokens | None]:
    """The contract's adapter in the layers that it adapts, on the base's frozen weights.

    Returns:
        The number of the first adapted layer, the adapted layers, and what stands before them.

    Raises:
        DataError: E310 if the contract cannot be carried out with this model, or not with this way
            of computing gradients.
    """
    spec, adapter = contract.model, contract.adapter
    assert not isinstance(spec, OneHotModel)
    if isinstance(spec, LanguageModel) and not base.causal:
        raise DataError(
            f"'{spec.name}' reads both ways; a task of language needs a model that writes from "
            "left to right (llama, mistral, qwen2).",
            code="E310",
        )
    first = len(base.layers) - (adapter.layers if adapter else 0)
    if first < 0:
        raise DataError(
            f"adapter.layers is more than the {len(base.layers)} layers of '{spec.name}'.",
            code="E310",
        )
    positions = getattr(base.base.config, "max_position_embeddings", None)
    if positions is not None and _width_of(spec.max_tokens) > positions - base.unused_places:
        raise DataError(
            f"model.max_tokens = {spec.max_tokens} is too long: texts are padded to "
            f"{_width_of(spec.max_tokens)} tokens, and '{spec.name}' is made for at most "
            f"{positions - base.unused_places}.",
            code="E310",
        )
    top = nn.ModuleList(_sharing(layer) for layer in list(base.layers)[first:])
    if adapter is None:
        return first, top, None
    if not isinstance(adapter, Lora) and performance.gradients != "expanded":
        raise DataError(
            f'performance.gradients = "{performance.gradients}" (Opacus) knows Linear layers '
            f'alone; adapter.kind = "{adapter.kind}" needs "expanded".',
            code="E310",
        )
    virtual = adapters.inject(adapter, top, base.size)
    if contract.aggregation.method == "fedex":
        adapters.correct(top)
    return first, top, virtual


def _width_of(tokens: int) -> int:
    """What a text of so many tokens is padded to where it is private."""
    return -(-tokens // BUCKET) * BUCKET


def _sharing(module: Any) -> Any:
    """A module of its own on the same frozen weights: to put an adapter into, or to set up in
    another way."""
    weights = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in weights})
