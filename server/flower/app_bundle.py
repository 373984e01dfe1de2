"""The Flower app of a deployment: a folder with a pyproject and no code.

Both apps it names come from the Silotune that is installed at the operator's host and at each
site, so what arrives at a site through Flower holds nothing to run.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from silotune.common.config.types import as_toml
from silotune.common.data.text_decoding import DELIMITERS, Reading

PYPROJECT = """[project]
name = "silotune-app"
version = "{version}"
description = "Silotune federation: the code is the installed package"
license = {{ file = "LICENSE" }}
dependencies = ["flwr>=1.41"]

[tool.flwr.app]
publisher = "silotune"
fab-format-version = 1
flwr-version-target = "{flwr}"
fab-include = ["LICENSE", "README.md"]

[tool.flwr.app.components]
serverapp = "silotune.server.flower.server_app:app"
clientapp = "silotune.client.relay.client_app:app"

[tool.flwr.app.config]
{config}
"""


def write_app(
    folder: Path,
    *,
    contract: Path,
    model: Path | None,
    run: str,
    runs: Path,
    resume: str = "",
    test: Path | None = None,
    reading: Reading = Reading(),  # noqa: B008 - frozen
    token: str = "",
) -> Path:
    """Write the app folder for `flwr run`; paths are the operator's own and absolute.

    resume, test, token: see server/flower/server_app.py. reading: how `test` is read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "contract": contract.resolve(),
        "model": model.resolve() if model else "",
        "run": run,
        "runs": runs.resolve(),
        "resume": resume,
        "test": test.resolve() if test else "",
        "encoding": reading.encoding,
        "delimiter": DELIMITERS.get(reading.delimiter or "", ""),
        "token": token,
    }
    (folder / "pyproject.toml").write_text(
        PYPROJECT.format(
            version=metadata.version("silotune"),
            flwr=metadata.version("flwr"),
            config="\n".join(f"{key} = {as_toml(str(value))}" for key, value in config.items()),
        )
    )
    (folder / "LICENSE").write_text("Apache-2.0\n")
    (folder / "README.md").write_text("Silotune federation; the code is the installed package.\n")
    return folder
