"""The site of jitops, built by ``make docs``."""

from __future__ import annotations

import sys
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import ops  # noqa: E402

project = "jitops"
author = "The jitops authors"
copyright = "The jitops authors, MIT licence"
release = version = ops.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "_extension",
]
exclude_patterns = ["_extension"]
myst_enable_extensions = ["dollarmath", "html_image"]
myst_heading_anchors = 3
napoleon_custom_sections = ["Gradients", "Memory", "Numerics"]
napoleon_use_rtype = False
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 88
html_math_renderer = "mathtext"

html_theme = "furo"
html_title = "jitops"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
suppress_warnings = ["misc.highlighting_failure"]


def _reachable(inventories: dict[str, str]) -> dict[str, tuple[str, None]]:
    """The inventories that this machine can read: a build without a network links to none."""
    found: dict[str, tuple[str, None]] = {}
    for name, address in inventories.items():
        try:
            urllib.request.urlopen(f"{address}objects.inv", timeout=3).close()
        except OSError as error:
            print(f"no links to the documentation of {name}: {address}: {error}")
        else:
            found[name] = (address, None)
    return found


intersphinx_mapping = _reachable(
    {
        "python": "https://docs.python.org/3/",
        "torch": "https://docs.pytorch.org/docs/stable/",
        "numpy": "https://numpy.org/doc/stable/",
        "scipy": "https://docs.scipy.org/doc/scipy/",
    }
)
