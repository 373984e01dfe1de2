"""A GGUF model as a folder that transformers loads: half-precision safetensors and a tokenizer.

GGUF is what the package index has of small language models. It is read by another process, so that
a run's memory is not the conversion's, and nobody waits for torch before it is needed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from silotune.common.errors import DataError
from silotune.common.model_files.model_folder import WEIGHTS


def require_reader(name: str) -> None:
    """DataError when the package that reads GGUF is missing: said before 90 MB come, not after."""
    if find_spec("gguf") is None:
        raise DataError(
            f"'{name}' comes as a GGUF file, and the package that reads it is not installed: "
            "`pip install gguf`, or install Silotune with its extra 'llm'."
        )


def convert(file: Path, folder: Path) -> None:
    """Write `file` to the new `folder` as WEIGHTS, config.json and the tokenizer's files."""
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(file), str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise DataError(f"{file.name} could not be converted: {reason}")


def _convert(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.float32,
        local_files_only=True,
        trust_remote_code=False,
    )
    # It still believes the weights to be quantised: it would refuse to save them, and say so in
    # config.json.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    # Half precision adds far less rounding than the four bits that the weights had.
    model.to(torch.float16).save_pretrained(folder)
    (folder / WEIGHTS).chmod(0o644)  # saved for the owner only; a worker may be another user
    tokenizer = AutoTokenizer.from_pretrained(
        file.parent, gguf_file=file.name, local_files_only=True, trust_remote_code=False
    )
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    _convert(Path(sys.argv[1]), Path(sys.argv[2]))
