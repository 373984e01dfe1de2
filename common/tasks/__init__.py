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
from silotune.common.tasks.classification import ClassificationObjective
from silotune.common.tasks.language_modeling import LanguageModelingObjective
from silotune.common.tasks.multi_label import MultiLabelObjective
from silotune.common.tasks.objective import Objective
from silotune.common.tasks.ranking import RankingObjective
from silotune.common.tasks.regression import RegressionObjective
from silotune.common.tasks.token_classification import TokenClassificationObjective


def objective_of(task: Task) -> Objective:
    """What a contract's task learns."""
    found: dict[type, type[Objective]] = {
        Classification: ClassificationObjective,
        MultiLabel: MultiLabelObjective,
        Tokens: TokenClassificationObjective,
        Regression: RegressionObjective,
        Ranking: RankingObjective,
        Language: LanguageModelingObjective,
    }
    return found[type(task)](task)
