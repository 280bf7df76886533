"""The notebooks run, in a small setting; what is committed is what they show."""

import nbformat
import pytest

from notebooks import execute
from tests.helpers import slow

NOTEBOOKS = sorted(execute.FOLDER.glob("*.ipynb"))


FIRST = ("quickstart",)


@pytest.mark.parametrize(
    "path",
    [path if path.stem in FIRST else slow(path) for path in NOTEBOOKS],
    ids=lambda path: path.stem,
)
def test_a_notebook_runs(path):
    execute.executed(path, small=True)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_installs_the_package_and_shows_pictures(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "%pip install locoprop-optax" in code[0].source
    assert all(cell.execution_count for cell in code)
    assert execute.pictures(notebook)


@pytest.mark.parametrize("name", execute.SHOWN_IN_DOCS)
def test_pictures_of_the_docs_are_those_of_the_notebook(name):
    notebook = nbformat.read(execute.FOLDER / f"{name}.ipynb", as_version=4)
    shown = sorted(execute.FIGURES.glob(f"{name}_*.png"))
    assert [path.read_bytes() for path in shown] == execute.pictures(notebook)
