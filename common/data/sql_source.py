"""Records from a database: one SELECT, in one transaction that only reads, fetched in blocks.

PostgreSQL and SQLite refuse to write in it; with other databases (SQLAlchemy knows many) the
transaction is rolled back, and a user who may only read is the owner's business.

A driver's errors quote statements and values, so what is told is their class, their SQLSTATE and a
sentence of ours; the driver's own words stand in `DataError.local`.
"""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from silotune.common.data.text_table import BLOCK_ROWS, Builder, Rows
from silotune.common.errors import DataError
from silotune.common.formats.cell_values import NotTextError, cell

if TYPE_CHECKING:
    from sqlalchemy import URL, Engine

SOURCE = "[data] query"
SECONDS = 10  # to reach a server
VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
ORDER = re.compile(r"\border\s+by\b", re.IGNORECASE)

# What went wrong, by SQLSTATE or by its class (the first two characters), PostgreSQL's and others'.
STATES = {
    "08": "the server cannot be reached or hung up",
    "0A": "the query writes or asks for what the server does not do; a single SELECT is expected",
    "22": "a value in the table is not what the query makes of it (a cast, a division)",
    "25006": "the query writes, and only reading is allowed",
    "28": "the server does not accept this user or password",
    "3D": "there is no such database",
    "42501": "this user may not read what the query names",
    "42601": "the query is no single SELECT, or has a mistake in its syntax",
    "42703": "there is no such column",
    "42P01": "there is no such table",
    "57014": "the server stopped it: it took too long",
}
# Where there is no SQLSTATE (SQLite, a connection that is refused): words of the driver's.
WORDS = {
    "no such table": STATES["42P01"],
    "no such column": STATES["42703"],
    "readonly": STATES["25006"],
    "not authorized": STATES["25006"],
    "one statement at a time": STATES["42601"],
    "syntax error": STATES["42601"],
    "incomplete input": STATES["42601"],
    "unable to open database": "the database's file does not exist or cannot be read",
    "not a database": "the file is no database",
    "password authentication failed": STATES["28"],
    "no password supplied": "the server asks for a password; name it in data.url as ${NAME}",
    "connection refused": "the server refuses the connection: is it running, is the port right?",
    "resolve": "the server's name does not resolve",
    "timeout": "the server does not answer: a firewall?",
    "does not exist": "there is no such user or database",
    "no such file": "the server's socket does not exist",
}


def ordered(query: str) -> bool:
    """Whether the rows have an order of their own: without one row numbers may change."""
    return ORDER.search(query) is not None


def variables(url: str) -> list[str]:
    """The environment variables that a URL names."""
    return VARIABLE.findall(url)


def shows_password(url: str) -> bool:
    """Whether a password stands in the URL itself."""
    found = re.match(r"[^/]*//[^/@]*:([^/]+)@", url)
    return found is not None and not VARIABLE.fullmatch(found[1])


def read(
    url: str, query: str, environment: Mapping[str, str] = os.environ
) -> tuple[list[str], Rows]:
    """The columns and rows of a query's result. DataError if it cannot be had.

    url: SQLAlchemy's, with ${NAME} for what stands in the environment (a password, or all of it).
    """
    engine = _engine(url, environment)
    builder, line = Builder(), 1
    try:
        with engine.connect() as connection:
            result = connection.exec_driver_sql(
                query.strip(),
                execution_options={"stream_results": True, "no_parameters": True},
            )
            if not result.returns_rows:
                raise DataError(f"{SOURCE} gives no rows: it is no SELECT.", code="E312")
            header = list(result.keys())
            # By a method: as an option it does not count for statements that are text.
            for rows in result.yield_per(BLOCK_ROWS).partitions():
                for row in rows:
                    builder.add(line, [cell(value) for value in row])
                    line += 1
            connection.rollback()
    except DataError:
        raise
    except NotTextError as error:
        raise DataError(
            f"{SOURCE} gives {error}: row {line}. Name the columns that are text, numbers, times "
            "or yes and no, or cast the others.",
            code="E311",
        ) from None
    except Exception as error:  # drivers raise what they like, and quote rows in it
        raise _database_error(error, line) from None
    finally:
        engine.dispose()
    return header, builder.rows()


def _engine(url: str, environment: Mapping[str, str]) -> Engine:
    try:
        import sqlalchemy
        from sqlalchemy import exc, pool
    except ModuleNotFoundError:
        raise DataError(
            "To read from a database install SQLAlchemy: pip install 'silotune[sql]'.", code="E312"
        ) from None
    try:
        found = _expanded(url, environment)
        name = found.get_backend_name()
        options: dict[str, Any] = {"poolclass": pool.NullPool, "hide_parameters": True}
        if name == "sqlite":
            path = found.database or ""
            if not Path(path).is_file():
                raise DataError(
                    "The database file that data.url names does not exist.",
                    code="E312",
                    local=f"it looked for {path}",
                )
            return sqlalchemy.create_engine(
                "sqlite://", creator=lambda: _reading_only(path), **options
            )
        if name == "postgresql":
            options["connect_args"] = {"connect_timeout": SECONDS}
            options["execution_options"] = {
                "isolation_level": "REPEATABLE READ",
                "postgresql_readonly": True,
            }
        return sqlalchemy.create_engine(found, **options)
    except exc.NoSuchModuleError:
        raise DataError(
            "SQLAlchemy has no driver of the name that data.url in site.toml begins with. Such URLs"
            " are postgresql+psycopg://user:${PASSWORD}@host/database and sqlite:///file.db.",
            code="E312",
        ) from None
    except ModuleNotFoundError as error:
        raise DataError(
            f"The driver that data.url names is not installed ({error.name}); PostgreSQL's comes "
            "with: pip install 'silotune[sql]'.",
            code="E312",
        ) from None
    except (exc.ArgumentError, ValueError):
        raise DataError(
            "data.url in site.toml is no URL of a database, such as "
            "postgresql+psycopg://user:${PASSWORD}@host/database or sqlite:///file.db.",
            code="E312",
        ) from None


def _expanded(url: str, environment: Mapping[str, str]) -> URL:
    """The URL with its variables' values, each within its own part: a password may hold an @."""
    from sqlalchemy import make_url

    if missing := [name for name in variables(url) if name not in environment]:
        raise DataError(
            f"data.url in site.toml names ${{{missing[0]}}}, which is not set in this process's "
            "environment.",
            code="E312",
        )

    def put(text: str | None) -> str | None:
        return text and VARIABLE.sub(lambda found: environment[found[1]], text)

    if VARIABLE.fullmatch(url):
        return make_url(put(url) or "")
    found = make_url(url)
    password = None if found.password is None else str(found.password)
    return found.set(
        username=put(found.username),
        password=put(password),
        host=put(found.host),
        database=put(found.database),
        query={
            name: put(value) or "" if isinstance(value, str) else value
            for name, value in found.query.items()
        },
    )


def _reading_only(path: str) -> sqlite3.Connection:
    connection = sqlite3.connect(f"file:{quote(path)}?mode=ro", uri=True)
    connection.execute("PRAGMA query_only = ON")
    return connection


def _database_error(error: Exception, line: int) -> DataError:
    """What happened in words of ours; the driver's are for the owner's screen."""
    cause = getattr(error, "orig", None) or error
    state = str(getattr(cause, "sqlstate", None) or "")
    message = str(cause).lower()
    why = (
        STATES.get(state)
        or STATES.get(state[:2])
        or next(
            (sentence for word, sentence in WORDS.items() if not state and word in message),
            "it failed",
        )
    )
    what = type(cause).__name__ + (f", SQLSTATE {state}" if state else "")
    read_ = f" Rows read before: {line - 1:,}." if line > 1 else ""
    return DataError(f"{SOURCE}: {why} ({what}).{read_}", code="E312", local=str(cause).strip())
