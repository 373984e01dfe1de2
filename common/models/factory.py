"""The contract's model, built once a process."""

from __future__ import annotations

import json
from pathlib import Path

from silotune.common.contract.compute import Performance
from silotune.common.contract.contract import Contract
from silotune.common.contract.inputs import TableInput
from silotune.common.contract.model import LanguageModel, OneHotModel
from silotune.common.errors import DataError, ErrorCode
from silotune.common.models.base import Network
from silotune.common.models.one_hot import OneHot

_built: dict[str, Network] = {}


def build(
    contract: Contract, folder: Path | None, performance: Performance | None = None, lane: int = 0
) -> Network:
    """The contract's model, built once per process and lane, and shared by every contract that
    needs the same one. Its adapter is mutable: hold `lock` from loading arrays until done with
    them. lane: for work side by side; the frozen base is one for all lanes.
    """
    performance = performance or Performance()
    parts = contract.model_dump(mode="json", include={"model", "adapter", "input", "task"})
    parts["corrected"] = contract.aggregation.method == "fedex"
    parts["lane"] = lane
    key = json.dumps([parts, str(folder), performance.model_dump(mode="json")], sort_keys=True)
    if key not in _built:
        if isinstance(contract.model, OneHotModel):
            assert isinstance(contract.input, TableInput)
            _built[key] = OneHot(contract.model, contract.input, contract.task, performance)
        elif folder is None:
            # Other commands have asked for it before (common/model_files/model_source.py).
            raise DataError(
                f"The folder of model '{contract.model.name}' is not known: set model.folder in "
                "site.toml.",
                code=ErrorCode.MODEL_FOLDER_UNKNOWN,
            )
        else:
            # PEFT and transformers load longer than all else, and a one-hot model needs neither.
            from silotune.common.models import causal_lm, encoder

            language_model = isinstance(contract.model, LanguageModel)
            kind = causal_lm.LanguageModel if language_model else encoder.Encoder
            _built[key] = kind(contract, folder, performance)
    return _built[key]
