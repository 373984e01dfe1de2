"""One small class per task: what is learnt from each record, and what evaluation keeps of it."""

from __future__ import annotations

from silotune.common.contract.task import (
    Classification,
    Language,
    MultiLabel,
    Ranking,
    Regression,
    Task,
    Tokens,
)
from silotune.common.tasks.classification import Classes
from silotune.common.tasks.language_modeling import Answers
from silotune.common.tasks.multi_label import Labels
from silotune.common.tasks.objective import Objective
from silotune.common.tasks.ranking import Relevance
from silotune.common.tasks.regression import Place
from silotune.common.tasks.token_classification import Tags


def objective_of(task: Task) -> Objective:
    """What a contract's task learns."""
    found: dict[type, type[Objective]] = {
        Classification: Classes,
        MultiLabel: Labels,
        Tokens: Tags,
        Regression: Place,
        Ranking: Relevance,
        Language: Answers,
    }
    return found[type(task)](task)
