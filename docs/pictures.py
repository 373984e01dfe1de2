"""The pictures of a real run that README shows: its output in a terminal, and its report.

The first command makes the run, the second draws it; it needs the package playwright and Chromium.

    COLUMNS=100 silotune sim run heart-diagnosis repeats=1 baseline_repeats=1 \
        variants=federated-lora,pooled-no-dp,federated-head --out runs/picture > runs/picture.txt
    python docs/pictures.py runs/picture.txt runs/picture/report.html --browser /usr/bin/chromium
"""

from __future__ import annotations

import io
import re
from pathlib import Path

import click
from PIL import Image
from playwright.sync_api import sync_playwright
from rich.console import Console
from rich.text import Text

IMAGES = Path(__file__).resolve().parent / "images"
COLUMNS = 100
TITLE = "silotune sim run heart-diagnosis"
SETTINGS = (
    "repeats=1 baseline_repeats=1 \\\n    "
    "variants=federated-lora,pooled-no-dp,federated-head --out runs/picture"
)
ROUND = re.compile(r" *(\d+)/(\d+)  ")
SHOWN_AT_EITHER_END = 3  # rounds
WIDTH, HEIGHT = 1000, 1530  # of the report, down to its first plot
THUMBNAIL_WIDTH = 800
SCHEMES = {"report-dark.png": "dark", "report.png": "light"}
# For a browser in a container.
ONE_PROCESS = ["--no-sandbox", "--no-zygote", "--single-process", "--in-process-gpu"]


def shortened(output: str) -> list[str]:
    """The lines of a run's output, without the middle rounds, which look like their neighbours, and
    without the paths of this machine at the end."""
    lines: list[str] = []
    for line in output.splitlines():
        if line.startswith("next:"):
            break
        found = ROUND.match(line)
        if found and SHOWN_AT_EITHER_END < int(found[1]) <= int(found[2]) - SHOWN_AT_EITHER_END:
            if lines[-1] != "  …":
                lines.append("  …")
        elif not line.startswith(("fetching", "checking", "done ")):
            lines.append(line)
    return lines


def terminal(output: str) -> str:
    """The output as an SVG. Its fonts are those of the reader's machine: rich's own would be
    fetched from a server, which pages like GitHub's do not allow."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), highlight=False)
    console.print(Text(f"$ {TITLE} \\\n    {SETTINGS}", style="bold"))
    for line in shortened(output):
        console.print(Text(line, style="bold" if line.startswith("RESULT") else ""))
    svg = console.export_svg(title=TITLE, unique_id="terminal")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.S)
    return svg.replace("Fira Code, monospace", "ui-monospace, Menlo, Consolas, monospace")


def thumbnail(report: Path, browser: str, scheme: str) -> Image.Image:
    """The top of a report as a browser shows it, in few colours."""
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=ONE_PROCESS)
        page = chromium.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme=scheme)
        page.goto(report.resolve().as_uri())
        shot = page.screenshot()
        chromium.close()
    size = (THUMBNAIL_WIDTH, round(HEIGHT * THUMBNAIL_WIDTH / WIDTH))
    return Image.open(io.BytesIO(shot)).convert("RGB").resize(size).quantize(64)


@click.command()
@click.argument("output", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("report", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--browser", required=True, help="The file of a Chromium.")
def main(output: Path, report: Path, browser: str) -> None:
    """Draw OUTPUT, what `sim run` printed, and REPORT, its report.html, into docs/images."""
    (IMAGES / "terminal.svg").write_text(terminal(output.read_text(encoding="utf-8")))
    for name, scheme in SCHEMES.items():
        thumbnail(report, browser, scheme).save(IMAGES / name, optimize=True)


if __name__ == "__main__":
    main()
