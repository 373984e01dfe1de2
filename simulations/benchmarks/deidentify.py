"""How much of what is personal is found: `make bench-deidentify` writes results/deidentify.json.

On made-up texts with labels (labelled_texts.py), in English and Chinese. For each kind: recall, the
share of labels of which any character was found as that kind (`recall`), which were found from
first to last character (`exact`), or of which no letter or digit is left in the redacted text,
under whatever kind (`gone`: what matters to the person); precision, the share of findings of the
kind that touch a label of it. Then the same recall for names that names.toml has and has not.

On clinical sentences without any personal detail (clean_sentences.py): the share of them in which
nothing is found (`untouched`), and how many false findings of which kind there are.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from silotune.client.preparation.deidentify import Deidentifier, Finding, simplified
from silotune.client.preparation.name_lists import Names, folded
from silotune.client.site.preparation_rules import KINDS, Deidentify
from silotune.simulations.benchmarks import command_line
from silotune.simulations.benchmarks.clean_sentences import clean_sentences
from silotune.simulations.benchmarks.labelled_texts import Label, Labelled, Language, Set, texts

RESULTS = Path("simulations/benchmarks/results")
EACH = 60  # texts of every template
CLEAN = 1000  # sentences without a personal detail, of each language
SEED = 1


@dataclass
class Tally:
    labels: int = 0
    touched: int = 0
    exact: int = 0
    gone: int = 0
    findings: int = 0
    right: int = 0

    def figures(self) -> dict[str, float | int | None]:
        """Shares of labels and of findings; None where there are none."""
        return {
            "labels": self.labels,
            "findings": self.findings,
            "recall": _share(self.touched, self.labels),
            "exact": _share(self.exact, self.labels),
            "gone": _share(self.gone, self.labels),
            "precision": _share(self.right, self.findings),
        }


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


def compare(one: Labelled, findings: Iterable[Finding], tallies: dict[str, Tally]) -> None:
    """Add one text: by kind, and by 'kind/slot' for what is known of labels only."""
    found = list(findings)
    for label in one.labels:
        near = [f for f in found if f.start < label.end and label.start < f.end]
        for key in (label.kind, f"{label.kind}/{label.slot}"):
            tally = tallies[key]
            tally.labels += 1
            tally.touched += any(f.kind == label.kind for f in near)
            tally.exact += any(
                (f.kind, f.start, f.end) == (label.kind, label.start, label.end) for f in near
            )
            tally.gone += _is_gone(one.text, label, near)
    for f in found:
        tallies[f.kind].findings += 1
        tallies[f.kind].right += any(
            f.kind == label.kind and f.start < label.end and label.start < f.end
            for label in one.labels
        )


def _is_gone(text: str, label: Label, near: list[Finding]) -> bool:
    covered = {place for f in near for place in range(f.start, f.end)}
    return all(
        place in covered or not text[place].isalnum() for place in range(label.start, label.end)
    )


def measure(which: Set, language: Language, each: int = EACH, seed: int = SEED) -> dict[str, Tally]:
    """Tallies of a set in a language, looked through for both languages' details."""
    deidentifier = Deidentifier(Deidentify(), bytes(32))
    names = Names.load()
    tallies: dict[str, Tally] = defaultdict(Tally)
    for one in texts(which, language, each, seed):
        findings = deidentifier.find(one.text)
        compare(one, findings, tallies)
        for label in one.labels:
            if label.kind == "person":
                listed = _is_listed(one.text[label.start : label.end], names)
                tally = tallies["listed names" if listed else "other names"]
                tally.labels += 1
                tally.touched += any(
                    f.kind == "person" and f.start < label.end and label.start < f.end
                    for f in findings
                )
    return tallies


def _is_listed(name: str, names: Names) -> bool:
    """Every part of it stands in names.toml; initials do not count."""
    plain, _ = simplified(name)
    if plain[0].isascii() or not "\u4e00" <= plain[0] <= "\u9fff":
        known = names.given | names.given_words | names.family | names.family_words
        parts = (folded(part) for part in plain.replace(",", " ").replace(".", " ").split())
        return all(part in known for part in parts if len(part) > 1)
    if "·" in plain:
        return set(plain) - {"·"} <= names.zh_transcription
    family = 2 if plain[:2] in names.zh_compound else 1
    return (family == 2 or plain[0] in names.zh_family) and set(plain[family:]) <= names.zh_given


@dataclass(frozen=True)
class CleanResult:
    """Of `sentences` without a personal detail: how many had no finding; false findings by kind."""

    sentences: int
    untouched: int
    false_findings: dict[str, int]


def measure_clean(language: Language, count: int = CLEAN, seed: int = SEED) -> CleanResult:
    """Search clean sentences, for the details of both languages."""
    deidentifier = Deidentifier(Deidentify(), bytes(32))
    found = [deidentifier.find(text) for text in clean_sentences(language, count, seed)]
    kinds = Counter[str](finding.kind for findings in found for finding in findings)
    return CleanResult(count, sum(not findings for findings in found), dict(kinds))


def speed(language: Language) -> float:
    """Texts a second, one thread."""
    column = [one.text for one in texts("heldout", language, 40, SEED)]
    deidentifier = Deidentifier(Deidentify(), bytes(32))
    deidentifier.clean_many(column[:20])
    began = time.perf_counter()
    deidentifier.clean_many(column)
    return round(len(column) / (time.perf_counter() - began), 0)


def table(tallies: dict[str, Tally]) -> str:
    """The figures of the kinds, in lines."""
    lines = [f"{'':16}{'labels':>8}{'recall':>8}{'exact':>8}{'gone':>8}{'precision':>11}"]
    for kind in (*KINDS, "listed names", "other names"):
        if kind in tallies:
            figures = tallies[kind].figures()
            shown = [_shown(figures[name]) for name in ("recall", "exact", "gone", "precision")]
            if kind not in KINDS:
                shown[1:] = ["–", "–", "–"]
            lines.append(
                f"{kind:16}{figures['labels']:>8}{shown[0]:>8}{shown[1]:>8}{shown[2]:>8}"
                f"{shown[3]:>11}"
            )
    return "\n".join(lines)


def _shown(share: float | int | None) -> str:
    return "–" if share is None else f"{share:.3f}"


def main() -> None:
    """Measure, print and write the results."""
    sets: dict[str, dict[str, dict[str, dict[str, float | int | None]]]] = {}
    languages: tuple[Language, ...] = ("en", "zh")
    which: tuple[Set, ...] = ("development", "heldout", "independent")
    for name in which:
        sets[name] = {}
        for language in languages:
            tallies = measure(name, language)
            sets[name][language] = {key: t.figures() for key, t in sorted(tallies.items())}
            print(f"\n{name}, {language}\n{table(tallies)}")
    clean = {language: measure_clean(language) for language in languages}
    for language, result in clean.items():
        print(
            f"\nclean sentences, {language}: nothing found in {result.untouched} of "
            f"{result.sentences}; false findings: {result.false_findings}"
        )
    rates = {language: speed(language) for language in languages}
    print(f"\ntexts a second: {rates}")
    results = {
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "texts_of_each_template": EACH,
        "seed": SEED,
        "least_score": Deidentify().least_score,
        "texts_a_second": rates,
        "sets": sets,
        "clean": {language: asdict(result) for language, result in clean.items()},
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "deidentify.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    command_line.parser(__doc__).parse_args()
    main()
