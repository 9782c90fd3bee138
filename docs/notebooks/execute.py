"""Run the notebooks from top to bottom and store what they print, without times or paths.

    python docs/notebooks/execute.py            # all of them
    python docs/notebooks/execute.py laws       # one

Needs nbclient and ipykernel. The pages of the site show what is stored; a test runs the notebooks
again and compares.
"""

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

FOLDER = Path(__file__).resolve().parent
TIMEOUT = 600  # seconds a cell, on a busy machine


def executed(path: Path) -> nbformat.NotebookNode:
    """The notebook with fresh outputs, run in an empty folder that is gone afterwards.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell raised; the message holds its traceback.
    """
    notebook = nbformat.read(path, as_version=4)
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")  # one thread sums in one order
    with tempfile.TemporaryDirectory() as folder:
        sockets = Config()  # of the file system: no port is opened
        sockets.KernelManager.transport = "ipc"
        sockets.KernelManager.ip = f"{folder}/kernel"
        client = NotebookClient(
            notebook,
            kernel_name="python3",
            config=sockets,
            timeout=TIMEOUT,
            coalesce_streams=True,
            record_timing=False,
            resources={"metadata": {"path": folder}},
        )
        client.execute()
    # The patch version of Python is no result.
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    for number, cell in enumerate(notebook.cells, 1):
        cell.id, cell.metadata = f"cell-{number}", {}
        if (
            cell.cell_type == "code"
        ):  # stderr has progress bars, which say how fast this machine is
            cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
    return notebook


def main() -> None:
    for name in sys.argv[1:] or sorted(path.stem for path in FOLDER.glob("*.ipynb")):
        path = FOLDER / f"{name}.ipynb"
        nbformat.write(executed(path), path)
        print(f"{path.name} is up to date")


if __name__ == "__main__":
    main()
