"""`make mutation`: small faults put into the files that protect records; the tests must see each.

    python -m tests.mutation [--number 60] [--seed 0] [WORD …]

WORD: only files whose name holds it. A seeded sample of the mutants that cosmic-ray's operators
make, and of those in which a `raise` is removed, each in a copy of this
repository. A mutant whose file's own tests pass is a survivor. Those that behave as the original
does are listed with their reasons in EQUIVALENT; any other ends this with exit code 1.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.mutants import Mutant

ROOT = Path(__file__).resolve().parent.parent
EQUIVALENT = ROOT / "tests" / "equivalent_mutants.toml"
PACKAGES = ("common", "client", "server", "simulations")
SECONDS = 600  # a mutant whose tests take longer is killed: it waits for something

# Each file and the tests that must see a fault in it.
TESTS: dict[str, tuple[str, ...]] = {
    "client/worker/release.py": ("client/worker/test_release.py", "client/worker/test_secagg.py"),
    "client/site/policy.py": (
        "client/site/test_policy.py",
        "client/preparation/test_sql.py",
        "client/training/test_privacy_units.py",
    ),
    "client/privacy/ledger.py": (
        "client/privacy/test_ledger.py",
        "client/privacy/test_ledger_export.py",
        "client/privacy/test_receipts.py",
        "client/privacy/test_reply_store.py",
        "client/records/test_record_identity.py",
        "client/privacy/test_budget_attacks.py",
    ),
    "client/privacy/reply_store.py": (
        "client/privacy/test_reply_store.py",
        "client/privacy/test_ledger.py",
        "client/privacy/test_budget_attacks.py",
    ),
    "client/privacy/stored_files.py": (
        "client/privacy/test_reply_store.py",
        "client/privacy/test_budget_attacks.py",
        "client/site/test_policy.py",
    ),
    "client/privacy/site_identity.py": (
        "client/privacy/test_site_identity.py",
        "client/privacy/test_receipts.py",
    ),
    "client/privacy/ledger_entries.py": (
        "client/privacy/test_ledger.py",
        "client/privacy/test_ledger_export.py",
        "client/site/test_policy.py",
    ),
    "client/privacy/budget.py": (
        "client/privacy/test_budget.py",
        "client/records/test_record_identity.py",
        "client/training/test_privacy_units.py",
    ),
    "client/records/canonical_values.py": (
        "client/records/test_canonical_values.py",
        "client/records/test_record_ids.py",
        "client/records/test_written_forms.py",
    ),
    "client/records/written_forms.py": (
        "client/records/test_written_forms.py",
        "client/records/test_record_identity.py",
    ),
    "client/records/record_ids.py": (
        "client/records/test_record_ids.py",
        "client/records/test_written_forms.py",
        "client/records/test_record_identity.py",
    ),
    "client/records/record_identity.py": ("client/records/test_record_identity.py",),
    "client/worker/secagg.py": ("client/worker/test_secagg.py",),
    "client/worker/worker.py": (
        "client/worker/test_worker.py",
        "client/privacy/test_budget_attacks.py",
        "client/worker/test_secagg.py",
    ),
    "client/training/dp_optimizer.py": (
        "client/training/test_dp_optimizer.py",
        "client/training/test_sensitivity.py",
        "client/training/test_adaptive_clipping.py",
    ),
    "client/training/noise.py": (
        "client/training/test_noise.py",
        "client/training/test_sampling.py",
    ),
    "client/privacy/accountant.py": ("client/privacy/test_accountant.py",),
    "common/secagg/participant.py": (
        "common/secagg/test_secagg.py",
        "common/secagg/test_secagg_attacks.py",
    ),
    "common/secagg/key_agreement.py": (
        "common/secagg/test_key_agreement.py",
        "common/secagg/test_secagg.py",
    ),
    "common/secagg/shamir.py": ("common/secagg/test_shamir.py",),
    "common/secagg/fixed_point.py": ("common/secagg/test_fixed_point.py",),
    "server/rounds/update_validation.py": (
        "server/rounds/test_run.py",
        "server/flower/test_strategy.py",
    ),
    "server/rounds/secagg.py": (
        "server/rounds/test_run.py",
        "server/rounds/test_resume.py",
        "client/worker/test_secagg.py",
    ),
}


def copy_to(folder: Path) -> None:
    """The repository's files, and a package of the four folders that is found before ours."""
    names = (
        subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True)
        .stdout.decode()
        .split("\0")
    )
    for name in filter(None, names):
        if (ROOT / name).is_file() and not name.startswith("simulations/studies"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    (folder / "path" / "silotune").mkdir(parents=True)
    for package in PACKAGES:
        (folder / "path" / "silotune" / package).symlink_to(folder / package)
    for file in (folder / "simulations" / "api").iterdir():  # the package itself
        (folder / "path" / "silotune" / file.name).symlink_to(file)


def killed(mutant: Mutant, folder: Path) -> bool:
    """Whether a test of the mutant's file fails in this copy."""
    file = folder / mutant.file
    original = file.read_bytes()
    file.write_text(mutant.code, encoding="utf-8")
    tests = [str(folder / "tests" / name) for name in TESTS[mutant.file]]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests],
            cwd=folder,
            check=False,
            capture_output=True,
            timeout=SECONDS,
            env=os.environ
            | {
                "PYTHONPATH": str(folder / "path"),
                "OMP_NUM_THREADS": "1",
                "PYTHONDONTWRITEBYTECODE": "1",
            },
        )
    except subprocess.TimeoutExpired:
        return True
    finally:
        file.write_bytes(original)
    return done.returncode != 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="WORD", help="of the names of files to take")
    parser.add_argument("--number", type=int, default=60, help="how many mutants at most")
    parser.add_argument("--seed", type=int, default=0, help="of the sample of mutants")
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count() or 1, help="how many run at once"
    )
    options = parser.parse_args()
    from tests.mutants import places, sample  # needs the extra `mutation`, which --help does not

    files = [f for f in TESTS if not options.words or any(w in f for w in options.words)]
    chance = random.Random(options.seed)  # noqa: S311 - a sample of mutants is no secret
    share = max(1, options.number // len(files))
    chosen = [mutant for file in files for mutant in sample(file, share, chance)]
    equivalent = tomllib.loads(EQUIVALENT.read_text(encoding="utf-8"))
    known = {(e["file"], e["line"]) for e in equivalent.get("mutant", [])}
    print(f"{len(chosen)} of {sum(len(places(f)) for f in files):,} mutants of {len(files)} files")
    began, survivors, folders = time.monotonic(), [], SimpleQueue[Path]()
    with tempfile.TemporaryDirectory(prefix="mutation-") as name:
        # The tests of each file must pass in the copy without a mutant: `make test` has shown it.
        for number in range(options.processes):
            folder = Path(name) / str(number)
            copy_to(folder)
            folders.put(folder)

        def run(mutant: Mutant) -> tuple[Mutant, bool]:
            folder = folders.get()
            try:
                return mutant, killed(mutant, folder)
            finally:
                folders.put(folder)

        with ThreadPoolExecutor(options.processes) as pool:
            for done, (mutant, seen) in enumerate(pool.map(run, chosen), start=1):
                state = (
                    "killed"
                    if seen
                    else ("equivalent" if (mutant.file, mutant.line) in known else "SURVIVED")
                )
                print(
                    f"{done:>3}/{len(chosen)} {time.monotonic() - began:>5.0f} s  {state:<10} "
                    f"{mutant.file}: {mutant.line}",
                    flush=True,
                )
                if state == "SURVIVED":
                    survivors.append(mutant)
    print(f"{len(chosen)} mutants, {len(survivors)} survived")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
