"""How the site is built: `make docs` writes it to build/docs, without network."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from spectra._version import __version__  # noqa: E402 - the path comes first

project = "spectra"
author = "The spectra contributors"
release = version = __version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click", "generated"]

# Notebooks are shown as they are committed, where tests execute them; Sphinx reads only what lies beneath this folder.
shutil.rmtree(HERE / "notebooks", ignore_errors=True)
shutil.copytree(HERE.parent / "notebooks", HERE / "notebooks", ignore=shutil.ignore_patterns("[.]*"))
nb_execution_mode = "off"

exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
myst_links_external_new_tab = False
default_role = "literal"
suppress_warnings = ["misc.highlighting_failure"]  # an ellipsis in an example
pygments_style, pygments_dark_style = "friendly", "monokai"
highlight_language = "console"
smartquotes = False  # --json is no dash

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_rtype, napoleon_use_ivar = False, True

html_theme = "furo"
html_math_renderer = "mathml"  # MathJax would come from the network
html_title = f"spectra {version}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_js_files = ["words.js"]
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
