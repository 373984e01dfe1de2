"""`make lock`: two requirements files with the SHA-256 of every file that may be installed.

requirements.lock        what Silotune and the extras of an installation depend on
build-requirements.lock  what builds those of them that come as source archives, and Silotune

They are made by uv from the versions in constraints.txt and the indexes that pip is configured to
use. Torch's builds differ between indexes, so the files are made where they are used and are not
committed. The first resolution trusts the index: uv builds source archives without a wheel to learn
their metadata. From then on `pip install --require-hashes` compares each file before it is opened.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

EXTRAS = ("deidentify", "llm", "monitor", "sql")
LOCK, BUILD_LOCK = "requirements.lock", "build-requirements.lock"
# Of the dependencies that come as source archives: seqeval asks for setuptools-scm when it is
# built, and setuptools makes wheels with wheel.
BUILDERS = ("setuptools-scm", "wheel")
SECTIONS = ("global", "install", ":env:")  # the later one counts, as for pip
HEADER = "# Made by `make lock` from {}; not to be committed, as indexes differ.\n"


def pip_settings(lines: Sequence[str]) -> dict[str, str]:
    """The values in the output of `pip config list` that `pip install` follows, by key.

    Args:
        lines: Such as `global.index-url='https://…'`.
    """
    found: dict[str, dict[str, str]] = {section: {} for section in SECTIONS}
    for line in lines:
        name, equals, value = line.partition("=")
        section, _, key = name.rpartition(".")
        if equals and section in found:
            found[section][key] = str(ast.literal_eval(value))
    return {key: value for section in SECTIONS for key, value in found[section].items()}


def index_options(settings: Mapping[str, str]) -> list[str]:
    """uv's options for the indexes in pip's settings. pip takes the best version of all indexes."""
    options = ["--index-strategy", "unsafe-best-match"]
    if settings.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        options.append("--no-index")
    for key, option in (
        ("index-url", "--default-index"),
        ("extra-index-url", "--index"),
        ("find-links", "--find-links"),
    ):
        for value in settings.get(key, "").split():
            options += [option, value]
    return options


def compile_lock(root: Path, to: Path, requirements: Sequence[str], more: Sequence[str]) -> None:
    """Write one lock file. UV prints what is wrong; CalledProcessError then.

    Args:
        root: The repository.
        to: The file to write.
        requirements: Lines of requirements, beside pyproject.toml if `more` names it.
        more: Further words of `uv pip compile`.
    """
    shown = subprocess.run(
        [sys.executable, "-P", "-m", "pip", "config", "list"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    settings = pip_settings(shown.splitlines())
    environment = dict(os.environ)
    if "cert" in settings:
        environment.setdefault("SSL_CERT_FILE", settings["cert"])
    done = subprocess.run(
        [
            sys.executable,
            "-P",
            "-m",
            "uv",
            "pip",
            "compile",
            *more,
            "-",
            "--constraints",
            str(root / "constraints.txt"),
            "--generate-hashes",
            "--no-annotate",
            "--no-header",
            "--quiet",
            *index_options(settings),
        ],
        input="\n".join(requirements),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=environment,
        cwd=root,
    )
    to.write_text(HEADER.format("constraints.txt and pyproject.toml") + done.stdout, "utf-8")


def main(root: Path, folder: Path, words: Sequence[str]) -> None:
    """Write both files into `folder`. words: for uv, such as --python-platform."""
    project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))
    extras = [word for extra in EXTRAS for word in ("--extra", extra)]
    compile_lock(root, folder / LOCK, (), ["pyproject.toml", *extras, *words])
    builders = [*project["build-system"]["requires"], *BUILDERS]
    compile_lock(root, folder / BUILD_LOCK, builders, words)


if __name__ == "__main__":
    try:
        main(Path.cwd(), Path.cwd(), sys.argv[1:])
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
