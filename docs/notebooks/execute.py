"""Runs the notebooks of this folder anew and stores what they show: `make notebooks`.

    python docs/notebooks/execute.py 1-train-switch-fuse.ipynb

It leaves out what differs from run to run though the outputs are the same, such as the times
of cells and the name of the kernel.
"""

import base64
import io
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image
from traitlets.config import Config

HERE = Path(__file__).resolve().parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(path: Path) -> None:
    """Run all cells in one fresh process, in the notebook's folder.

    The file is written only if no cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        # sockets in a folder of our own, in place of ports that others can reach
        sockets = {"transport": "ipc", "ip": f"{folder}/kernel"}
        NotebookClient(
            notebook,
            timeout=900,
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": str(path.parent)}},
            config=Config({"KernelManager": sockets}),
        ).execute()
    notebook.metadata = METADATA
    for cell in notebook.cells:
        cell.metadata = {}
        for output in cell.get("outputs", []):
            if "metadata" in output:
                output.metadata = {}
            if "image/png" in output.get("data", {}):
                output.data.pop("image/jpeg", None)  # the same picture once more
                output.data["image/png"] = smaller(output.data["image/png"])
    nbformat.validate(notebook)
    nbformat.write(notebook, path)


def smaller(png: str) -> str:
    """The same pixels of a PNG in base64, compressed as well as it goes."""
    packed = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(png))).save(packed, "PNG", optimize=True)
    return base64.b64encode(packed.getvalue()).decode()


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(path.name for path in HERE.glob("*.ipynb")):
        started = time.perf_counter()
        print(f"{name}: ", end="", flush=True)
        execute(HERE / name)
        print(f"{time.perf_counter() - started:.0f} s", flush=True)
