"""Sphinx configuration: `make docs` builds to build/docs, warnings as errors, without a network.

Nothing is executed: every example of the pages is a doctest or a script, and every notebook holds
its outputs; the tests run them all.
"""

import sys
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "lora-privacy"
author = "The lora-privacy developers"
copyright = author  # noqa: A001
release = metadata.version("lora-privacy")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "mathml",
    "bibliography",
    "docstrings",
]
exclude_patterns = ["_ext"]

# The pages are written for GitHub too, so only what renders there is on.
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3

nb_execution_mode = "off"

napoleon_numpy_docstring = False
napoleon_custom_sections = ["Shape"]
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True}
maximum_signature_line_length = 88

html_theme = "furo"
html_title = f"lora-privacy {release}"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_copy_source = False
html_show_sphinx = False
