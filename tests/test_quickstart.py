"""The notebook runs from an empty folder, and what it says and shows is true of it."""

import base64
import getpass
import io
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import log_of
from PIL import Image

ROOT = Path(__file__).parent.parent
PATH = ROOT / "docs" / "quickstart.ipynb"
CELLS = json.loads(PATH.read_text())["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
RUN = [cell for cell in CODE if "installation" not in cell["metadata"].get("tags", [])]


def text_of(cell):
    """The output of a cell, printed and returned, as text."""
    lines = []
    for output in cell["outputs"]:
        lines += output.get("text", [])
        lines += output.get("data", {}).get("text/plain", [])
    return "".join(lines)


def table_of(printed):
    """{row: [accuracies]} of the table that the notebook prints."""
    rows = re.findall(r"^(SimCLR|raw pixels) +([\d.]+)% +([\d.]+)%$", printed, re.MULTILINE)
    return {name: [float(number) for number in numbers] for name, *numbers in rows}


def holds(table):
    """Whether features beat pixels, and an untrained encoder: 70.4 % with five labels, 92.5 % with all."""
    few, every = zip(table["SimCLR"], table["raw pixels"])
    return few[0] > max(few[1], 70.4) + 2 and every[0] > max(every[1], 92.5)


@pytest.mark.journey
@pytest.mark.slow
def test_its_cells_run_from_an_empty_folder_and_what_they_say_holds(tmp_path):
    code = "\n\n".join("".join(cell["source"]) for cell in RUN)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("XLA_FLAGS")  # eight devices, and no optimisation
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = log_of(tmp_path / "run")[1:]  # behind step 0, of which it says nothing
    assert [int(step) for step in re.findall(r"^step (\d+) ", done.stdout, re.MULTILINE)] == [
        line["step"] for line in lines
    ]
    assert lines[-1]["contrastive_accuracy"] > 2 * lines[0]["contrastive_accuracy"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["trained"]["knn_accuracy"] > 0.9  # 0.831 of the untrained encoder
    assert holds(table_of(done.stdout))
    assert f"step {summary['steps']}/{summary['steps']}" in (tmp_path / "log.txt").read_text()
    with Image.open(tmp_path / "map.png") as picture:
        assert min(picture.size) > 300


def test_every_cell_has_its_output_and_none_is_an_error():
    assert len(RUN) == len(CODE) - 1
    for cell in RUN:
        kinds = {output["output_type"] for output in cell["outputs"]}
        assert kinds and kinds <= {"stream", "display_data", "execute_result"}, cell["source"]
        assert not [output for output in cell["outputs"] if output.get("name") == "stderr"]
    assert [cell["execution_count"] for cell in RUN] == list(range(1, len(RUN) + 1))
    assert holds(table_of("".join(map(text_of, RUN))))


def test_outputs_tell_nothing_of_the_machine():
    for cell in CODE:
        assert "metadata" in cell and not set(cell["metadata"]) - {"tags"}
        text = text_of(cell)
        assert not re.search(r"(?<![\w.])[/~][\w.-]+/|[A-Z]:\\", text), text
        for name in (getpass.getuser(), socket.gethostname()):
            assert not re.search(rf"\b{re.escape(name)}\b", text), text


def test_it_can_be_read_on_a_phone():
    assert PATH.stat().st_size < 400_000
    for cell in CELLS:
        for line in ("".join(cell["source"]) + "\n" + text_of(cell) if cell in CODE else "").splitlines():
            assert len(line) <= 70, line
        if cell["cell_type"] == "markdown":
            assert all(len(line) <= 70 for line in "".join(cell["source"]).splitlines())
    pictures = [
        output["data"]["image/png"]
        for cell in RUN
        for output in cell["outputs"]
        if "data" in output and "image/png" in output["data"]
    ]
    assert len(pictures) == 2
    for picture in pictures:
        with Image.open(io.BytesIO(base64.b64decode("".join(picture)))) as image:
            assert image.width <= 500
