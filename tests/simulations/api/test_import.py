"""What `import silotune` costs, and what the packages offer."""

from __future__ import annotations

import statistics
import subprocess
import sys
import textwrap
import time
from importlib import import_module, metadata

import pytest

import silotune

MOST = 0.150  # seconds; on an idle machine it is below 0.050
HEAVY = "torch", "pandas", "numpy", "flwr", "transformers", "peft", "opacus", "pydantic", "click"
NAMES = {
    "silotune": {"Contract", "Recipe", "RunResult", "privacy", "simulate", "__version__"},
    "silotune.common": {"Contract", "SilotuneError"},
    "silotune.client": {
        "Worker",
        "PrivacyLedger",
        "Policy",
        "DPOptimizer",
        "RDPAccountant",
        "accountant",
    },
    "silotune.server": {"FederatedRun"},
    "silotune.simulations": {"Recipe", "RunResult", "simulate"},
}


def seconds(code: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - began


def test_the_import_takes_no_time() -> None:
    pairs = [(seconds("import silotune"), seconds("pass")) for _ in range(5)]
    assert statistics.median(full - empty for full, empty in pairs) < MOST


@pytest.mark.parametrize("package", NAMES)
def test_a_package_loads_nothing_heavy_before_a_name_is_used(package: str) -> None:
    code = f"""
    import sys
    import {package}
    dir({package})
    bad = {set(HEAVY)} & set(sys.modules)
    sys.exit(f"loaded: {{sorted(bad)}}" if bad else 0)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", NAMES)
def test_each_name_is_listed_documented_and_there(package: str) -> None:
    module = import_module(package)
    assert NAMES[package] <= set(module.__all__) <= set(dir(module))
    assert "lazy_names" not in dir(module)
    for name in module.__all__:
        found = getattr(module, name)
        assert found.__doc__, name
        assert getattr(module, name) is found


@pytest.mark.parametrize("name", ["DPOptimizer", "PrivacyLedger", "RDPAccountant", "Worker"])
def test_the_names_of_a_sites_classes_are_their_own(name: str) -> None:
    assert getattr(silotune.client, name).__name__ == name


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="'silotune' has no attribute 'simulat'"):
        silotune.simulat  # type: ignore[attr-defined]  # noqa: B018


def test_the_version_is_that_of_what_is_installed() -> None:
    assert silotune.__version__ == metadata.version("silotune")
