"""The tables of the recipes: what the sources hold, row by row, with the site that each row is of.

A table is a data frame of strings or numbers with a column `site`. Where the source has a split of
its own there is a column `split` ("train" or "test"). Rows may be left out and columns may be
joined into a text, but no value is made up; sites that are not in the data are drawn from a fixed
seed, or cut by time, and named so that nobody takes them for institutions.
"""

from __future__ import annotations

import csv
import string
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

import numpy as np

from silotune.simulations.datasets import catalog, pickled_table

if TYPE_CHECKING:
    import pandas as pd  # takes a while to import

SEED = 2026  # of the drawn sites


@dataclass(frozen=True)
class Table:
    """make: the rows. entity: the column that says whose row it is, where somebody has several; all
    rows of one are on one side of the split."""

    source: str
    make: Callable[[], pd.DataFrame]
    entity: str = ""


def _heart() -> pd.DataFrame:
    table = _read("heart-disease-uci", "heart_disease_uci.csv")
    return table.rename(columns={"dataset": "site"}).drop(columns="id")


def _airlines() -> pd.DataFrame:
    """Tweets that mention one of the six airlines, by the first they mention; repeats dropped."""
    names = {
        "virginamerica": "Virgin America",
        "united": "United",
        "southwestair": "Southwest",
        "americanair": "American",
        "usairways": "US Airways",
        "jetblue": "JetBlue",
    }
    source = catalog.SOURCES["airline-tweets"]
    table = _read(source.name, source.main, encoding="latin-1")
    first = table["text"].str.lower().str.extract(f"@({'|'.join(names)})")[0]
    table = table.assign(site=first.map(names))[first.notna()]
    table = table.drop_duplicates("text")
    # Some tweets hold a bare carriage return, which no CSV writer quotes.
    text = table["text"].str.replace(r"\s+", " ", regex=True)
    return table.assign(text=text)[["site", "text", "sentiment"]]


def _thyroid() -> pd.DataFrame:
    """The four referral sources with most rows, 99 of 100 rows. A patient_id is a date and a
    number: each is there once, so nothing says who came twice."""
    table = _read("thyroid-uci", "thyroidDF.csv").rename(columns={"referral_source": "site"})
    table = table[table["site"].isin(["other", "SVI", "SVHC", "STMW"])]
    # Three ages of 65,511 and more and one of 455 are slips of the pen.
    age = table["age"].where(table["age"].astype(float) <= 120, "")
    measured = [c for c in table.columns if c.endswith("_measured")]
    return table.assign(age=age).drop(columns=[*measured, "patient_id"])


LENDING_STATES = 300  # rows that a state must have


def _lending_club() -> pd.DataFrame:
    """The eight states with 300 loans and more. The other 42 have 5 to 300, and among them hardly
    a default for a test: a "site" of all of them together would be no lender's."""
    table = _read("lending-club", pickled_table.CSV).rename(columns={"addr_state": "site"})
    sizes = table["site"].value_counts()
    table = table[table["site"].map(sizes) >= LENDING_STATES]
    # The sub-grade is the interest rate under another name.
    return table.drop(columns=["rownames", "sub_grade"])


def _credit() -> pd.DataFrame:
    table = _read("credit-data", pickled_table.CSV).drop(columns="rownames")
    return table.assign(site=_drawn(len(table), 6, "Silo"))


BANKS = 4
BLOCK = 12 * 3600  # seconds


def _card_fraud() -> pd.DataFrame:
    """Four "banks", each half a day of the same two days. Of rows that are equal but for the hour,
    to three decimals, the first is kept: more decimals than any bin edge needs, and no payment
    stands on both sides of the split."""
    import pandas as pd

    table = pd.read_csv(catalog.fetch("card-fraud") / "creditcard.csv", dtype={"Class": str}).round(
        3
    )
    time = table.pop("Time")
    table = table[~table.duplicated()]
    block = (time[table.index] // BLOCK).clip(upper=BANKS - 1).astype(int)
    site = "Bank " + block.map(dict(enumerate(string.ascii_uppercase)))
    hour = (time[table.index] // 3600 % 24).astype(int)
    return table.assign(hour=hour, site=site)


def _medical_cost() -> pd.DataFrame:
    """A row is a person's year. `stage` joins sex and age, whose effects do not add up; `place` is
    the site again, to predict by. Left out: race; the parts of the bill and the visits, which are
    what is to be predicted; columns that are functions of others."""
    import pandas as pd

    table = _read("rand-hie", pickled_table.CSV)
    ages = ("child", "teenager", "young", "thirties", "middle-aged", "old")
    age = pd.cut(
        table["xage"].astype(float), [-1, 13, 18, 30, 40, 55, 99], right=False, labels=ages
    )
    sex = table["female"].map({"0": "male", "1": "female"})
    kept = [
        "zper",
        "year",
        "coins",
        "idp",
        "mdeoff",
        "pioff",
        "xage",
        "educdec",
        "income",
        "num",
        "xghindx",
        "disea",
        "physlm",
        "mhi",
        "hlthg",
        "hlthf",
        "hlthp",
        "meddol",
    ]
    stage = sex + " " + age.astype(str)
    return table[kept].assign(stage=stage, place=table["site"], site="Site " + table["site"])


def _ratings() -> pd.DataFrame:
    """A row is a rating, each person's in the order they were given; what is known of the person
    and of the film as text."""
    import pandas as pd

    folder = "ml-100k"
    user, item, rating = (
        _read(folder, f"ml-100k.{part}", sep="\t").rename(columns=lambda c: c.split(":")[0])
        for part in ("user", "item", "inter")
    )
    decade = (user["age"].astype(int) // 10).map(
        [
            "child",
            "teens",
            "twenties",
            "thirties",
            "forties",
            "fifties",
            "sixties",
            "seventies",
        ].__getitem__
    )
    gender = user["gender"].map({"M": "man", "F": "woman"})
    user = user.assign(
        user=gender + ", " + decade + ", " + user["occupation"],
        site=_drawn(len(user), 4, "Group"),
    )
    item = item.assign(
        item=item["movie_title"]
        + " ("
        + item["release_year"]
        + "): "
        + item["class"].str.replace(" ", ", ")
    )
    table = rating.merge(user[["user_id", "user", "site"]], on="user_id").merge(
        item[["item_id", "item"]], on="item_id"
    )
    number = table[["user_id", "timestamp", "item_id"]].astype(int)
    table = table.loc[number.sort_values(list(number.columns)).index]
    return pd.DataFrame(table[["site", "user_id", "user", "item", "rating"]])


def _r8() -> pd.DataFrame:
    table = _reuters()
    return table.assign(site=_drawn(len(table), 4, "Desk"))


def _market() -> pd.DataFrame:
    """The same stories as a stream: `position` is their order in the collection, which is that of
    the wire; the source's split is a day, 7 April 1987. The desks take turns.

    `tags` joins the topic with a tone that no person gave: that of the words of a story which
    Loughran and McDonald (2011, Journal of Finance 66:1) list as negative or positive, by which of
    them are more.
    """
    table, words = _reuters(), _read("loughran-mcdonald", "LM.csv")
    listed = {
        word.lower(): (positive != "0") - (negative != "0")
        for word, positive, negative in zip(
            words["Word"], words["Positive"], words["Negative"], strict=True
        )
    }
    balance = (
        table["text"]
        .str.findall("[a-z]+")
        .map(lambda found: sum(listed.get(word, 0) for word in found))
    )
    tone = np.select([balance > 0, balance < 0], ["|positive", "|negative"], default="")
    desk = [f"Desk {string.ascii_uppercase[k % 4]}" for k in range(len(table))]
    return table.assign(position=range(len(table)), tags=table["topic"] + tone, site=desk)


def _reuters() -> pd.DataFrame:
    import pandas as pd

    parts = [
        _read("reuters-r8", f"reuters-r8-{split}.tab", sep="\t", quoting=csv.QUOTE_NONE)
        .iloc[2:]  # the types and the roles of the columns
        .assign(split=split)
        for split in ("train", "test")
    ]
    table = pd.concat(parts, ignore_index=True)
    return table.rename(columns={"Category": "topic", "Text": "text"}).assign(
        text=table["Text"].str.strip()
    )


def _chinese() -> pd.DataFrame:
    """Each review once: half of the packaged lines repeat another one. Those that stand in both
    files are of no sentiment and left out."""
    import pandas as pd

    folder = catalog.fetch("chinese-reviews")
    parts = []
    for sentiment in ("pos", "neg"):
        lines = (folder / f"{sentiment}.txt").read_text(encoding="utf-8").split("\n")
        texts = dict.fromkeys(" ".join(line.split()) for line in lines)
        parts.append(pd.DataFrame({"text": [t for t in texts if t], "sentiment": sentiment}))
    table = pd.concat(parts, ignore_index=True)
    table = table[~table["text"].duplicated(keep=False)]
    return table.assign(site=_drawn(len(table), 4, "Shop"))


def _banking77() -> pd.DataFrame:
    import pandas as pd

    table = pd.concat(
        [_read("banking77", f"{split}.csv").assign(split=split) for split in ("train", "test")],
        ignore_index=True,
    )
    text = table["text"].str.split().str.join(" ")  # line breaks within
    return table.assign(text=text, site=_drawn(len(table), 5, "Bank"))


def replies() -> dict[str, str]:
    """The written reply for each intent of Banking77 that service-answers takes."""
    recipe = resources.files("silotune.simulations.recipes") / "service-answers"
    found: dict[str, str] = tomllib.loads((recipe / "replies.toml").read_text("utf-8"))["replies"]
    return found


def _service_answers() -> pd.DataFrame:
    """The questions of some intents, at the banks where service-intents has them, and the reply
    written for each intent: the one value of these tables that is in no source."""
    table = _banking77()
    reply = table["category"].map(replies())
    table = table.assign(reply=reply)[reply.notna()].rename(columns={"text": "query"})
    return table[["site", "split", "query", "reply"]]


def _ncbi_disease() -> pd.DataFrame:
    """A row is a sentence: its words and their tags. The files do not say where an abstract ends,
    so the sites are four blocks of equal length, and at a border one may be cut."""
    import pandas as pd

    folder, parts = catalog.fetch("ncbi-disease"), []
    for split, names in (("train", ("train", "devel")), ("test", ("test",))):
        text = "\n\n".join((folder / f"{n}.tsv").read_text(encoding="utf-8") for n in names)
        rows = [
            [line.split("\t") for line in block.splitlines() if line]
            for block in text.split("\n\n")
        ]
        rows = [row for row in rows if row]
        block = np.arange(len(rows)) * 4 // len(rows)
        parts.append(
            pd.DataFrame(
                {
                    "words": [" ".join(word for word, _ in row) for row in rows],
                    "tags": [" ".join(tag for _, tag in row) for row in rows],
                    "split": split,
                    "site": [f"Block {string.ascii_uppercase[b]}" for b in block],
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def _read(source: str, file: str, **how: object) -> pd.DataFrame:
    """All cells as the text they are, and as Python's own strings: what is a space to Arrow's
    depends on pandas' release, and rows must be the same everywhere."""
    import pandas as pd

    path = catalog.fetch(source) / file
    return pd.read_csv(path, dtype=str, keep_default_na=False, **how).astype(object)  # type: ignore[call-overload,no-any-return]


def _drawn(rows: int, sites: int, name: str) -> list[str]:
    """A site for each row: as many rows each as can be, drawn by a fixed seed."""
    turns = np.random.default_rng(SEED).permutation(rows) % sites
    return [f"{name} {string.ascii_uppercase[t]}" for t in turns]


TABLES: dict[str, Table] = {
    "heart": Table("heart-disease-uci", _heart),
    "airlines": Table("airline-tweets", _airlines),
    "thyroid": Table("thyroid-uci", _thyroid),
    "lending-club": Table("lending-club", _lending_club),
    "credit": Table("credit-data", _credit),
    "card-fraud": Table("card-fraud", _card_fraud),
    "medical-cost": Table("rand-hie", _medical_cost, entity="zper"),
    "ratings": Table("ml-100k", _ratings, entity="user_id"),
    "r8": Table("reuters-r8", _r8),
    "market": Table("reuters-r8", _market),
    "chinese": Table("chinese-reviews", _chinese),
    "banking77": Table("banking77", _banking77),
    "service-answers": Table("banking77", _service_answers),
    "ncbi-disease": Table("ncbi-disease", _ncbi_disease),
}
