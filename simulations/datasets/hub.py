"""A model from the hub by its id, as a folder that a contract can name: weights, config, tokenizer.

What a contract trusts is the SHA-256 of the model's files (common/model_files/model_folder.py),
which every process checks when it reads them; the hub is trusted with nothing. No other files are
fetched.
"""

from __future__ import annotations

import re
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import NamedTuple
from urllib.parse import quote

from silotune.common.errors import DataError, ErrorCode, UsageError
from silotune.common.model_files import model_folder
from silotune.simulations.datasets.catalog import home

FILES = [*model_folder.MODEL_FILES, "model-*-of-*.safetensors"]
ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?")


class HubModel(NamedTuple):
    """sha256: of the model's files, for the contract."""

    folder: Path
    sha256: str


def fetch_model(model: str) -> HubModel:
    """OWNER/NAME or OWNER/NAME@REVISION into the cache. UsageError for another form, DataError when
    the hub does not answer or the model has no weights in safetensors."""
    match = ID.fullmatch(model)
    if not match:
        raise UsageError(f"'{model}' is no hub's model: write OWNER/NAME or OWNER/NAME@REVISION.")
    repo, revision = match["repo"], match["revision"]
    folder = home() / "hub" / quote(model, safe="@")
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        folder.parent.mkdir(parents=True, exist_ok=True)
        half = Path(mkdtemp(dir=folder.parent)) / "model"  # it is there whole, or not at all
        try:
            snapshot_download(repo, revision=revision, local_dir=half, allow_patterns=FILES)
            half.rename(folder)
        except (HFValidationError, LocalEntryNotFoundError, OSError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else "no answer"
            raise DataError(
                f"The model '{model}' could not be fetched: {reason} Is there a network? Without "
                "one, copy the model's folder from a machine that has it.",
                code=ErrorCode.DOWNLOAD_FAILED,
            ) from None
        finally:
            rmtree(half.parent)
    return HubModel(folder, model_folder.manifest(folder).sha256)
