"""How near answers are to those that were wanted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from statistics import fmean

from silotune.common.errors import ErrorCode, UsageError

WORD = re.compile(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+")
KINDS = {"rouge1": "ROUGE-1", "rougeL": "ROUGE-L"}


def require_rouge() -> None:
    """UsageError if the package is not there."""
    if find_spec("rouge_score") is None:
        raise UsageError(
            "Answers are compared by rouge-score, which is not installed: `pip install "
            "rouge-score`, or install Silotune with its extra 'llm'.",
            code=ErrorCode.CONFIG_INVALID,
        )


class Words:
    """rouge-score's own words are of Latin letters alone."""

    def tokenize(self, text: str) -> list[str]:
        return WORD.findall(text.lower())


def rouge(answers: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """Over N >= 1 pairs the mean F measure of ROUGE-1 and ROUGE-L (Lin 2004; words in lower case
    without stems, each Chinese character is one) and the share of answers that are the wanted text.
    UsageError if the package rouge-score is not installed."""
    require_rouge()
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(KINDS), tokenizer=Words())
    scores = [scorer.score(text, found) for found, text in zip(answers, wanted, strict=True)]
    return {
        name: fmean(score[kind].fmeasure for score in scores) for kind, name in KINDS.items()
    } | {
        "exact match": fmean(
            found.split() == text.split() for found, text in zip(answers, wanted, strict=True)
        )
    }
