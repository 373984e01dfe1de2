"""Records from SQLite and from a real PostgreSQL, which the tests start and stop themselves."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy

from silotune.client.operations.preflight import check
from silotune.client.privacy.ledger import PrivacyLedger
from silotune.client.records import record_ids
from silotune.client.site.folder import SiteFolder
from silotune.client.site.policy import Data, Policy, parse, permissive_policy
from silotune.client.worker.worker import Worker
from silotune.common.contract.contract import Contract
from silotune.common.data import records, sql_source, text_table
from silotune.common.errors import ContractError, DataError
from silotune.common.runtime import subprocesses

CANARY = "Kanarienvogel77"
PASSWORD = "p@ss/w:rd%${x}"  # what a URL has other uses for
USER = "postgres"  # Debian's package makes it; the server does not run as root
ROWS = [(71, "yes", 1), (None, None, 0), (20.5, "no", 1)]
CREATE = "CREATE TABLE visits (age NUMERIC, smoker TEXT, outcome INTEGER)"
QUERY = "SELECT age, smoker, outcome FROM visits ORDER BY age"
SITE = """
name = "north"
[data]
{data}
[budgets.record]
epsilon = 8.0
delta = 1e-4
[permits]
"""


@dataclass(frozen=True)
class Server:
    port: int
    folder: Path

    def url(self, database: str = "hospital", password: str = "${PASSWORD}") -> str:
        return f"postgresql+psycopg://reader:{password}@127.0.0.1:{self.port}/{database}"

    def run(self, *statements: str, database: str = "hospital") -> None:
        """As the owner of the tables, over the socket."""
        url = sqlalchemy.URL.create(
            "postgresql+psycopg", "owner", PASSWORD, str(self.folder), self.port, database
        )
        engine = sqlalchemy.create_engine(url, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            for statement in statements:
                connection.exec_driver_sql(statement)
        engine.dispose()


@pytest.fixture(scope="module")
def postgres() -> Iterator[Server]:
    """A server with a table, a user who owns it and one who may do as much (so that what keeps a
    query from writing is not a lack of rights)."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    if not found:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    bin_, user = found[-1].parent, USER if os.getuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="silotune-pg-"))  # short: a socket lies in it
    word = folder / "password"
    word.write_text(PASSWORD)
    if user:
        for path in (folder, word):
            shutil.chown(path, user)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = None
    with (folder / "log").open("wb") as log:
        try:
            subprocess.run(
                [
                    bin_ / "initdb",
                    "-D",
                    folder / "data",
                    "-U",
                    "owner",
                    "-A",
                    "scram-sha-256",
                    f"--pwfile={word}",
                    "-E",
                    "UTF8",
                    "--locale=C.UTF-8",
                    "--no-sync",
                ],
                check=True,
                user=user,
                group=user,
                stdout=log,
                stderr=log,
                cwd="/",
            )
            server = subprocess.Popen(
                [
                    bin_ / "postgres",
                    "-D",
                    folder / "data",
                    "-p",
                    str(port),
                    "-k",
                    folder,
                    "-c",
                    "listen_addresses=127.0.0.1",
                    "-c",
                    "fsync=off",
                ],
                user=user,
                group=user,
                stdout=log,
                stderr=log,
                cwd="/",
                preexec_fn=subprocesses.end_with_parent,  # noqa: PLW1509  also when pytest is killed
            )
            made = Server(port, folder)
            end = time.monotonic() + 60
            while True:
                try:
                    made.run("SELECT 1", database="postgres")
                    break
                except sqlalchemy.exc.OperationalError:
                    assert server.poll() is None, (folder / "log").read_text()
                    assert time.monotonic() < end
                    time.sleep(0.1)
            made.run("CREATE DATABASE hospital", database="postgres")
            quoted = PASSWORD.replace("'", "''").replace("%", "%%")
            made.run(f"CREATE ROLE reader LOGIN SUPERUSER PASSWORD '{quoted}'", CREATE)
            made.run(
                "CREATE SEQUENCE counter",
                "INSERT INTO visits VALUES (71, 'yes', 1), (NULL, NULL, 0), (20.5, 'no', 1)",
            )
            yield made
        finally:
            if server is not None:
                server.terminate()  # a smart shutdown would wait for clients: then harder
                try:
                    server.wait(10)
                except subprocess.TimeoutExpired:
                    server.kill()
                    server.wait()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def sqlite(tmp_path: Path) -> Path:
    path = tmp_path / "hospital.db"
    with sqlite3.connect(path) as connection:
        connection.execute(CREATE)
        connection.executemany("INSERT INTO visits VALUES (?, ?, ?)", ROWS)
    connection.close()
    return path


@pytest.fixture
def refused(
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., DataError]:
    """refused(url, query) -> the error; neither a value nor the password is anywhere in it, but for
    what `local` has."""

    def read(url: str, statement: str = QUERY) -> DataError:
        monkeypatch.setenv("PASSWORD", PASSWORD)
        with caplog.at_level(logging.DEBUG), pytest.raises(DataError) as caught:
            Data(url=url, query=statement).table()
        error, out = caught.value, capfd.readouterr()
        for shown in (
            str(error),
            repr(error),
            out.out,
            out.err,
            caplog.text,
            "".join(traceback.format_exception(error)),
        ):
            assert CANARY not in shown
            assert PASSWORD not in shown
        assert PASSWORD not in error.local
        assert "\n" not in str(error)
        return error

    return read


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of either database, with the table in it."""
    monkeypatch.setenv("PASSWORD", PASSWORD)
    if request.param == "sqlite":
        return f"sqlite:///{request.getfixturevalue('sqlite')}"
    found: str = request.getfixturevalue("postgres").url()
    return found


# What is read ---------------------------------------------------------------------------------


def test_rows_are_those_of_a_csv_file(url: str, tmp_path: Path, table_contract: Contract) -> None:
    found = Data(url=url, query=QUERY + ";").table()
    assert found.header == ["age", "smoker", "outcome"]
    by_age = {tuple(cells) for _, cells in found.rows}
    assert by_age == {("71", "yes", "1"), ("", "", "0"), ("20.5", "no", "1")}
    assert [line for line, _ in found.rows] == [1, 2, 3]
    (tmp_path / "a.csv").write_text("smoker,outcome,age\nyes,1,71.0\n,0,\nno,1,2.05e1\n")
    csv = records.table(tmp_path / "a.csv")
    prints = [record_ids.of_table(table, (), bytes(32)).id for table in (found, csv)]
    assert prints[0] == prints[1]
    assert len(records.parse(found, table_contract)) == 3


def test_blocks(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (text_table, sql_source):
        monkeypatch.setattr(module, "BLOCK_ROWS", 1000)
    series = (
        "SELECT * FROM generate_series(1, 2500) AS n"
        if url.startswith("postgres")
        else "WITH RECURSIVE s(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM s WHERE n < 2500) "
        "SELECT n FROM s"
    )
    found = Data(url=url, query=series).table()
    assert list(found.rows) == [(n, [str(n)]) for n in range(1, 2501)]


def test_percent_signs_and_colons_are_the_querys_own(url: str) -> None:
    found = Data(url=url, query="SELECT '10% :x ' || smoker FROM visits WHERE smoker LIKE 'y%'")
    assert [row for _, row in found.table().rows] == [["10% :x yes"]]


def test_types_of_postgres(postgres: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PASSWORD", PASSWORD)
    found = Data(
        url=postgres.url(),
        query="""
        SELECT true, 1.50::numeric, 2::float8, 0.1::float4, DATE '2026-01-31',
        TIMESTAMP '2026-01-31 10:00', INTERVAL '1 minute', NULL::int, 'Ärger'::varchar,
        '00000000-0000-0000-0000-000000000001'::uuid, 'NaN'::numeric, 12::bigint
    """,
    ).table()
    assert found.rows[0][1] == [
        "true",
        "1.5",
        "2",
        "0.1",
        "2026-01-31",
        "2026-01-31 10:00:00",
        "60",
        "",
        "Ärger",
        "00000000-0000-0000-0000-000000000001",
        "",
        "12",
    ]


def test_the_whole_url_from_the_environment(sqlite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOSPITAL_URL", f"sqlite:///{sqlite}")
    monkeypatch.setenv("FOLDER", str(sqlite.parent))
    for url in ("${HOSPITAL_URL}", "sqlite:///${FOLDER}/hospital.db"):
        assert len(Data(url=url, query=QUERY).table().rows) == 3


def test_an_sqlite_file_starts_at_site_tomls_folder(
    sqlite: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    policy = site_toml(sqlite.parent, f'url = "sqlite:///hospital.db"\nquery = "{QUERY}"')
    assert len(policy.data.table().rows) == 3


def test_a_worker_reads_once_and_trains_on_what_it_fingerprints(
    sqlite: Path, table_contract: Contract, write_rows: Callable[..., Path]
) -> None:
    lines = write_rows(sqlite.with_name("rows.csv"), 120).read_text().splitlines()
    with sqlite3.connect(sqlite) as connection:
        connection.execute("DELETE FROM visits")
        connection.executemany(
            "INSERT INTO visits VALUES (?, ?, ?)", [line.split(",") for line in lines[1:]]
        )
    connection.close()
    policy = permissive_policy(table_contract, "north", sqlite, None)
    data = Data(url=f"sqlite:///{sqlite}", query=QUERY, duplicate_records="keep")
    worker = Worker(
        policy.model_copy(update={"data": data}), table_contract, PrivacyLedger.in_memory("north")
    )
    by_file = permissive_policy(table_contract, "north", sqlite.with_name("rows.csv"), None)
    other = Worker(by_file, table_contract, worker.ledger)
    assert worker.record_set.id == other.record_set.id
    assert len(worker.data.labels) == 120


# What is refused ------------------------------------------------------------------------------


def test_a_query_that_writes(url: str, refused: Callable[..., DataError]) -> None:
    delete = "DELETE FROM visits"
    statements = [
        delete,
        f"{delete} RETURNING *",
        "DROP TABLE visits",
        f"INSERT INTO visits VALUES (1, '{CANARY}', 1)",
    ]
    if url.startswith("postgres"):
        statements += [
            f"WITH gone AS ({delete} RETURNING *) SELECT * FROM gone",
            "SELECT nextval('counter')",
        ]
    for statement in statements:
        error = refused(url, statement)
        assert error.code == "E312"
        assert any(word in str(error) for word in ("writes", "no single SELECT")), error
    assert len(Data(url=url, query=QUERY).table().rows) == 3


def test_a_function_that_writes(postgres: Server, refused: Callable[..., DataError]) -> None:
    postgres.run(
        "CREATE OR REPLACE FUNCTION loses() RETURNS int LANGUAGE sql AS "
        "'DELETE FROM visits RETURNING outcome'"
    )
    error = refused(postgres.url(), "SELECT loses()")
    assert "the query writes, and only reading is allowed" in str(error)
    assert "SQLSTATE 25006" in str(error)


def test_two_statements(url: str, refused: Callable[..., DataError]) -> None:
    for second in ("SELECT 1", "DELETE FROM visits", f"SELECT '{CANARY}'"):
        error = refused(url, f"{QUERY}; {second}")
        assert "no single SELECT" in str(error)
    if url.startswith("postgres"):
        refused(url, "SELECT 1; COMMIT; DELETE FROM visits")
    assert len(Data(url=url, query=QUERY).table().rows) == 3


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        (f"SELECT * FROM {CANARY}", "there is no such table"),
        (f"SELECT {CANARY} FROM visits", "there is no such column"),
        (f"SELEKT '{CANARY}'", "no single SELECT, or has a mistake"),
    ],
)
def test_a_query_with_a_mistake(
    url: str, refused: Callable[..., DataError], statement: str, words: str
) -> None:
    error = refused(url, statement)
    assert error.code == "E312"
    assert str(error).startswith("[data] query: ")
    assert words in str(error)
    assert error.local  # the owner may see what the driver says


def test_a_value_that_a_cast_chokes_on(postgres: Server, refused: Callable[..., DataError]) -> None:
    """PostgreSQL quotes it: invalid input syntax for type integer: "…"."""
    error = refused(
        postgres.url(), f"SELECT (smoker || v)::int FROM visits, (VALUES ('{CANARY}')) AS t (v)"
    )
    assert "a value in the table is not what the query makes of it" in str(error)
    assert "SQLSTATE 22P02" in str(error)
    assert CANARY in error.local


def test_a_value_that_fails_after_many_rows(
    postgres: Server, refused: Callable[..., DataError], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (text_table, sql_source):
        monkeypatch.setattr(module, "BLOCK_ROWS", 100)
    error = refused(
        postgres.url(),
        f"SELECT CASE WHEN n < 900 THEN n ELSE ('{CANARY}' || n)::int "
        "END FROM generate_series(1, 1000) AS n",
    )
    assert "Rows read before: 800." in str(error)


@pytest.mark.parametrize(
    "value",
    [
        f"ARRAY['{CANARY} x']",
        f'\'{{"a": "{CANARY}"}}\'::json',
        f"'{CANARY}'::bytea",
        "int4range(1, 3)",
    ],
)
def test_columns_that_are_no_single_values(
    postgres: Server, refused: Callable[..., DataError], value: str
) -> None:
    error = refused(postgres.url(), f"SELECT {value}")
    assert error.code == "E311"
    assert any(
        what in str(error)
        for what in (
            "an object or bytes where one value is expected: row 1",
            "a list with a word that is empty or has a space in it: row 1",
        )
    )


def test_sqlite_text_that_is_no_text(sqlite: Path, refused: Callable[..., DataError]) -> None:
    with sqlite3.connect(sqlite) as connection:
        connection.execute(f"INSERT INTO visits VALUES (1, CAST('{CANARY}' || x'ff' AS TEXT), 1)")
    connection.close()
    error = refused(f"sqlite:///{sqlite}")
    assert error.code == "E312"


def test_a_wrong_password(postgres: Server, refused: Callable[..., DataError]) -> None:
    error = refused(postgres.url(password=f"no{CANARY}"))
    assert "does not accept this user or password" in str(error)


def test_no_such_user_or_database(postgres: Server, refused: Callable[..., DataError]) -> None:
    error = refused(postgres.url(database=f"no{CANARY}"))
    assert "no such user or database" in str(error)
    error = refused(postgres.url().replace("reader", f"no{CANARY}"))
    assert "does not accept this user or password" in str(error)


def test_nobody_listens(refused: Callable[..., DataError]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        error = refused(Server(free.getsockname()[1], Path()).url())
    assert error.code == "E312"
    assert "the server refuses the connection" in str(error)
    assert "does not resolve" in str(refused("postgresql+psycopg://a:b@no-such-host.invalid/x"))


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("nosuch://u:${PASSWORD}@host/db", "no driver of the name"),
        ("postgresql+nosuch://u@host/db", "no driver of the name"),
        ("oracle+cx_oracle://u:${PASSWORD}@host/db", "is not installed (cx_Oracle)"),
        ("no url at all " + CANARY, "is no URL of a database"),
        ("postgresql+psycopg://u:p@host:port/db", "is no URL of a database"),
        (
            "postgresql+psycopg://u:${NO_SUCH_WORD}@host/db",
            "names ${NO_SUCH_WORD}, which is not set",
        ),
        ("sqlite:///no/such.db", "does not exist"),
        ("sqlite://", "does not exist"),
    ],
)
def test_urls_that_lead_nowhere(refused: Callable[..., DataError], url: str, words: str) -> None:
    error = refused(url)
    assert error.code == "E312"
    assert words in str(error)


def test_no_database_is_made_by_asking(tmp_path: Path, refused: Callable[..., DataError]) -> None:
    refused(f"sqlite:///{tmp_path}/new.db")
    assert not list(tmp_path.iterdir())
    (tmp_path / "text.db").write_text(f"age,{CANARY}\n" * 100)
    assert "the file is no database" in str(refused(f"sqlite:///{tmp_path}/text.db"))


MEASURE = """
import pathlib, re, sys, time
from silotune.common.data import sql_source

began = time.monotonic()
header, rows = sql_source.read(sys.argv[1], sys.argv[2])
peak = re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())
print(len(rows), len(header), int(peak[1]) << 10, time.monotonic() - began)
"""


@pytest.mark.nightly
def test_two_million_rows_of_a_database(url: str) -> None:
    """In a process of its own; of what it takes common/data/test_file_source.py tells the rest."""
    columns = ", ".join(f"n * {k} % 90 + 0.5 AS c{k}" for k in range(1, 14))
    series = (
        f"SELECT n, {columns} FROM generate_series(1, 2000000) AS n"
        if url.startswith("postgres")
        else "WITH RECURSIVE s(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM s WHERE n < 2000000) "
        f"SELECT n, {columns} FROM s"
    )
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, url, series], check=True, capture_output=True, text=True
    )
    print(done.stdout)
    rows, wide, peak, _ = map(float, done.stdout.split())
    assert (rows, wide) == (2_000_000, 14)
    assert peak < 1 << 30


# site.toml and the checks ---------------------------------------------------------------------


def site_toml(folder: Path, data: str) -> Policy:
    return parse(SITE.format(data=data), folder / "site.toml")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("key = []", "needs either a file, or a url and a query"),
        (
            'file = "a.csv"\nurl = "sqlite:///a"\nquery = "SELECT 1"',
            "needs either a file, or a url",
        ),
        ('url = "sqlite:///a.db"', "belong together"),
        ('query = "SELECT 1"', "belong together"),
        ('file = "a.csv"\nencoding = "latin-9000"', "'latin-9000' is not an encoding"),
        ('file = "a.csv"\nencoding = "base64"', "'base64' is not an encoding"),
    ],
)
def test_one_source_and_an_encoding_that_is_one(tmp_path: Path, data: str, words: str) -> None:
    with pytest.raises(ContractError) as caught:
        site_toml(tmp_path, data)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://u:word@h/d", True),
        ("postgresql://u:a${B}@h/d", True),
        ("postgresql://u:${WORD}@h/d", False),
        ("postgresql://u@h/d", False),
        ("${URL}", False),
        ("sqlite:///a:b@c.db", False),
    ],
)
def test_a_password_in_the_file_is_noticed(url: str, shown: bool) -> None:
    assert sql_source.shows_password(url) is shown


@pytest.mark.parametrize(
    ("statement", "has"),
    [
        ("SELECT a FROM b Order  By a", True),
        ("SELECT order_by FROM b", False),
    ],
)
def test_an_order_is_noticed(statement: str, has: bool) -> None:
    assert sql_source.ordered(statement) is has


def test_site_check_of_a_database(
    postgres: Server, tmp_path: Path, table_contract: Contract, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PASSWORD", PASSWORD)
    config = tmp_path / "site.toml"

    def rows(url: str, statement: str) -> dict[str, Any]:
        data = f'url = "{url}"\nquery = "{statement}"'
        config.write_text(SITE.format(data=data))
        return {row.name: row for row in check(SiteFolder(config), tmp_path / "no.toml")}

    found = rows(postgres.url(), QUERY)
    assert found["data"].result == "[data] query, 3 rows"
    assert "row numbers" not in found
    assert "data access" not in found
    found = rows(postgres.url(password="word"), "SELECT * FROM visits")
    assert found["row numbers"].state == found["data access"].state == "warning"
    assert "no ORDER BY" in found["row numbers"].result
    assert (found["data"].state, found["data"].code) == ("problem", "E312")
