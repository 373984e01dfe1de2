"""`make mutation`: small faults put into the files that protect records; the tests must see each.

    python -m tests.mutation [--number 60] [--seed 0] [WORD …]

WORD: only files whose name holds it. A seeded sample of the mutants that cosmic-ray's operators
make, and of those in which a `raise` is removed, each in a copy of this
repository. A mutant whose file's own tests pass is a survivor. Those that behave as the original
does are listed with their reasons in EQUIVALENT; any other ends this with exit code 1.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import os
import random
import subprocess
import sys
import tempfile
import time
import tomllib
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

from cosmic_ray import plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Example, Operator

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


class Mutant(NamedTuple):
    """line: the changed lines, old → new, without the white space around them."""

    file: str
    line: str
    code: str


class RemoveRaise(Operator):  # type: ignore[misc]
    """`raise X` becomes `pass`: a refusal that is not made."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
        if node.type == "raise_stmt":
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        return get_ast(f"{node.get_first_leaf().prefix}pass").children[0]

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (Example("raise X", "pass"),)


def operators() -> Iterator[Operator]:
    """Without those whose mutants nearly always end in a TypeError, which any test sees."""
    yield RemoveRaise()
    left_out = (
        "Exception",
        "Decorator",
        "Variable",
        "NoOp",
        "Shift",
        "Bit",
        "Pow",
        "Mod",
        "FloorDiv",
        "Invert",
        "_Is",
    )
    for name in plugins.operator_names():
        kind = plugins.get_operator(name)
        if not kind.arguments() and not any(word in name for word in left_out):
            yield kind()


def places(file: str) -> list[tuple[Operator, int]]:
    """Each operator with each of its occurrences in a file."""
    tree = get_ast((ROOT / file).read_text(encoding="utf-8"))
    nodes = list(ast_nodes(tree))
    return [
        (operator, occurrence)
        for operator in operators()
        for occurrence in range(sum(len(list(operator.mutation_positions(n))) for n in nodes))
    ]


def sample(file: str, number: int, chance: random.Random) -> list[Mutant]:
    """Up to `number` mutants that are still Python and change a line of code."""
    source = (ROOT / file).read_text(encoding="utf-8")
    found: dict[str, Mutant] = {}
    every = places(file)
    for operator, occurrence in chance.sample(every, len(every)):
        if len(found) == number:
            break
        code = mutate_code(source, operator, occurrence)
        try:
            with warnings.catch_warnings(action="error"):  # `is` with a literal is no fault of ours
                changes = ast.dump(ast.parse(code or "(")) != ast.dump(ast.parse(source))
                compile(code or "(", file, "exec")
        except (SyntaxError, SyntaxWarning):
            continue
        if changes:
            found.setdefault(code, Mutant(file, _changed(source, code), code))
    return list(found.values())


def _changed(before: str, after: str) -> str:
    lines = difflib.ndiff(before.splitlines(), after.splitlines())
    parts: dict[str, list[str]] = {"- ": [], "+ ": []}
    for line in lines:
        if line[:2] in parts:
            parts[line[:2]].append(line[2:].strip())
    return f"{' '.join(parts['- '])} → {' '.join(parts['+ '])}"


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
