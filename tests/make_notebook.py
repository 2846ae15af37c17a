"""Make the notebook from the script and execute it: `python tests/make_notebook.py --help`."""

import argparse
import os
import textwrap
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "convolutional_neural_networks.py"
NOTEBOOK = SCRIPT.with_suffix(".ipynb")
GUARD = 'if __name__ == "__main__":\n'


def to_notebook(source: str) -> nbformat.NotebookNode:
    """Turn the script's text into a notebook: the same cells, without the guards."""
    notebook = jupytext.reads(source, fmt="py:percent")
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02}"
        if cell.source.startswith(GUARD):
            cell.source = textwrap.dedent(cell.source.removeprefix(GUARD))
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3",
                                        "language": "python"}}
    return notebook


def execute(notebook: nbformat.NotebookNode, options: str) -> None:
    """Run all cells in a fresh kernel, with the tutorial's `options`; outputs go into the notebook."""
    environment = {key: value for key, value in os.environ.items() if key != "MPLBACKEND"}
    environment["CNN_TUTORIAL_ARGS"] = options
    client = NotebookClient(notebook, timeout=1800, coalesce_streams=True,
                            resources={"metadata": {"path": str(ROOT)}})
    client.execute(env=environment)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day, new at every run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--options", default="--offline",
                        help="for the tutorial (default: %(default)s)")
    options = parser.parse_args().options
    notebook = to_notebook(SCRIPT.read_text(encoding="utf-8"))
    execute(notebook, options)
    beside = NOTEBOOK.with_suffix(".tmp")
    nbformat.write(notebook, beside)
    beside.replace(NOTEBOOK)
    print(f"{NOTEBOOK.name}: {len(notebook.cells)} cells, {NOTEBOOK.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
