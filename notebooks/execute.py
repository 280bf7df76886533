"""Executes notebooks in place, and takes the pictures of the docs out of them.

All of them, or those that the command `python -m notebooks.execute NAME ...` names.
"""

import base64
import sys
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from rich.progress import track

FOLDER = Path(__file__).parent
FIGURES = FOLDER.parent / "docs" / "figures"
SHOWN_IN_DOCS = ("matching_losses",)


def executed(path: Path, small: bool = False) -> nbformat.NotebookNode:
    """A notebook with fresh outputs.

    Args:
      path: where it is.
      small: whether the cell tagged `parameters` is followed by what the notebook's
        metadata has under `small`.

    Raises:
      nbclient.exceptions.CellExecutionError: if a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    if small:
        parameters = next(c for c in notebook.cells if "parameters" in tags(c))
        parameters.source += "\n" + notebook.metadata["small"]
    client = NotebookClient(
        notebook, timeout=600, record_timing=False, coalesce_streams=True
    )
    return client.execute()


def tags(cell: nbformat.NotebookNode) -> Sequence[str]:
    """What a cell is marked as."""
    return cell.metadata.get("tags", ())


def pictures(notebook: nbformat.NotebookNode) -> list[bytes]:
    """The pictures in the outputs of a notebook, in order."""
    return [
        base64.b64decode(output.data["image/png"])
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", {})
    ]


def main(names: Sequence[str]) -> None:
    """Executes the notebooks of these names, or all."""
    paths = [FOLDER / f"{n}.ipynb" for n in names] or sorted(FOLDER.glob("*.ipynb"))
    for path in track(paths, "notebooks"):
        notebook = executed(path)
        nbformat.write(notebook, path)
        if path.stem in SHOWN_IN_DOCS:
            FIGURES.mkdir(exist_ok=True)
            for number, picture in enumerate(pictures(notebook)):
                (FIGURES / f"{path.stem}_{number}.png").write_bytes(picture)


if __name__ == "__main__":
    main(sys.argv[1:])
