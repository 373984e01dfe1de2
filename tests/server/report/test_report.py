"""What a security officer relies on: nothing is loaded, escaped wrongly, or claimed half."""

from __future__ import annotations

import copy
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from silotune.common.errors import DataError
from silotune.server.report.formatting import duration, number, size, small
from silotune.server.report.report import render, write_report

SITES = ("Cleveland", "Long Beach")
HOSTILE = '<script src="http://evil/x.js">\'"&{{7*7}}$\\frac{_病院</script>'


def stat(mean: float | None, sd: float | None) -> dict[str, Any]:
    return {"mean": mean, "sd": sd, "values": [mean]}


def variant(name: str, *, private: bool, main: bool = False, repeats: int = 3) -> dict[str, Any]:
    return {
        "name": name,
        "label": f"The {name}",
        "main": main,
        "private": private,
        "repeats": repeats,
        "epsilon": 8.0 if private else None,
        "delta": 1e-4 if private else None,
        "metrics": {"auc": stat(0.8934, 0.0042), "macro_f1": stat(0.7, 0.01), "accuracy": None},
        "sites": {"Cleveland": stat(0.9, 0.013), "Long Beach": None},
        "sites_mean": stat(0.88, 0.01),
        "bytes_up": 123456,
        "bytes_down": 0,
        "seconds": 31.2,
    }


def figures_of(loss: float) -> dict[str, Any]:
    """Of one half of `calibration`."""
    return {
        "metrics": {"auc": 0.9, "loss": loss},
        "expected_error": loss / 10,
        "slope": {"value": 0.5, "standard_error": 0.1},
    }


@pytest.fixture
def result() -> dict[str, Any]:
    return {
        "format": 1,
        "recipe": "heart-diagnosis",
        "title": "Heart disease",
        "about": "Old data.",
        "created": "2026-11-21T23:59:00Z",
        "command": "make demo",
        "commit": "abc1234",
        "machine": "2 cores",
        "seconds": 201.3,
        "peak_memory_bytes": 2_100_000_000,
        "versions": {"torch": "2.13.0"},
        "contract_sha256": "9f" * 32,
        "contract_json": "format = 1\n",
        "model": {"name": "mini", "sha256": "53" * 32},
        "data": {
            "name": "UCI",
            "sha256": "77" * 32,
            "source": "https://example.org/data",
            "sites": [{"site": site, "train": 2280, "test": 76} for site in SITES],
        },
        "privacy": {
            "unit": "record",
            "adjacency": "add or remove one record",
            "epsilon": 8.0,
            "delta": 1e-4,
            "accountant": "RDP",
            "noise": "ChaCha20",
            "insecure": False,
            "sites": [{"site": site, "epsilon": 7.987, "delta": 1e-4} for site in SITES],
        },
        "metric": {"name": "auc", "label": "AUC", "higher_is_better": True},
        "verdict": {
            "word": "learns",
            "headline": "learns; better than the DP head",
            "checklist": [
                {"name": "constant", "label": "better than", "status": "yes", "detail": "0.9"},
                {"name": "budget", "label": "within", "status": "cannot tell", "detail": "7.9"},
            ],
            "lines": ["AUC 0.89"],
            "warnings": ["Few test rows."],
        },
        "calibration": {
            "fitted": {"kind": "temperature", "temperature": 1.4, "rows": 46},
            "before": figures_of(0.7),
            "after": figures_of(0.6),
            "constant_loss": 0.69,
        },
        "variants": [
            variant("majority", private=False, repeats=1),
            variant("federated-lora", private=True, main=True),
        ],
        "curve": [
            {
                "round": r,
                "phase": "head" if r < 3 else "head+adapter",
                "metric": 0.6 + r / 20 if r % 2 else None,
                "loss": 0.6,
                "seconds": 0.4,
                "epsilon": dict.fromkeys(SITES, 2.0 * r - 0.013),
            }
            for r in (1, 2, 3, 4)
        ],
    }


class Page(HTMLParser):
    """Tags with their attributes, and the visible text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page[: page.index("<style>")] + page[page.index("</style>") :])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "body":
            self.words.clear()

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def without_epsilon(result: dict[str, Any]) -> dict[str, Any]:
    """`result` as a run without privacy writes it."""
    result["privacy"] |= {"epsilon": None, "delta": None, "accountant": None, "sites": []}
    for one in result["variants"]:
        one |= {"private": False, "epsilon": None, "delta": None}
    for row in result["curve"]:
        row["epsilon"] = dict.fromkeys(SITES)
    return result


def test_the_file_loads_nothing_and_runs_nothing(result: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(result, path)
    page = path.read_text(encoding="utf-8")
    names = {tag for tag, _ in Page(page).tags}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "base", "image"}
    for _, attributes in Page(page).tags:
        assert not any(key.startswith("on") for key in attributes)
        assert not {"src", "srcset", "data", "action"} & attributes.keys()
        for key in ("href", "xlink:href"):
            assert (attributes.get(key) or "#").startswith("#")
    assert "@import" not in page
    assert all(target.startswith("#") for target in re.findall(r"url\(\s*['\"]?(.)", page))
    assert "default-src 'none'" in page
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_the_verdict_comes_first(result: dict[str, Any]) -> None:
    text = Page(render(result)).text
    order = [
        "Verdict",
        "learns; better than the DP head",
        "✓ better than 0.9",
        "? within 7.9",
        "AUC 0.89",
        "1 warning",
        "Few test rows.",
        "1e-4 (RDP)",
        "Runs",
        "by round",
        "Privacy spent",
        "of each variant",
        "Unit",
        "Left each site",
        "Training records",
        "9f" * 32,
        "Limits",
        "make demo",
        "format = 1",
    ]
    places = [text.index(word) for word in order]
    assert places == sorted(places)


def test_calibration_is_shown_before_and_after(result: dict[str, Any]) -> None:
    text = Page(render(result)).text
    assert "Fitted to 46 public rows that no figure of this report uses: the logits are" in text
    assert "divided by 1.400" in text
    assert " loss 0.700 0.600" in text
    assert "Expected calibration error of each answer 0.070 0.060" in text
    result["calibration"] |= {"fitted": None, "after": None}
    text = Page(render(result)).text
    assert "None was fitted" in text
    assert " loss 0.700 Exp" in text


@pytest.mark.parametrize(
    ("word", "status", "tone"),
    [
        ("learns", "yes", "good"),
        ("learns", "cannot tell", "good"),
        ("learns", "no", "poor"),
        ("learns nothing", "yes", "poor"),
        ("diverged", "yes", "poor"),
    ],
)
def test_the_colour_of_a_good_result_is_for_one_of_which_nothing_is_against(
    result: dict[str, Any], word: str, status: str, tone: str
) -> None:
    result["verdict"]["word"] = word
    result["verdict"]["checklist"][1]["status"] = status
    assert f'<section class="verdict {tone}"' in render(result)


def hostile(value: Any, key: str = "") -> Any:
    """Every text in `value` replaced, and every site's name where it is a key."""
    if isinstance(value, dict):
        by_site = key == "epsilon" or (key == "sites" and set(value) == set(SITES))
        return {HOSTILE + k if by_site else k: hostile(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [hostile(v, key) for v in value]
    if not isinstance(value, str):
        return value
    return HOSTILE + value if key in ("site", "phase") else HOSTILE


def test_hostile_text_stays_text(result: dict[str, Any]) -> None:
    evil = hostile(result)
    evil["metric"]["name"] = "auc"
    evil["variants"][0]["metrics"][HOSTILE] = stat(0.5, 0.1)
    evil["variants"][0] |= {"seconds": HOSTILE, "bytes_up": HOSTILE}
    evil["data"]["sites"][0]["test"] = HOSTILE
    evil["versions"] = {HOSTILE: HOSTILE}
    page = Page(render(evil))
    assert not [attributes for tag, attributes in page.tags if tag in ("script", "b")]
    assert sum(tag == "svg" for tag, _ in page.tags) == 3
    # Title, command, machine, hashes, cells, plots: every text field came through as it was.
    assert page.text.count("{{7*7}}$\\frac{_病院</script>") > 30
    assert "49" not in page.text


@pytest.mark.parametrize(
    "place",
    [
        "title",
        "about",
        "recipe",
        "created",
        "command",
        "commit",
        "machine",
        "contract_sha256",
        "contract_json",
    ],
)
def test_each_text_of_the_run_is_shown_and_escaped(result: dict[str, Any], place: str) -> None:
    result[place] = "<i>&x"
    page = render(result)
    assert "&lt;i&gt;&amp;x" in page
    assert "<i>" not in page


def test_missing_values_are_a_dash(result: dict[str, Any]) -> None:
    result |= {"seconds": None, "peak_memory_bytes": None, "commit": None, "versions": None}
    result["model"] = {"name": "one-hot", "sha256": None}
    text = Page(render(result)).text
    for words in ("Time –", "Peak memory –", "Commit –", "Versions –", "one-hot –"):
        assert words in text
    assert "Long Beach – –" in text
    assert "None" not in text
    assert "Undefined" not in text


def test_a_result_with_nothing_in_it_still_makes_a_page() -> None:
    page = Page(render({"format": 1}))
    assert "No round of this run was evaluated" in page.text
    assert not [tag for tag, _ in page.tags if tag == "svg"]


def test_an_unknown_format_is_an_error() -> None:
    with pytest.raises(DataError, match="format 2"):
        render({"format": 2})


def test_epsilon_stands_with_delta_accountant_and_unit(result: dict[str, Any]) -> None:
    page = render(result)
    text = Page(page).text.replace("\u00a0", " ")
    assert "ε ≤ 8.00, δ = 1e-4 (RDP), per record" in text
    assert "Cleveland 7.99 8.00 1e-4 RDP record" in text
    assert text.count("budget: ε = 8.00 (δ = 1e-4, RDP)") == 1
    for found in re.finditer(r"ε (≤|=) [0-9]", text):
        assert re.match(r"ε . 8\.00,? \(?δ = 1e-4,? \(?RDP\)", text[found.start() :]), found


@pytest.mark.parametrize("lacking", ["delta", "accountant"])
def test_epsilon_is_withheld_without_delta_or_accountant(
    result: dict[str, Any], lacking: str
) -> None:
    result["privacy"][lacking] = None
    page = Page(render(result))
    text = page.text.replace("\u00a0", " ")
    assert "no ε is shown" in text
    assert "7.99" not in text
    assert sum(tag == "svg" for tag, _ in page.tags) == 2
    if lacking == "accountant":
        assert "8.00" not in text


def test_a_site_has_the_budget_of_its_own(result: dict[str, Any]) -> None:
    result["privacy"]["sites"][0] |= {"epsilon": 1.99, "budget": 2.0}
    text = Page(render(result)).text
    assert "Cleveland 1.99 2.00 1e-4 RDP record" in text
    assert "Long Beach 7.99 8.00 1e-4 RDP record" in text


def test_a_site_without_its_delta_shows_no_epsilon(result: dict[str, Any]) -> None:
    result["privacy"]["sites"][0]["delta"] = None
    assert "Cleveland – – – RDP record" in Page(render(result)).text


def test_seeded_noise_is_never_called_private(result: dict[str, Any]) -> None:
    assert "seeded" not in Page(render(result)).text
    result["privacy"]["insecure"] = True
    text = Page(render(result)).text.replace("\u00a0", " ")
    assert text.index("NO privacy") < text.index("Verdict")
    assert "ε ≤" not in text
    assert "is differentially private" not in text
    assert "trained with differential privacy" not in text


def test_a_run_without_privacy_says_so(result: dict[str, Any]) -> None:
    page = Page(render(without_epsilon(result)))
    assert "trained without differential privacy" in page.text
    assert "The change of the trained tensors, without noise" in page.text
    assert "ε ≤" not in page.text.replace("\u00a0", " ")
    assert sum(tag == "svg" for tag, _ in page.tags) == 2


def test_an_epsilon_of_the_contract_does_not_make_a_run_private(result: dict[str, Any]) -> None:
    result["variants"][1] |= {"private": False, "epsilon": None, "delta": None}
    text = Page(render(result)).text.replace("\u00a0", " ")
    assert "trained without differential privacy" in text
    assert "ε ≤" not in text


def test_three_plots_each_told_in_words(result: dict[str, Any]) -> None:
    page = Page(render(result))
    plots = [a["aria-label"] or "" for tag, a in page.tags if a.get("role") == "img"]
    assert sum(tag == "svg" for tag, _ in page.tags) == len(plots) == 3
    assert "AUC is 0.650 in round 1 and 0.750 in round 3" in plots[0]
    assert "Cleveland, Long Beach: 7.99" in plots[1]
    assert "δ = 1e-4, RDP" in plots[1]
    assert "All test rows, Cleveland." in plots[2]
    assert {"phase: head", "phase: head+adapter", "2 sites 7.99"} <= {
        " ".join(words.split()) for words in page.words
    }


def test_ids_are_unique_and_every_reference_resolves(result: dict[str, Any]) -> None:
    page = render(result)
    ids = [a["id"] for _, a in Page(page).tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", page)) <= set(ids)


def test_the_same_result_gives_the_same_bytes(result: dict[str, Any]) -> None:
    before = dict(matplotlib.rcParams)
    page = render(copy.deepcopy(result))
    assert page == render(result)
    assert dict(matplotlib.rcParams) == before


def test_spread_is_shown_for_repeated_variants_only(result: dict[str, Any]) -> None:
    text = Page(render(result)).text
    assert text.count("0.893 ± 0.004") == 3  # at a glance, in the variants, in the sites' last row
    assert "The majority none 0.893 0.700 – 1" in text
    result["variants"] = [variant("federated-lora", private=True, main=True, repeats=1)]
    assert "± 0" not in Page(render(result)).text


def test_one_site_and_one_variant_in_a_deployment(result: dict[str, Any]) -> None:
    result["variants"] = result["variants"][1:]
    result["data"]["sites"] = [{"site": "Cleveland", "train": None, "test": 76}]
    result["privacy"]["sites"] = result["privacy"]["sites"][:1]
    result["variants"][0]["sites"] = {"Cleveland": stat(0.8934, 0.01)}
    result["curve"] = [{**result["curve"][0], "epsilon": {"Cleveland": 7.99}}]
    page = Page(render(result))
    assert "known to the site only" in page.text
    assert "Test rows are the operator's own public rows" in page.text
    assert "simulated on one machine" not in page.text
    assert sum(tag == "svg" for tag, _ in page.tags) == 3


def test_many_sites_fill_one_page_and_the_table_has_them_all(result: dict[str, Any]) -> None:
    names = [f"hospital-{i:02}" for i in range(30)]
    result["data"]["sites"] = [{"site": name, "train": 10, "test": 5} for name in names]
    result["privacy"]["sites"], result["variants"][0]["sites"] = [], {}
    result["variants"][1]["sites"] = {name: stat(0.8, 0.01) for name in names}
    for row in result["curve"]:
        row["epsilon"] = {name: row["round"] + i / 100 for i, name in enumerate(names)}
    page = Page(render(result))
    assert "the first 11 of 30 sites" in page.text
    assert all(page.text.count(name) >= 2 for name in names)


def test_a_failed_write_leaves_the_old_report(result: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(DataError):
        write_report({**result, "format": None}, path)
    assert path.read_text() == "old"


def test_numbers_as_they_are_written() -> None:
    assert [number(None), number(float("nan")), number(float("inf")), number(-0.5, 1)] == [
        "–",
        "–",
        "∞",
        "−0.5",
    ]
    assert [small(1e-4), small(2.5e-6), small(1e-5), small(None)] == ["1e-4", "2.5e-6", "1e-5", "–"]
    assert [size(0), size(999), size(123456), size(2.1e9), size(None)] == [
        "0 B",
        "999 B",
        "123 kB",
        "2.1 GB",
        "–",
    ]
    assert [duration(0.4), duration(31.2), duration(201.3), duration(7260), duration(None)] == [
        "0.4 s",
        "31 s",
        "3 min 21 s",
        "2 h 1 min",
        "–",
    ]
