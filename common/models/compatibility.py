"""Can a contract be carried out with the model in a folder? Found without loading the weights."""

from __future__ import annotations

from pathlib import Path

from silotune.common.contract.compute import Performance
from silotune.common.contract.contract import Contract
from silotune.common.contract.model import LanguageModel, OneHotModel
from silotune.common.model_files import model_folder
from silotune.common.models.adapted import adapt
from silotune.common.models.backbone import shell
from silotune.common.tokenization.prompts import Prompts


def check(contract: Contract, folder: Path, performance: Performance | None = None) -> None:
    """What a worker would refuse at its start, but for the weights and the self-test.

    Raises:
        DataError: E305 if the folder is not the contract's model, E310 if the contract does not fit
            it: adapter.targets, adapter.layers, adapter.rank, model.max_tokens, the chat template.
    """
    if isinstance(contract.model, OneHotModel):
        return
    model_folder.check(folder, contract.model.sha256)
    base = shell(folder)
    adapt(contract, base, performance or Performance())
    if isinstance(contract.model, LanguageModel):
        Prompts(contract, base.tokenizer)
