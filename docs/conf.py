"""Sphinx's settings. `make docs` builds the site with warnings as errors."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import generate  # noqa: E402 (it lies beside this file)

project = "Silotune"
copyright = "the authors of Silotune"
release = version = metadata.version("silotune")
extensions = [
    "myst_nb",  # myst_parser and notebooks
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
# progress.md is a note from one working session to the next.
exclude_patterns = ["project/progress.md"]
html_theme = "furo"
html_title = "Silotune"
html_logo = html_favicon = "images/logo.svg"

nb_execution_mode = (
    "off"  # notebooks are stored with their outputs; tests/test_notebooks.py runs them
)
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
# A block without a language is commands or output: no highlighter has to guess.
highlight_language = "text"
copybutton_prompt_text = "$ "

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}
python_use_unqualified_type_names = True
default_role = "code"  # docstrings write names as `name`


def setup(app: Any) -> None:
    """Write the generated pages before Sphinx looks for files."""
    app.connect("builder-inited", lambda _: generate.write(HERE / "reference"))
    app.connect("autodoc-process-docstring", generate.docstring_as_rst)
    app.connect("autodoc-process-signature", generate.short_signature)
    app.connect("autodoc-skip-member", lambda *event: True if event[2] == "model_config" else None)
