"""The documentation site: `make docs` builds it into build/docs. It loads nothing from elsewhere."""

import os
import sys
from pathlib import Path

from sphinx.application import Sphinx

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import reference_pages  # noqa: E402  (lies beside this file)

from coadvise import __version__  # noqa: E402

project, author, copyright = "coadvise", "the authors of coadvise", ""
release = __version__
root_doc = "index"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

# The pages are read on a code host too, so links are plain Markdown: to a page by its file and its headings' anchors.
# A link to a file that is no page, such as a record in results/, becomes a download of that file.
myst_heading_anchors = 4

# A notebook is executed whenever the site is built, so what it shows was computed; a cell that fails ends the build.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
os.environ.setdefault("OMP_NUM_THREADS", "1")  # so small networks gain nothing by more
nb_output_stderr = "remove"  # warnings of other packages, with paths of this machine

autodoc_member_order = "bysource"
autodoc_typehints = "description"
napoleon_custom_sections = [("Options", "params_style")]
smartquotes = False  # "--cache" is an option
default_role = "code"  # docstrings mark code as Markdown does

html_theme = "furo"
html_title = "coadvise"
html_show_copyright = html_show_sphinx = html_copy_source = html_show_sourcelink = False
html_static_path = ["site.css"]
html_css_files = ["site.css"]


def setup(app: Sphinx) -> None:
    app.connect("builder-inited", lambda app: reference_pages.write(HERE / "reference"))
