"""`silotune`: quick help, one sentence an error, exit codes 0, 1 and 2, and codes that explain."""

from __future__ import annotations

import ast
import errno
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import click
import pytest

from silotune.common.cli import main
from silotune.common.contract import contract as contracts
from silotune.common.errors import CODES, DataError, ErrorCode, RunError, SilotuneError
from silotune.simulations.datasets.catalog import present
from tests.conftest import TABLE_CONTRACT

ROOT = Path(__file__).parents[3]
HEART = ROOT / "simulations" / "recipes" / "heart-diagnosis" / "contract.toml"
HEAVY = {"torch", "pandas", "flwr", "numpy", "opacus", "transformers", "peft", "matplotlib"}
START = """
import atexit, sys
atexit.register(lambda: print(" ".join(sys.modules), file=sys.stderr))
from silotune.common.cli.main import main
sys.argv = ["silotune", *sys.argv[1:]]
main()
"""

Ran = tuple[int, str, str]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """failing(error): from now on there is a command `silotune boom` that raises it."""

    def add(error: BaseException) -> None:
        @click.command()
        def boom() -> None:
            raise error

        module = ModuleType("boom_module")
        module.boom = boom  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "boom_module", module)
        monkeypatch.setitem(main.NOUNS, "boom", ("boom_module", "fails"))

    return add


# Help


def cpu_seconds() -> float:
    """Of all processes that this one has waited for: a busy machine does not change them."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_is_quick_and_loads_no_side() -> None:
    seconds = []
    for _ in range(3):
        began = cpu_seconds()
        done = subprocess.run(
            [sys.executable, "-c", START, "--help"], capture_output=True, text=True, check=False
        )
        seconds.append(cpu_seconds() - began)
        assert done.returncode == 0
        assert not HEAVY & set(done.stderr.split())
    assert min(seconds) < 0.5
    for noun in main.NOUNS:
        assert f"\n  {noun} " in done.stdout
    assert "explain" in done.stdout
    assert "Example:" in done.stdout


@pytest.mark.parametrize("noun", sorted([*main.NOUNS, "explain"]))
def test_every_noun_has_help(run: Callable[..., Ran], noun: str) -> None:
    code, out, err = run(noun, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"Usage: silotune {noun}")


def test_the_installed_command_starts() -> None:
    script = Path(sys.executable).with_name("silotune")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert re.search(r"\d+\.\d+\.\d+", done.stdout)


# Errors


def test_done_is_0(run: Callable[..., Ran]) -> None:
    assert run("contract", "validate", HEART)[0] == 0
    assert run("-h")[0] == 0


@pytest.mark.parametrize(
    "words",
    [
        ["contrakt"],
        ["contract", "shwo"],
        ["contract", "show"],
        ["contract", "show", "a", "b"],
        ["--nope"],
        ["contract", "show", "--nope", "x"],
        ["explain"],
        ["explain", "E999"],
        ["contract", "show", "/no/such/file.toml"],
        ["sim", "run", "no-such-recipe"],
        [],
    ],
    ids=" ".join,
)
def test_usage_is_2(run: Callable[..., Ran], words: list[str]) -> None:
    code, _, err = run(*words)
    assert code == 2
    assert err
    assert "Traceback" not in err


def test_failed_is_1(run: Callable[..., Ran], failing: Callable[[BaseException], None]) -> None:
    failing(RunError("Run stopped at round 3.", code="E402"))
    assert run("boom") == (1, "", "✗ E402 Run stopped at round 3.\n")


def test_an_unexpected_failure_tells_no_value(
    run: Callable[..., Ran], failing: Callable[[BaseException], None]
) -> None:
    failing(ValueError("could not convert string to float: 'Maria K.'"))
    code, out, err = run("boom")
    assert (code, out) == (1, "")
    assert err.startswith("✗ E500 An unexpected failure (ValueError).")
    assert "Maria" not in err
    assert "Traceback" not in err


def test_a_file_that_the_system_refuses_is_one_sentence(
    run: Callable[..., Ran], failing: Callable[[BaseException], None]
) -> None:
    failing(PermissionError(errno.EACCES, "Permission denied", "/srv/run\n1/run.json"))
    assert run("boom") == (
        1,
        "",
        "✗ E105 /srv/run\\n1/run.json: Permission denied. This command runs as user "
        f"{os.geteuid()}.\n",
    )


def test_a_failure_of_the_system_without_a_file_is_unexpected(
    run: Callable[..., Ran], failing: Callable[[BaseException], None]
) -> None:
    failing(OSError("no file"))
    code, out, err = run("boom")
    assert (code, out) == (1, "")
    assert err.startswith("✗ E500 An unexpected failure (OSError).")


def test_values_show_on_the_owners_screen_only(
    run: Callable[..., Ran], failing: Callable[[BaseException], None]
) -> None:
    failing(DataError("row 2 does not fit.", code="E302", local="row 2 has 'Maria K.'"))
    code, out, err = run("boom")
    assert (code, out) == (1, "")
    assert err.splitlines() == [
        "✗ E302 row 2 does not fit.",
        "  on your screen only: row 2 has 'Maria K.'",
    ]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), click.Abort()], ids=repr)
def test_stopping_is_no_failure_of_ours(
    run: Callable[..., Ran], failing: Callable[[BaseException], None], error: BaseException
) -> None:
    failing(error)
    code, out, err = run("boom")
    assert (code, out, err.strip()) == (130, "", "Stopped.")


@pytest.mark.parametrize("error", [RunError("stopped"), ValueError("odd")], ids=repr)
def test_debug_lets_the_error_through(
    run: Callable[..., Ran], failing: Callable[[BaseException], None], error: Exception
) -> None:
    failing(error)
    with pytest.raises(type(error)):
        run("--debug", "boom")


def test_a_traceback_with_debug_only() -> None:
    for words, shown in (([], False), (["--debug"], True)):
        done = subprocess.run(
            [sys.executable, "-c", START, *words, "contract", "show", "/no/such.toml"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert ("Traceback" in done.stderr) == shown
        assert "/no/such.toml cannot be read" in done.stderr
        assert done.returncode != 0


def test_an_unknown_command_has_a_likeness(run: Callable[..., Ran]) -> None:
    code, out, err = run("contrakt", "show")
    assert (code, out) == (2, "")
    assert err.startswith("✗ E101 There is no command 'contrakt'. Did you mean 'contract'? Known: ")
    for noun in main.NOUNS:
        assert noun in err
    assert "Did you mean" not in run("xyzzy")[2]


# Codes


def test_explain(run: Callable[..., Ran]) -> None:
    for known, text in CODES.items():
        assert run("explain", known) == (0, f"{known}  {text}\n", "")
    assert run("explain", "e302")[1].startswith("E302  ")
    code, out, _ = run("explain", "E302", "--json")
    assert (code, json.loads(out)) == (0, {"code": "E302", "text": CODES["E302"]})


def test_explain_an_unknown_code(run: Callable[..., Ran]) -> None:
    code, out, err = run("explain", "E3002")
    assert (code, out) == (2, "")
    assert "There is no code 'E3002'. Did you mean 'E302'?" in err
    assert "E601" in err
    for far in ("e9", "E", "E999", "x"):
        assert "Did you mean" not in run("explain", far)[2]


def sources() -> Iterator[tuple[Path, ast.Module]]:
    for side in ("common", "client", "server", "simulations"):
        for path in sorted((ROOT / side).rglob("*.py")):
            yield path, ast.parse(path.read_text(encoding="utf-8"))


def test_every_code_is_used_and_explained() -> None:
    """What an error class has by default is used as well; a key of CODES is no use."""
    explained: list[ast.expr | None] = []
    used: set[str] = set()
    for path, tree in sources():
        for node in ast.walk(tree):
            if path.name == "errors.py" and isinstance(node, ast.Dict):
                explained += node.keys
            elif isinstance(node, ast.Attribute) and node not in explained:
                used |= {node.attr} if ast.unparse(node.value) == "ErrorCode" else set()
    assert set(CODES) == set(ErrorCode)
    assert used == set(ErrorCode.__members__)


def test_codes_are_written_in_errors_alone() -> None:
    """Other files name them; in a message or a docstring the code itself may stand."""
    literal = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.value}"
        for path, tree in sources()
        if path != ROOT / "common" / "errors.py"
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and re.fullmatch(r"E\d{3}", str(node.value))
    ]
    assert literal == []


def test_every_error_class_has_a_code_of_its_family() -> None:
    families = {
        "UsageError": "E1",
        "ContractError": "E1",
        "RefusalError": "E2",
        "DataError": "E3",
        "PeerError": "E4",
        "ProtocolError": "E5",
        "RunError": "E6",
    }
    found = list(SilotuneError.__subclasses__())
    found += [sub for one in found for sub in one.__subclasses__()]
    for error in found:
        if error.__module__ == "silotune.common.errors":
            assert error.default_code in CODES
            assert error.default_code.startswith(families[error.__name__])
    assert families.keys() <= {error.__name__ for error in found}


# silotune contract


def test_show(run: Callable[..., Ran]) -> None:
    heart = contracts.load(HEART)
    code, out, err = run("contract", "show", HEART)
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == f"heart-diagnosis  {heart.hash}"
    # An epsilon is never shown without its delta, unit and accountant.
    p = heart.privacy
    assert f"ε ≤ {p.epsilon:g}, δ = {p.delta:g} per record and site (exact composition;" in out
    assert f"{heart.rounds}; quorum {heart.quorum} of 4" in out
    for name in (*heart.weights(), *heart.task.answers.split(", "), "head, then head and LoRA (B)"):
        assert name in out
    assert "nothing else" not in out
    for also in ("a receipt of the ledger", "hashes of contract and request", "incident number"):
        assert also in out


@pytest.mark.parametrize("command", ["show", "validate"])
def test_a_contract_is_named_by_a_file_a_runs_folder_or_a_recipe(
    run: Callable[..., Ran], command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heart = contracts.load(HEART)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "contract.json").write_text(heart.model_dump_json())
    (tmp_path / "heart-diagnosis").mkdir()  # a folder of that name hides no recipe
    for name in (HEART, "run", tmp_path / "run", "heart-diagnosis"):
        code, out, err = run("contract", command, name)
        assert (code, err) == (0, "")
        assert heart.hash in out
    other = heart.changed(name="another")
    (tmp_path / "heart-diagnosis" / "contract.json").write_text(other.model_dump_json())
    assert other.hash in run("contract", command, "heart-diagnosis")[1]  # but a run's does
    (tmp_path / "empty").mkdir()
    for name, words in (
        ("heart-diagnosi", "Did you mean 'heart-diagnosis'?"),
        ("nothing", "Recipes: card-fraud,"),
        ("empty", "it has no contract.json"),
        ("none.toml", "none.toml"),
    ):
        code, out, err = run("contract", command, name)
        assert (code, out) == (2, "")
        assert words in err


def test_show_json_is_the_canonical_form(run: Callable[..., Ran]) -> None:
    heart = contracts.load(HEART)
    code, out, err = run("contract", "show", HEART, "--json")
    data = json.loads(out)
    assert (code, err, data.pop("sha256")) == (0, "", heart.hash)
    assert contracts.Contract.model_validate(data).hash == heart.hash


def test_show_says_where_a_site_has_a_target_of_its_own(
    run: Callable[..., Ran], tmp_path: Path
) -> None:
    path = tmp_path / "own.toml"
    text = HEART.read_text().replace('name = "Hungary"', 'name = "Hungary"\nepsilon = 2.0')
    path.write_text(text)
    out = run("contract", "show", path)[1]
    assert (
        "privacy  ε ≤ 8, δ = 0.0001 per record and site, but Hungary ε ≤ 2, δ = 0.0001 (exact "
        "composition; add or remove one)"
    ) in out
    assert "but" not in run("contract", "show", HEART)[1].splitlines()[1]


def test_show_says_what_the_plan_can_learn(run: Callable[..., Ran], tmp_path: Path) -> None:
    text, path = HEART.read_text(), tmp_path / "plan.toml"
    shown = {}
    for epsilon in (8.0, 0.1, 0.29):
        path.write_text(text.replace("epsilon = 8.0", f"epsilon = {epsilon}"))
        shown[epsilon] = run("contract", "show", path)[1]
    assert (
        "\n  forecast with a medium signal (the best possible model is right in 69 of" in shown[8.0]
    )
    assert (
        "\n  forecast ! too few records for a medium signal at this ε (n = 200 records per site, "
        "ε = 0.1): n ≥ 500 or ε ≥ 0.29 would do\n"
    ) in shown[0.1]
    assert "too few records" not in shown[0.29]
    path.write_text(text.replace("expected_units = 200", "expected_units = 500"))
    path.write_text(path.read_text().replace("epsilon = 8.0", "epsilon = 0.1"))
    assert "too few records" not in run("contract", "show", path)[1]


def test_show_says_when_there_is_no_privacy(run: Callable[..., Ran], tmp_path: Path) -> None:
    path = tmp_path / "open.toml"
    path.write_text(HEART.read_text().replace("[privacy]", '[privacy]\nmode = "none"'))
    out = run("contract", "show", path)[1]
    assert "NO differential privacy" in out
    assert "ε ≤" not in out
    assert "noised" not in out
    assert "forecast" not in out


def test_validate(run: Callable[..., Ran]) -> None:
    heart = contracts.load(HEART)
    unmasked = (
        "there is no [secure_aggregation]: sites refuse this contract unless their site.toml has "
        "permits.masked_only = false. `silotune server contract` adds it."
    )
    code, out, wrong = run("contract", "validate", HEART)
    assert (code, out.splitlines()[:2], wrong) == (
        0,
        [f"✓ contract.toml is valid  {heart.hash}", f"! {unmasked}"],
        "",
    )
    code, out, _ = run("contract", "validate", HEART, "--json")
    found = json.loads(out)
    assert (code, found["valid"], found["sha256"]) == (0, True, heart.hash)
    assert found["warnings"] == [unmasked]
    # Where the model is not here, it is said that nothing is known about it.
    left_out = [] if present("all-MiniLM-L6-v2") else ["not checked: [model] and [adapter]"]
    assert [what[:34] for what in found["not_checked"]] == left_out


@pytest.mark.parametrize("verb", ["show", "validate"])
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_bad_contract_is_told_in_full(
    run: Callable[..., Ran], tmp_path: Path, verb: str, options: list[str]
) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(
        HEART.read_text().replace("epsilon = 8.0", "epsilon = -8.0").replace("quorum", "quorumm")
    )
    code, out, err = run("contract", verb, path, *options)
    assert (code, out) == (2, "")
    if options:
        found = json.loads(err)["error"]
        assert found["code"] == "E103"
        first, *rest = found["problems"]
    else:
        first, *rest = err.splitlines()
        assert first.startswith("✗ E103 ")
    told = "\n".join([first, *rest])
    for part in (
        "Key 'quorum' is missing",
        "Did you mean 'quorum'?",
        "'privacy.epsilon'",
        "-8.0",
        "bad.toml:",
    ):
        assert part in told
    assert len(rest) == 2


def three_sites(tmp_path: Path, sites: int, quorum: int, *lines: str) -> Path:
    text = TABLE_CONTRACT[: TABLE_CONTRACT.index("[[sites]]")]
    text = text.replace("quorum = 2", f"quorum = {quorum}") + "\n".join(lines) + "\n"
    for at in range(sites):
        text += f'[[sites]]\nname = "site-{at}"\npublic_key = "{at}{"0" * 63}"\n'
    path = tmp_path / f"{sites}-{quorum}-{len(lines)}.toml"
    path.write_text(text)
    return path


def test_validate_says_that_one_missing_site_stops_a_masked_run_and_how_to_prevent_it(
    run: Callable[..., Ran], tmp_path: Path
) -> None:
    code, out, _ = run("contract", "validate", three_sites(tmp_path, 3, 3, "[secure_aggregation]"))
    assert (code, out.splitlines()[1:]) == (
        0,
        [
            "! all 3 sites must answer in every round: one missing site stops the run. With quorum "
            "= 2 and secure_aggregation.threshold = 2 one may be missing; the server then sees "
            "sums of 2 sites."
        ],
    )
    followed = three_sites(tmp_path, 3, 2, "[secure_aggregation]", "threshold = 2")
    code, out, _ = run("contract", "validate", followed)
    assert (code, len(out.splitlines())) == (0, 1)
    colluding = three_sites(tmp_path, 3, 3, "[secure_aggregation]", "max_colluding_sites = 1")
    assert run("contract", "validate", colluding)[1].splitlines()[1:] == [
        "! all 3 sites must answer in every round: one missing site stops the run."
    ]
    four = three_sites(tmp_path, 4, 3, "[secure_aggregation]")
    assert len(run("contract", "validate", four)[1].splitlines()) == 1


@pytest.mark.parametrize(
    ("sites", "words"),
    [
        (2, ""),
        (
            3,
            "adds it; then all 3 sites must answer in every round: one missing site stops the run.",
        ),
        (4, "`silotune server contract` adds it."),
    ],
)
def test_validate_says_that_sites_refuse_a_contract_that_could_have_masks(
    run: Callable[..., Ran], tmp_path: Path, sites: int, words: str
) -> None:
    code, out, _ = run("contract", "validate", three_sites(tmp_path, sites, 2))
    said = out.splitlines()[1:]
    assert code == 0
    if words:
        assert len(said) == 1
        assert "permits.masked_only = false" in said[0]
        assert said[0].endswith(words)
    else:
        assert not said
