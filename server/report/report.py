"""The report of a run: one HTML file that reads offline, prints on A4 and can be filed.

`write_report` takes what stands in result.json and nothing else, so a report can be made again
years later and comes out byte for byte the same. The file loads nothing and runs no script: what
an officer signs must not depend on the server. All text is escaped by Jinja2's autoescape; the
plots are SVG whose text goes through matplotlib's own escaping, with its mathematics off.

Two rules of privacy are kept here and not in the template. An epsilon is shown only together with
its delta and its accountant (`guarantee`, `stated`), and seeded noise is never called private.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import ChainableUndefined, Environment, PackageLoader, Undefined

from silotune.common.errors import DataError
from silotune.common.tasks.metrics import METRICS
from silotune.server.report.formatting import DASH, MARKS, duration, number, size, small
from silotune.server.report.plots import (
    draw,
    main_variant,
    metric_of,
    rows_of,
    site_names,
    stated,
    total,
)


def write_report(result: Mapping[str, Any], path: Path) -> None:
    """Write the report of `result` (the content of result.json) to `path`, whole or not at all.

    What the result lacks is shown as a dash. DataError for a format other than 1.
    """
    page = render(result)
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(page, encoding="utf-8")
    draft.replace(path)


def render(result: Mapping[str, Any]) -> str:
    """The report as text. The same result always gives the same text."""
    if result.get("format") != 1:
        raise DataError(
            f"This result has format {result.get('format')!r}; this version of Silotune reads 1."
        )
    env = Environment(
        loader=PackageLoader("silotune.server.report", "."),
        autoescape=True,
        undefined=ChainableUndefined,
        finalize=lambda value: DASH if value is None or isinstance(value, Undefined) else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {"number": number, "size": size, "duration": duration, "small": small}
    variants = result.get("variants") or []
    labels = dict([metric_of(result)])
    for name in (name for variant in variants for name in variant.get("metrics") or {}):
        label = METRICS.get(name, name.replace("_", " "))
        labels.setdefault(name, label[:1].upper() + label[1:])
    return env.get_template("report.html.j2").render(
        {
            **result,
            "metric": result.get("metric") or {},
            "privacy": result.get("privacy") or {},
            "main": main_variant(result),
            "metric_names": labels,
            "site_names": site_names(result),
            "guarantee": lambda epsilon, delta: guarantee(result, epsilon, delta),
            "stated": stated(result),
            "plots": draw(result),
            "repeated": any((variant.get("repeats") or 1) > 1 for variant in variants),
            "train": total(result, "train"),
            "test": total(result, "test"),
            "calibrating": total(result, "calibration"),
            "marks": MARKS,
            "tone": _tone(result),
            # A deployment does not know how many records a site has.
            "simulated": any(s.get("train") is not None for s in rows_of(result, "data", "sites")),
        }
    )


def _tone(result: Mapping[str, Any]) -> str:
    """The colour of the headline: that of a good result is for one of which nothing is against."""
    if (result.get("privacy") or {}).get("insecure"):
        return "bad"
    verdict = result.get("verdict") or {}
    against = any(item.get("status") == "no" for item in verdict.get("checklist") or [])
    return "good" if verdict.get("word") == "learns" and not against else "poor"


def guarantee(result: Mapping[str, Any], epsilon: Any, delta: Any) -> str:
    """The only sentence that states an epsilon: with delta and accountant, or not at all."""
    privacy = result.get("privacy") or {}
    if epsilon is None or isinstance(epsilon, Undefined):
        return DASH
    if privacy.get("insecure"):
        return "none, seeded noise"
    if delta is None or isinstance(delta, Undefined) or not privacy.get("accountant"):
        return "not stated: δ or the accountant is missing"
    # No line may end between a sign and its number.
    first, second = (
        words.replace(" ", "\u00a0")
        for words in (f"ε ≤ {number(epsilon, 2)}", f"δ = {small(delta)}")
    )
    return f"{first}, {second} ({privacy['accountant']})"
