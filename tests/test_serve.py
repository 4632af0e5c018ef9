"""The served page: who gets it, and where its labels go."""

import csv
import json
import re
import shutil
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from test_page import CHROMIUM, browser, name_of, needs_chromium, run  # noqa: F401

from simclr_jax.plots import serve
from simclr_jax.process import UserError

pytestmark = pytest.mark.slow


@pytest.fixture
def server(run, tmp_path, monkeypatch):  # noqa: F811
    """The address of a served page, the run of it, and the file of its labels."""
    copy = shutil.copytree(run, tmp_path / "run")
    lines, ready = [], threading.Event()
    monkeypatch.setattr(serve, "say", lambda line: (lines.append(line), ready.set()))
    names = [name_of(row) for row in range(120)]
    labels = tmp_path / "labels.csv"
    threading.Thread(target=serve.serve, args=(copy, str(labels), names, "photos"), daemon=True).start()
    ready.wait(10)
    return re.match(r"(http://127\.0\.0\.1:\d+/[\w-]+/): ", lines[0])[1], copy, labels


def ask(address, body=None, **headers):
    """The status of a request, and what is answered."""
    request = urllib.request.Request(address, body and body.encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def rows_of(path):
    with open(path, newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def wait_for(opened, condition):
    """Waits until what a page does has come to the server."""
    for _ in range(100):
        if condition():
            return
        opened.wait_for_timeout(50)
    raise AssertionError


def test_only_the_address_with_the_token_is_answered(server):
    address, _, labels = server
    root, token = address.split("/")[2], address.split("/")[3]
    assert ask(address)[0] == 200
    for wrong in (f"http://{root}/", f"http://{root}/{token[:-1]}x/", f"http://{root}/labels"):
        assert ask(wrong)[0] == 403
        assert ask(wrong, "{}")[0] == 403
    for place in (
        "../config.json",
        "..%2fconfig.json",
        "index.html",
        "labels/",
        "/etc/passwd",
        "config.json",
    ):
        assert ask(address + place)[0] == 404
    change = json.dumps({name_of(3): "3"})
    assert ask(address + "labels", change, Origin="http://example.com")[0] == 403
    assert ask(address + "labels", change, Origin="null")[0] == 403
    assert ask(address + "labels", change, Host="example.com")[0] == 403
    assert ask(address + "labels", "[]")[0] == ask(address + "labels", '{"a": 1}')[0] == 400
    assert not labels.exists()
    assert ask(address + "labels", change, Origin=f"http://{root}")[0] == 200
    assert rows_of(labels) == [{"name": name_of(3), "label": "3"}]


def test_other_rows_and_columns_of_the_file_stay(server):
    address, _, labels = server
    rows = [f'"{name_of(0)}";0;anna', f'"{name_of(1)}";;ben', f'"./{name_of(2)}";2;']
    labels.write_text("\n".join(["name;label;patient", *rows, ""]), "utf-8-sig")
    assert json.loads(ask(address + "labels")[1]) == {name_of(0): "0", name_of(2): "2"}
    changes = {name_of(1): "1", name_of(2): "", name_of(9): "nine; not ten"}
    assert ask(address + "labels", json.dumps(changes))[0] == 200
    assert [tuple(row.values()) for row in rows_of(labels)] == [
        (name_of(0), "0", "anna"),
        (name_of(1), "1", "ben"),
        ("./" + name_of(2), "", ""),
        (name_of(9), "nine; not ten", ""),
    ]
    labels.write_text("image;label\n", "utf-8")  # Somebody changed it to what it cannot be.
    status, answer = ask(address + "labels", json.dumps(changes))
    assert status == 409 and "expected one column name" in json.loads(answer)["error"]
    assert labels.read_text() == "image;label\n"


@needs_chromium
def test_labels_by_keys_are_saved_at_once_and_a_button_trains(server, browser, monkeypatch):  # noqa: F811
    address, run, labels = server  # noqa: F811
    commands, end = [], threading.Event()

    class Popen:
        """Stands for the command that trains."""

        returncode = 0

        def __init__(self, command, **_):
            commands.append(command)
            self.stdout = iter(self.lines())

        def lines(self):
            yield "step 5 of 10\n"
            end.wait(20)
            page = run / "plots" / "index.html"
            page.write_text(page.read_text().replace("<h2>Map</h2>", "<h2>New map</h2>"))

        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda *_: None  # noqa: E731

    monkeypatch.setattr(serve.subprocess, "Popen", Popen)
    opened = browser.new_page()
    faults = []
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.goto(address)
    opened.fill("#classes", "0, 1, 2")
    opened.press("#classes", "Enter")
    first = opened.get_attribute("#large", "alt")
    opened.keyboard.press("1")
    opened.wait_for_function("document.getElementById('kept').textContent.includes('Saved in')")
    assert rows_of(labels) == [{"name": first, "label": "1"}]
    second = opened.get_attribute("#large", "alt")
    opened.keyboard.press("2")
    wait_for(opened, lambda: sum(bool(row["label"]) for row in rows_of(labels)) == 2)
    opened.reload()
    opened.wait_for_function("document.getElementById('progress').textContent.startsWith('2 of')")
    opened.locator("#large").scroll_into_view_if_needed()
    opened.keyboard.press("u")
    wait_for(opened, lambda: sum(bool(row["label"]) for row in rows_of(labels)) == 1)
    assert [row["label"] for row in rows_of(labels)] == ["1", ""] and rows_of(labels)[1]["name"] == second
    opened.click("#train")
    opened.wait_for_function("document.getElementById('training').textContent === 'step 5 of 10'")
    assert commands[0][2:] == ["simclr_jax", "round", str(run), f"--labels={labels}"]
    end.set()
    opened.wait_for_selector("text=New map")
    assert not faults


def test_several_labels_an_image_are_read_as_such_and_trained(run, tmp_path, monkeypatch):  # noqa: F811
    labels, lines, commands, ready = tmp_path / "labels.csv", [], [], threading.Event()
    labels.write_text(f'name,label\n"{name_of(1)}","round; even"\n"{name_of(2)}",;\n')
    monkeypatch.setattr(serve, "say", lambda line: (lines.append(line), ready.set()))
    monkeypatch.setattr(serve.subprocess, "Popen", lambda command, **_: (commands.append(command), 1 / 0))
    monkeypatch.setattr(threading, "excepthook", lambda *_: ready.set())
    options = (run, str(labels), [name_of(row) for row in range(120)], "photos", True)
    threading.Thread(target=serve.serve, args=options, daemon=True).start()
    assert ready.wait(10)
    ready.clear()
    address = lines[0].partition(": the page")[0]
    assert json.loads(ask(address + "labels")[1]) == {name_of(1): "even;round", name_of(2): ";"}
    ask(address + "training", "{}")
    assert ready.wait(10)
    assert commands[0][-2:] == [f"--labels={labels}", "--config.dataset.several_labels=True"]


def test_a_file_of_classes_in_columns_takes_no_labels(run, tmp_path):  # noqa: F811
    (tmp_path / "labels.csv").write_text(f"name,cat,dog\n{name_of(0)},1,1\n")
    names = [name_of(row) for row in range(120)]
    with pytest.raises(UserError, match="expected one column label"):
        serve.serve(run, str(tmp_path / "labels.csv"), names, "photos", several=True)


def test_the_page_names_the_file(server):
    address, _, labels = server
    assert f'<html data-labels="{labels}" lang="en">' in ask(address)[1]
    assert Path(labels).parent.exists()
