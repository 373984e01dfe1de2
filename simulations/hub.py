"""A model from the hub by its id, as a folder that a contract can name: weights, config, tokenizer.

What a contract trusts is the weights' SHA-256, which every process checks when it reads them; the
hub is trusted with nothing. Files with code in them are not fetched.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import NamedTuple
from urllib.parse import quote

from silotune.common.backbone import WEIGHTS
from silotune.common.errors import DataError, UsageError
from silotune.simulations.data import home

FILES = [
    WEIGHTS, "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "sentencepiece.bpe.model",
    "added_tokens.json", "chat_template.jinja",
]
ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?")


class HubModel(NamedTuple):
    """sha256: of the weights, for the contract."""

    folder: Path
    sha256: str


def fetch_model(model: str) -> HubModel:
    """OWNER/NAME or OWNER/NAME@REVISION into the cache. UsageError for another form, DataError when
    the hub does not answer or the model is not one file of safetensors."""
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
                "one, copy the model's folder from a machine that has it.", code="E306",
            ) from None
        finally:
            rmtree(half.parent)
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise DataError(
            f"'{model}' has no {WEIGHTS}: its weights are in several files or in another format. "
            "Convert them to one file of safetensors and name its folder.", code="E310",
        )
    with weights.open("rb") as file:
        return HubModel(folder, hashlib.file_digest(file, "sha256").hexdigest())
