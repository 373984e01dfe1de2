"""The plain baseline: a small model of scikit-learn, trained on the rows of all sites in one place
without DP. What an encoder, an adapter and a federation are worth is seen beside it.

texts           TF-IDF and logistic regression; ridge regression for numbers
pairs of texts  the same on the TF-IDF of both texts, their product and cosine
tables          gradient boosting (histograms) of numbers as they stand and one-hot categories
tags of words   logistic regression of each word: itself, its beginnings, endings and shape, and two
                words to each side
language        there is none

Of several labels each has a model of its own. The settings are scikit-learn's defaults but for
max_iter = 1000 of logistic regressions, which converge then, and random_state = 0. Class weights
are the contract's, if it has any. All rows and whole texts are read, also what a contract's model
cuts off or leaves out of an entity's rows.
"""

from __future__ import annotations

import os
import resource
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from silotune.common.contract.contract import Contract
from silotune.common.contract.inputs import PairInput, TableInput
from silotune.common.contract.task import (
    Classification,
    MultiLabel,
    Regression,
    Tokens,
)
from silotune.common.data import records
from silotune.common.data.records import Records
from silotune.common.tasks.calibration import fit
from silotune.server.rounds.evaluation import scores_by_group
from silotune.simulations.datasets.split import CALIBRATION, TEST
from silotune.simulations.execution import plain_features
from silotune.simulations.execution.variants import POOLED, Job, JobResult

LEAST = 1e-9  # of a probability, so that its logarithm is finite


def run_plain(job: Job) -> JobResult:
    """Train the baseline on the job's pooled rows and score it on the public ones of each site."""
    began = time.perf_counter()
    train = job.data / "pooled.csv"
    known = records.read(train, job.contract)
    tests, others = job.public_files(TEST), job.public_files(CALIBRATION)
    public, calibrating = (
        {site: records.read(file, job.contract) for site, file in files.items()}
        for files in (tests, others)
    )
    both = [*public.values(), *calibrating.values()]
    found = predict(job.contract, (train, known), ([*tests.values(), *others.values()], both))
    count = sum(map(len, public.values()))
    outputs = found[:count]
    scores = scores_by_group(
        job.contract.task,
        outputs,
        [label for found in public.values() for label in found.labels],
        [query for found in public.values() for query in found.queries],
        [site for site, found in public.items() for _ in range(len(found))],
    )
    return JobResult(
        job.variant,
        job.repeat,
        (POOLED,),
        scores,
        (),
        time.perf_counter() - began,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        os.getpid(),
        outputs=outputs if job.keeps_outputs else (),
        calibration=fit(
            job.contract.task,
            found[count:],
            [label for rows in calibrating.values() for label in rows.labels],
        ),
    )


def predict(
    contract: Contract,
    train: tuple[Path, Records],
    test: tuple[Sequence[Path], Sequence[Records]],
) -> list[Any]:
    """The outputs for all test rows, in the form that common/tasks/metrics.py scores. train, test:
    the files, and what was read of them."""
    task, spec = contract.task, contract.input
    known, rows = train[1], [row for found in test[1] for row in found.inputs]
    with warnings.catch_warnings():
        # A fit that has not converged, or a label that no or every row has, is still a baseline.
        warnings.simplefilter("ignore")
        if isinstance(task, Tokens):
            tags = [row for found in test[1] for row in found.labels]
            return _tagged(task, known, [str(row) for row in rows], tags)
        features: tuple[Any, Any]
        if isinstance(spec, TableInput):
            tables = [plain_features.of_table(file, spec) for file in test[0]]
            features = plain_features.of_table(train[0], spec), np.vstack(tables)
        elif isinstance(spec, PairInput):
            features = plain_features.of_pairs(known.inputs, rows)  # type: ignore[arg-type]
        else:
            features = plain_features.of_texts(known.inputs, rows)  # type: ignore[arg-type]
        return list(_outputs(contract, features, np.asarray(known.labels)))


def _outputs(contract: Contract, features: tuple[Any, Any], labels: NDArray[Any]) -> NDArray[Any]:
    """[n, L] logits, or [n, 1] places between a regression's bounds."""
    task, boosting = contract.task, isinstance(contract.input, TableInput)
    known, rows = features
    if isinstance(task, Regression):
        found: NDArray[Any] = _regressor(boosting).fit(known, labels).predict(rows)
        return found[:, None]
    if isinstance(task, MultiLabel):
        from sklearn.multiclass import OneVsRestClassifier

        model = OneVsRestClassifier(_classifier(boosting)).fit(known, labels)
        return _log_odds(model.predict_proba(rows))
    if isinstance(task, Classification):
        return _log_probabilities(
            _fitted(known, labels, task.class_weights, boosting=boosting), rows, task.outputs
        )
    found = _log_probabilities(_fitted(known, labels, None, boosting=boosting), rows, 2)
    return _log_odds(np.exp(found[:, 1:]))


def _tagged(
    task: Tokens, known: Records, texts: Sequence[str], tags: Sequence[Sequence[int]]
) -> list[NDArray[Any]]:
    """Of each text the log probabilities [W, L] of its words' tags."""
    from sklearn.feature_extraction import DictVectorizer

    vectorizer = DictVectorizer(dtype=np.float32)
    of_words = plain_features.of_words
    features = vectorizer.fit_transform([w for text in known.inputs for w in of_words(str(text))])
    labels = np.array([tag for row in known.labels for tag in row])
    model = _fitted(features, labels, task.class_weights, boosting=False)
    words = [word for text in texts for word in of_words(text)]
    log_p = _log_probabilities(model, vectorizer.transform(words), task.outputs)
    return np.split(log_p, np.cumsum([len(row) for row in tags])[:-1])


def _fitted(
    features: Any, labels: NDArray[Any], weights: Sequence[float] | None, *, boosting: bool
) -> Any:
    """A classifier of these rows; where they are all of one class, it always says that one."""
    from sklearn.dummy import DummyClassifier

    if len(np.unique(labels)) == 1:
        return DummyClassifier().fit(features, labels)
    return _classifier(boosting, dict(enumerate(weights)) if weights else None).fit(
        features, labels
    )


def _classifier(boosting: bool, weights: dict[int, float] | None = None) -> Any:
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression

    if boosting:
        return HistGradientBoostingClassifier(class_weight=weights, random_state=0)
    return LogisticRegression(class_weight=weights, max_iter=1000)


def _regressor(boosting: bool) -> Any:
    from sklearn.ensemble import HistGradientBoostingRegressor
    from sklearn.linear_model import Ridge

    return HistGradientBoostingRegressor(random_state=0) if boosting else Ridge()


def _log_probabilities(model: Any, features: Any, outputs: int) -> NDArray[Any]:
    """[n, L]; a label that no training row has is as unlikely as can be."""
    found = np.zeros((features.shape[0], outputs))
    found[:, model.classes_] = model.predict_proba(features)
    return np.log(np.maximum(found, LEAST))


def _log_odds(p: NDArray[Any]) -> NDArray[Any]:
    kept = np.clip(p, LEAST, 1 - LEAST)
    odds: NDArray[Any] = np.log(kept / (1 - kept))
    return odds
