"""The notebooks run from the first cell to the last, offline, and are stored without what they print."""

from __future__ import annotations

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

EXPORTS = "compile"  # takes more than forty seconds
NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples").glob("*.ipynb"))


def test_there_is_one_for_each_use():
    assert [path.stem for path in NOTEBOOKS] == ["compare", "compile", "embed"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(path):
    cells = nbformat.read(path, as_version=4).cells
    assert all(not cell.outputs and cell.execution_count is None for cell in cells if cell.cell_type == "code")
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=[pytest.mark.slow] * (path.stem == EXPORTS), id=path.stem) for path in NOTEBOOKS]
)
def test_a_notebook_runs(path, tmp_path):
    book = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(book, timeout=300, kernel_name="python3", resources=where).execute()
    data = [output.data for cell in book.cells for output in cell.get("outputs", []) if "data" in output]
    assert any("image/png" in shown or '<img src="data:image/png' in shown.get("text/html", "") for shown in data)
