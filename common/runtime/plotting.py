"""Figures for a page: matplotlib draws, the page colours and sets the type."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Plot:
    """A figure. `alt` says what it shows; with nothing to show `svg` is empty and `alt` says so."""

    title: str
    alt: str
    svg: str = ""


def paint(names: Sequence[str]) -> dict[str, str]:
    """A colour for each name. matplotlib wants colours, the page CSS variables that follow its
    light or dark scheme: the NNth is drawn as #0101NN and replaced in the SVG."""
    return {name: f"#0101{i:02d}" for i, name in enumerate(names)}


def svg_of(figure: Figure, names: Sequence[str]) -> str:
    """The figure as an SVG element for a page: no date, no ids but its own, the page's fonts."""
    stream = io.StringIO()
    figure.savefig(
        stream, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
    )
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    # The first four match tags only: "<" is escaped in text.
    svg = re.sub(r"<svg [^>]*(viewBox=\"[^\"]*\")[^>]*>", r"<svg \1>", svg)
    svg = re.sub(r"<defs>\s*<style[^>]*>[^<]*</style>\s*</defs>", "", svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'(<text style="[^"]*?)font-family: [^;"]*(; )?', r"\1", svg)
    return re.sub(r": #0101(\d\d)", lambda m: f": var(--{names[int(m[1])]})", svg)
