"""What the commands of a site tell its owner to do: it works as printed, from any folder."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from silotune.client.operations import preflight
from silotune.client.site import policy as policies
from silotune.client.site.commands import on_site
from silotune.client.site.folder import SiteFolder
from silotune.common.contract import contract as contracts
from silotune.common.contract.contract import Contract
from silotune.common.data import records
from silotune.common.data.header import columns_like
from silotune.common.data.records import Table
from silotune.common.errors import ContractError, DataError, counted
from silotune.common.runtime import terminal
from silotune.server import cli as server_cli
from silotune.simulations.datasets import catalog
from tests import tiny
from tests.common.data.test_text_decoding import TOKENS
from tests.conftest import Ran
from tests.test_layout import ROOT

Run = Callable[..., Ran]
Rows = Callable[..., Path]
NEW = "silotune site init --name NAME --folder"


@pytest.fixture
def site(
    tmp_path: Path,
    run: Run,
    table_contract: Contract,
    write_rows: Rows,
    monkeypatch: pytest.MonkeyPatch,
) -> SiteFolder:
    """A site in `my site`, seen from the folder above, that permits contract.json and has no
    server."""
    monkeypatch.chdir(tmp_path)
    Path("contract.json").write_text(table_contract.model_dump_json())
    assert run("site", "init", "--name", "north", "--folder", "my site")[0] == 0
    write_rows(Path("my site/records.csv"), 120).chmod(0o600)
    found = SiteFolder(Path("my site/site.toml"))
    edit(found, "contracts = []", f'contracts = ["{table_contract.hash}"]')
    edit(found, 'duplicate_records = "refuse"', 'duplicate_records = "keep"')
    assert run("site", "sign", "--config", found.config)[0] == 0
    return found


def edit(site: SiteFolder, old: str, new: str) -> None:
    text = site.config.read_text()
    assert old in text
    site.config.write_text(text.replace(old, new))


def row_of(run: Run, site: SiteFolder, name: str) -> dict[str, str]:
    _, out, _ = run("site", "check", "contract.json", "--config", site.config, "--json")
    (row,) = (row for row in json.loads(out)["checks"] if row["name"] == name)
    found: dict[str, str] = row
    return found


def test_join_names_the_option_that_is_wrong(site: SiteFolder, run: Run) -> None:
    words = ("--server", "localhost", "--ca", "ca.crt", "--fingerprint", "AA")
    code, _, err = run("site", "join", "contract.json", *words, "--config", site.config)
    assert code == 2
    assert "must be HOST:PORT, such as fl.example.org:8443" in err
    assert 'got "localhost" (--server).' in err


# Which site ------------------------------------------------------------------------------------


COMMANDS = [
    ("site", "check", "contract.json"),
    ("site", "sign"),
    ("site", "fingerprint"),
    ("site", "join", "contract.json", "--server", "h:1", "--ca", "c", "--fingerprint", "f"),
    ("site", "start", "contract.json", "--one-user"),
    ("site", "prepare", "contract.json"),
    ("site", "worker", "contract.json", "--socket", "s"),
    ("site", "own", "released"),
    ("site", "metrics", "--port", "9464"),
    ("privacy", "spent"),
    ("privacy", "verify"),
    ("privacy", "export", "out.jsonl"),
]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words[:2]))
def test_a_site_that_is_not_there_is_one_sentence(
    site: SiteFolder,
    run: Run,
    words: tuple[str, ...],
    table_contract: Contract,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "umask", lambda mask: mask)  # `site worker` sets that of its process
    Path("released").mkdir()
    Path("released/contract.json").write_text(table_contract.model_dump_json())
    code, out, err = run(*words, "--config", "nosuch/site.toml")
    assert (code, out) == (2, "")
    assert err == (
        "✗ E102 There is no site at nosuch/site.toml. Name its site.toml with --config, or make a "
        f"site: {NEW} nosuch\n"
    )
    code, out, err = run(*words, "--config", "released")
    assert (code, out) == (2, "")
    assert err.startswith("✗ E102 --config released is a folder without site.toml.")


def test_a_sites_folder_stands_for_its_policy(site: SiteFolder, run: Run) -> None:
    for words in (("site", "fingerprint"), ("privacy", "verify"), ("site", "sign")):
        by_file = run(*words, "--config", "my site/site.toml")
        if words[-1] != "sign":  # whose number rises
            assert run(*words, "--config", "my site") == by_file
        assert by_file[0] == 0
    assert row_of(run, SiteFolder(Path("my site")), "policy")["state"] == "ok"


def test_a_free_disk_is_looked_for_in_a_folder_that_is_there(tmp_path: Path) -> None:
    row = preflight._disk(SiteFolder(tmp_path / "nosuch" / "site.toml"))
    assert (row.state, row.name) == ("problem", "disk")


def test_init_writes_a_path_that_is_found_from_site_toml(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("d").mkdir()
    file = Path("d/rows.csv")
    file.write_text("a\n1\n")

    def made(name: str, *words: str) -> tuple[Path | None, str]:
        _, out, _ = run("site", "init", "--name", "a", "--folder", name, *words)
        return policies.load(tmp_path / name / "site.toml").data.file, out

    found, out = made("beside", "--data", "d/rows.csv")
    assert found == file.resolve()
    assert "not there" not in out
    Path("above/d").mkdir(parents=True)
    file.rename("above/d/rows.csv")
    found, out = made("above", "--data", "above/d/rows.csv")
    assert (found, 'file = "d/rows.csv"' in Path("above/site.toml").read_text()) == (
        tmp_path / "above/d/rows.csv",
        True,
    )
    assert "not there" not in out
    found, out = made("later", "--data", "rows.csv")
    assert found == tmp_path / "later" / "rows.csv"
    assert f"! records {found} is not there yet" in out
    Path("records.csv").write_text("a\n1\n")
    found, out = made("default")
    assert found == tmp_path / "default" / "records.csv"
    assert f"! records {found} is not there yet" in out


def test_an_export_replaces_no_file(site: SiteFolder, run: Run) -> None:
    file = site.folder / "records.csv"
    before = file.read_bytes()
    code, _, err = run("privacy", "export", file, "--config", site.config)
    assert (code, file.read_bytes()) == (2, before)
    assert "Name a new file." in err


def test_check_names_the_ways_into_a_contract(
    site: SiteFolder, run: Run, table_contract: Contract
) -> None:
    roster = row_of(run, site, "roster")
    assert roster["result"] == "this site is in it, without a key"
    for words in ("north.request.json to the operator", "server add REQUEST", "server contract"):
        assert words in roster["fix"]
    assert row_of(run, site, "masks")["fix"] == (
        "secure aggregation needs 3 sites, and the contract has 2"
    )
    edit(site, table_contract.hash, "0" * 64)
    assert (
        "agrees to it: silotune site join contract.json --server"
        in (row_of(run, site, "permission")["fix"])
    )


# Remedies of check -----------------------------------------------------------------------------


def test_the_remedy_for_a_data_file_is_that_of_its_cause(site: SiteFolder, run: Run) -> None:
    file = site.folder / "records.csv"
    sign = shlex.join(["silotune", "site", "sign", "--config", str(site.config)])
    file.chmod(0o644)
    assert row_of(run, site, "data access")["fix"] == shlex.join(["chmod", "600", str(file)])
    subprocess.run(shlex.split(row_of(run, site, "data access")["fix"]), check=True)
    assert row_of(run, site, "data access")["state"] == "ok"
    file.unlink()
    row = row_of(run, site, "data access")
    then = f"[data] of {site.config}, then: {sign}"
    assert row["fix"] == f"put the records there, or correct file in {then}"
    assert (row["state"], "chmod" in row["fix"]) == ("problem", False)
    file.mkdir()
    row = row_of(run, site, "data access")
    assert (row["result"], row["fix"]) == (f"{file} is no file.", f"name a file as file in {then}")


def test_a_data_file_of_another_user(site: SiteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    file = site.folder / "records.csv"
    monkeypatch.setattr(os, "geteuid", lambda: 987654)
    row = preflight._access(file, site)
    quoted = shlex.quote(str(file))
    assert row.fix == f"as root: chown 987654 {quoted} && chmod 600 {quoted}"


def test_a_site_without_a_server_is_told_to_join(site: SiteFolder, run: Run) -> None:
    code, out, _ = run("site", "check", "contract.json", "--config", site.config)
    join = (
        "silotune site join contract.json --server HOST:PORT --ca CA --fingerprint FINGERPRINT "
        "--config 'my site/site.toml'"
    )
    assert code == 0
    assert out.splitlines()[-1] == f"next:   {join}   (the operator has all three)"
    code, _, err = run("site", "start", "contract.json", "--config", site.config, "--one-user")
    assert (code, join in err) == (2, True)


def test_what_is_said_of_a_missing_model_works(
    site: SiteFolder, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By following it, with a source that is a tiny model: first fetched, then named."""
    folder = tiny.folder_of("bert")
    contract = tiny.contract_of("classification", "bert", folder)
    name = getattr(contract.model, "name")  # noqa: B009 - a one-hot model has none
    Path("contract.json").write_text(contract.model_dump_json())

    class Source:
        path = tmp_path / "the cache" / name
        sha256, converted = tiny.sha256(folder), ""

    monkeypatch.setattr(catalog, "SOURCES", {name: Source})
    fix = row_of(run, site, "model")["fix"]
    assert fix.startswith(f"{shlex.join(['silotune', 'data', 'fetch', name])}, then put folder = ")
    shutil.copytree(folder, Source.path)  # what `data fetch` does
    fix = row_of(run, site, "model")["fix"]
    line, config, sign = re.fullmatch(
        r'put (folder = ".*") in \[model\] of (.*), then: (silotune .*?)   \(.*\)', fix
    ).groups()  # type: ignore[union-attr]
    assert Path(config) == site.config
    edit(site, "[model]\n", f"[model]\n{line}\n")
    assert run(*shlex.split(sign)[1:])[0] == 0
    assert row_of(run, site, "model")["state"] == "ok"
    assert row_of(run, site, "signature")["state"] == "ok"
    edit(site, line, "")
    Source.sha256 = "0" * 64  # another model of that name
    assert f"the folder of '{name}', in [model]" in row_of(run, site, "model")["fix"]
    monkeypatch.setattr(catalog, "SOURCES", {})
    assert f"the folder of '{name}', in [model]" in row_of(run, site, "model")["fix"]


def test_texts_that_are_cut_before_their_entities_are_a_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a tokenizer in the folder, words count. The counts are on the owner's screen only."""
    contract = contracts.parse(TOKENS)

    def of(*entities_at: int, rest: int = 0) -> preflight.Check:
        rows = [
            [" ".join("w" * 12), " ".join("B-Drug" if n == at else "O" for n in range(12))]
            for at in entities_at
        ] + [["a b", "O O"]] * rest
        table = Table("a.csv", ["sentence", "marks"], list(enumerate(rows, 2)))
        (row,) = preflight._lengths(records.parse(table, contract), contract, Path("nosuch"))
        return row

    row = of(9, 10, 11)
    assert (row.name, row.state, row.code) == ("lengths", "problem", "E315")
    assert not re.search(r"\d", row.result.replace("8 tokens", ""))
    assert "3 of 3 entities" in row.local
    row = of(9, 1)
    assert (row.state, row.code) == ("warning", "")
    assert "raise model.max_tokens" in row.fix
    assert of(rest=3).state == "ok"
    monkeypatch.setattr(preflight, "MOST_MEASURED", 2)
    assert "one record in 2 was measured: 2 of 2 texts" in of(9, 9, 9, 9).local


def test_commands_to_type_name_their_site() -> None:
    """A command of a site in a text stands between backticks, where it names the command, or is
    made by on_site, which gives it --config."""
    for path in sorted((ROOT / "client").rglob("*.py")):
        tree = ast.parse(path.read_text())
        documented = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                bare = re.search(r"(?<!`)silotune (site|privacy|data) \w", node.value)
                assert id(node) in documented or not bare, f"{path.name}: {node.value}"
    assert on_site(Path("a b"), "check", "c") == ("site", "check", "c", "--config", Path("a b"))


def test_remedies_of_check_say_what_to_do(site: SiteFolder, run: Run) -> None:
    """With the site's own paths, for it is seen from another folder."""
    edit(site, "epsilon = 8.0", "epsilon = 7.0")
    assert row_of(run, site, "signature")["fix"] == (f"silotune site sign --config '{site.config}'")
    code, out, _ = run("site", "check", "contract.json", "--config", site.config)
    assert code == 1
    fixes = [line for line in out.splitlines() if line.lstrip().startswith("→")]
    assert fixes
    for line in fixes:
        assert "see the sentence" not in line
        assert "see whether" not in line
        assert "restore it" not in line
        if "silotune site" in line:
            assert "--config" in line


# Wording ---------------------------------------------------------------------------------------


def test_the_port_of_examples_is_the_one_that_the_server_opens() -> None:
    (port,) = (p.default for p in server_cli.init.params if p.name == "port")
    for path in [ROOT / "client/site/site.toml.j2", ROOT / "client/cli/site.py"]:
        named = set(re.findall(r"server\.example\.org:(\d+)", path.read_text()))
        assert named == {str(port)}, path


def test_a_problem_of_site_toml_names_its_path_and_key(site: SiteFolder, tmp_path: Path) -> None:
    edit(site, "[model]", '[prepare.deidentify]\nactions = { cards = "block" }\n[model]')
    with pytest.raises(ContractError) as error:
        policies.load(site.config)
    (problem,) = error.value.problems
    assert problem.startswith("'prepare.deidentify.actions.cards' must be ")
    assert "(my site/site.toml:" in problem
    bad = tmp_path / "c.toml"
    bad.write_text("format = 2\n")
    with pytest.raises(ContractError, match=re.escape(f"({bad}:1)")):
        contracts.load(bad)


@pytest.mark.parametrize("divider", ":;|\t")
def test_a_header_that_is_one_column_is_a_question_of_the_delimiter(divider: str) -> None:
    name = f"note{divider}outcome"
    said = columns_like(["note", "outcome"], [name])
    assert "set the delimiter of the file, one of , ; tab |" in said
    assert "Did you mean" not in said
    assert columns_like(["notes"], ["note", "outcome"]) == " Did you mean 'note'?"


def test_numbers_of_things_are_words_that_fit() -> None:
    assert [counted(n, "row") for n in (0, 1, 2000)] == ["0 rows", "1 row", "2,000 rows"]
    assert counted(1, "entry", "entries") == "1 entry"
    assert counted(2, "entry", "entries") == "2 entries"


def test_a_site_that_has_done_nothing_has_one_entry(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run("site", "init", "--name", "a")
    assert run("privacy", "verify")[1].startswith("✓ 1 entry: ")
    assert "0 charges" in run("privacy", "verify")[1]


def test_what_a_reader_of_rows_says_is_no_claim_about_training(table_contract: Contract) -> None:
    for table in (
        Table("a.csv", ["x"], [(2, ["1"])]),
        Table("a.csv", ["age", "smoker", "outcome"], []),
        Table("a.csv", ["age", "smoker", "outcome"], [(2, ["x", "yes", "1"])]),
    ):
        with pytest.raises(DataError) as error:
            records.parse(table, table_contract)
        assert "training" not in str(error.value)
        assert "ε" not in str(error.value)
        assert "fill it" not in str(error.value)


# What is on the screen -------------------------------------------------------------------------


class Terminal:
    """A standard error that says that it is one, and keeps what is written."""

    def __init__(self, is_one: bool) -> None:
        self.is_one, self.text = is_one, ""

    def isatty(self) -> bool:
        return self.is_one

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass


def test_a_terminal_shows_what_goes_on_and_nothing_of_it_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = Terminal(is_one=True)
    monkeypatch.setattr(sys, "stderr", shown)
    with terminal.busy("checking a\x1b]52;\n"):
        assert shown.text.startswith("checking a\\x1b]52;\\n …")
    assert shown.text.endswith("\r\x1b[K")
    monkeypatch.setattr(sys, "stderr", other := Terminal(is_one=False))
    with terminal.busy("checking"):
        pass
    assert other.text == ""


@pytest.mark.parametrize(
    "words",
    [
        ["site", "check", "contract.json", "--config", "my site"],
        ["site", "prepare", "contract.json", "--config", "my site"],
        ["contract", "validate", "contract.json"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_it_is_on_the_screen_before_what_takes_long_is_loaded(
    site: SiteFolder, words: list[str]
) -> None:
    program = (
        "import sys, contextlib\n"
        "from silotune.common.cli import main as cli\n"
        "from silotune.common.runtime import terminal\n"
        "def busy(what):\n"
        "    sys.exit(7 + ('torch' in sys.modules))\n"
        "terminal.busy = busy\n"
        f"sys.argv = ['silotune', *{words!r}]\n"
        "cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == 7, done.stderr
