"""The documentation: `sphinx-build -W docs docs/_build` makes it, and runs every notebook.

One process: the extensions import JAX, whose threads do not survive a fork.
"""

import importlib.metadata
import importlib.util
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import docstrings
import pages
from sphinx.util import logging

project = "mla-jax"
author = copyright = "the mla-jax contributors"
release = version = importlib.metadata.version("mla-jax")

extensions = ["myst_nb", "sphinx.ext.autodoc"]
exclude_patterns = ["_build", "*.py", "generated"]
if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("torch") is None:
    # With -W this ends the build: a page of claims that nobody checked must not go missing quietly.
    logging.getLogger(__name__).warning(
        "notebooks/parity_transformers is left out: it needs torch and 'mla-jax[parity]'"
    )
    exclude_patterns.append("notebooks/parity_transformers.py")
html_theme = "furo"
html_title = "mla-jax"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# Sphinx reads below this folder only. A copy keeps the sources' times, so that what has not changed
# is not run again.
shutil.rmtree(HERE / "notebooks", ignore_errors=True)
(HERE / "notebooks").mkdir()
for source in (HERE.parent / "notebooks").glob("*.py"):
    shutil.copy2(source, HERE / "notebooks")
nb_custom_formats = {".py": ["jupytext.reads", {"fmt": "py:percent"}]}
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_execution_timeout = -1
nb_merge_streams = True
pages.write(HERE / "generated")

autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_use_type_comments = False
python_use_unqualified_type_names = True
maximum_signature_line_length = 80


def setup(app) -> None:
    app.connect("autodoc-process-docstring", docstrings.process)
    app.connect("autodoc-process-signature", docstrings.sign)
