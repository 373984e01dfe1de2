"""A small BERT that reads Chinese character by character, pre-trained on public newspaper text.

    python -m silotune.simulations.datasets.character_model OUT_FOLDER

It makes models/chinese-characters: on one core in about a minute, from a fixed seed (on another
kind of processor sums are rounded otherwise, and the weights are not the same bytes). The text is
the People's Daily of January 1998, in which words are separated. Two objectives are trained at
once: whole masked words are guessed (Cui et al., arXiv 1906.08101), and the mean states of two
pieces that follow each other are distinguished from those of other pieces (InfoNCE, arXiv
1807.03748), for a text's mean state is what a recipe's head reads. Neither saw a review.

Shapes: C characters of the text, W words, n pieces, T tokens, H hidden size, V tokens known.
"""

from __future__ import annotations

import argparse
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from silotune.common.models.attention import register_attention
from silotune.common.runtime.terminal import echo
from silotune.simulations.datasets import catalog

SOURCE = "peoples-daily"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # their places are their numbers
PAD, UNKNOWN, FIRST, LAST, MASK = range(len(SPECIAL))
NO_WORD = -1  # of a special token
WIDTHS = (32, 64, 128)  # tokens of a piece, drawn for each step
MASKED, KEPT, SWAPPED = 0.15, 0.1, 0.1  # of all words; of the masked ones as they are, or another
TEMPERATURE = 0.1
HELD_OUT = 0.02  # of the words, the last ones: for the loss that is printed


@dataclass(frozen=True)
class Settings:
    """Of the model and of its training. tokens: of a step. seconds: between printed lines."""

    known: int = 3500
    hidden: int = 256
    layers: int = 1
    heads: int = 8
    inner: int = 512
    steps: int = 700
    tokens: int = 4096
    rate: float = 1.5e-3
    warmup_rounds: float = 0.05  # of the steps
    seed: int = 1998
    seconds: float = 5.0


@dataclass(frozen=True)
class Text:
    """ids [C]; word [C], the word that each character is of; starts [W], each word's first one."""

    ids: Tensor
    word: Tensor
    starts: Tensor

    @classmethod
    def of(cls, words: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> Text:
        known = tokenizer.get_vocab()
        lengths = torch.tensor([len(word) for word in words])
        return cls(
            torch.tensor([known.get(c, UNKNOWN) for word in words for c in word]),
            torch.repeat_interleave(torch.arange(len(words)), lengths),
            lengths.cumsum(0) - lengths,
        )


def read_words(file: Path) -> list[str]:
    """The words of a tagged text, `word/tag` between spaces, in the tokenizer's own form."""
    pairs = file.read_text(encoding="utf-8").split()
    words = (unicodedata.normalize("NFKC", pair.rpartition("/")[0]).lower() for pair in pairs)
    return [bare for word in words if (bare := "".join(word.split()))]


def make_tokenizer(words: Sequence[str], known: int) -> PreTrainedTokenizerFast:
    """A character, a token: the most frequent ones, behind the special ones."""
    counts = Counter(c for word in words for c in word)
    often = sorted(counts, key=lambda c: (-counts[c], c))[: known - len(SPECIAL)]
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *often))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[UNKNOWN]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex("."), "isolated"),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", FIRST), ("[SEP]", LAST)]
    )
    roles = [f"{token[1:-1].lower()}_token" for token in SPECIAL]
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        model_max_length=max(WIDTHS),
        model_input_names=["input_ids", "attention_mask"],
        **dict(zip(roles, SPECIAL, strict=True)),
    )


def pieces(text: Text, begin: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Whole words from the words `begin` [n] on, as many as fit: token numbers [n, width], the word
    of each [n, width] (NO_WORD for special tokens), and the word that comes next [n]."""
    at = text.starts[begin][:, None] + torch.arange(width - 1)
    ids, words = text.ids[at], text.word[at]
    after = words[:, -1]  # the first word that does not fit, or not all of it
    ids, words = ids[:, :-1], words[:, :-1]
    inside = words < after[:, None]
    ids = nn.functional.pad(ids.masked_fill(~inside, PAD), (1, 1), value=PAD)
    words = nn.functional.pad(words.masked_fill(~inside, NO_WORD), (1, 1), value=NO_WORD)
    ids[:, 0] = FIRST
    ids.scatter_(1, inside.sum(1, keepdim=True) + 1, LAST)
    return ids, words, after


def mask_words(
    ids: Tensor, words: Tensor, known: int, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Hide whole words: the new token numbers [n, T], and which are to be guessed [n, T]."""
    draw = torch.rand(ids.shape, generator=rng)
    fate = torch.rand(ids.shape, generator=rng)
    # What is drawn for a word is what is drawn for the first of its characters.
    starts = torch.ones_like(words, dtype=torch.bool)
    starts[:, 1:] = words[:, 1:] != words[:, :-1]
    first = torch.where(starts, torch.arange(ids.shape[1]), 0).cummax(1).values
    hidden = (draw.gather(1, first) < MASKED) & (words != NO_WORD)
    fate = fate.gather(1, first)
    other = torch.randint(len(SPECIAL), known, ids.shape, generator=rng)
    new = torch.where(hidden & (fate >= KEPT), MASK, ids)
    return torch.where(hidden & (fate >= 1 - SWAPPED), other, new), hidden


class Pretraining(nn.Module):
    """The BERT and the heads that only its pre-training needs."""

    def __init__(self, settings: Settings, known: int) -> None:
        super().__init__()
        self.bert = BertModel(
            BertConfig(
                vocab_size=known,
                hidden_size=settings.hidden,
                num_hidden_layers=settings.layers,
                num_attention_heads=settings.heads,
                intermediate_size=settings.inner,
                max_position_embeddings=max(WIDTHS),
                type_vocab_size=1,
                pad_token_id=PAD,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            ),
            add_pooling_layer=False,
        )
        self.bert.set_attn_implementation(register_attention())  # half the time of the stock one
        size = settings.hidden
        self.guess = nn.Sequential(nn.Linear(size, size), nn.GELU(), nn.LayerNorm(size))
        self.bias = nn.Parameter(torch.zeros(known))

    def forward(self, ids: Tensor, truth: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The two losses, in nats: of the `hidden` tokens of pieces [n, T], and of telling that
        piece n / 2 + i is what follows piece i."""
        seen = ids != PAD
        with torch.autocast("cpu", torch.bfloat16):
            states = self.bert(input_ids=ids, attention_mask=seen.long()).last_hidden_state
            embeddings = self.bert.embeddings.word_embeddings.weight
            logits = self.guess(states[hidden]) @ embeddings.T
        words = nn.functional.cross_entropy(logits.float() + self.bias, truth[hidden])
        weights = seen[:, :, None].float()
        means = nn.functional.normalize((states.float() * weights).sum(1) / weights.sum(1), dim=-1)
        one, next_one = means.chunk(2)
        alike = one @ next_one.T / TEMPERATURE
        right = torch.arange(len(alike))
        follows = nn.functional.cross_entropy(alike, right)
        return words, (follows + nn.functional.cross_entropy(alike.T, right)) / 2


def _losses(
    model: Pretraining, text: Text, known: int, width: int, tokens: int, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The two losses on newly drawn pieces."""
    room = int((text.starts <= len(text.ids) - 2 * width).sum())  # for two pieces
    begin = torch.randint(room, (max(tokens // width // 2, 2),), generator=rng)
    ids, words, after = pieces(text, begin, width)
    more_ids, more_words, _ = pieces(text, after, width)
    truth = torch.cat([ids, more_ids])
    masked, hidden = mask_words(truth, torch.cat([words, more_words]), known, rng)
    found: tuple[Tensor, Tensor] = model(masked, truth, hidden)
    return found


def train(
    words: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    settings: Settings,
    show: Callable[[str], None] = print,
) -> Pretraining:
    """A model pre-trained on `words`, by AdamW with a warm-up and a cosine's end."""
    torch.manual_seed(settings.seed)
    rng = torch.Generator().manual_seed(settings.seed)
    known, cut = len(tokenizer), int(len(words) * (1 - HELD_OUT))
    text, rest = Text.of(words[:cut], tokenizer), Text.of(words[cut:], tokenizer)
    model = Pretraining(settings, known)
    optimiser = torch.optim.AdamW(model.parameters(), settings.rate, (0.9, 0.98), weight_decay=0.01)
    warm = max(int(settings.steps * settings.warmup_rounds), 1)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimiser,
        [
            torch.optim.lr_scheduler.LinearLR(optimiser, 1 / warm, total_iters=warm),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.steps - warm),
        ],
        [warm],
    )
    began = last = time.perf_counter()
    for step in range(1, settings.steps + 1):
        width = WIDTHS[int(torch.randint(len(WIDTHS), (), generator=rng))]
        guessed, follows = _losses(model, text, known, width, settings.tokens, rng)
        optimiser.zero_grad()
        (guessed + follows).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        now = time.perf_counter()
        if now - last >= settings.seconds or step == settings.steps:
            last, left = now, (now - began) / step * (settings.steps - step)
            with torch.no_grad():  # always the same pieces
                fixed = torch.Generator().manual_seed(0)
                held = _losses(model, rest, known, 64, settings.tokens, fixed)
            show(
                f"  {step}/{settings.steps}  words {guessed:.3f} (held out {held[0]:.3f})  "
                f"follows {follows:.3f} (held out {held[1]:.3f})  {left:.0f} s left"
            )
    return model


def save(model: Pretraining, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """The BERT in half precision, without the heads, and the tokenizer."""
    found: Any = model.bert
    found.to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # some are saved for the owner only; a worker may be another user


def main(folder: Path) -> None:
    torch.set_num_threads(1)  # so that sums are added in one order
    settings = Settings()
    words = read_words(catalog.fetch(SOURCE) / catalog.SOURCES[SOURCE].main)
    tokenizer = make_tokenizer(words, settings.known)
    echo(f"{len(words)} words, {len(tokenizer)} tokens known")
    save(train(words, tokenizer, settings, echo), tokenizer, folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", type=Path, metavar="OUT_FOLDER", help="where the model is written"
    )
    main(parser.parse_args().folder)
