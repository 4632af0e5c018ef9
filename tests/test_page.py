"""The page of a run, as a person uses it: in a browser, by mouse and keys, on a wide screen and a phone."""

import csv
import json
import os
import re
import shutil

import numpy as np
import pyarrow
import pytest
from conftest import run_task, tiny_config
from PIL import Image
from pyarrow import parquet
from sklearn.datasets import load_digits
from test_suggest import write_embedded

from simclr_jax import runs
from simclr_jax.evaluation import selection
from simclr_jax.plots import __main__ as plots
from simclr_jax.plots import figures, page
from simclr_jax.workdir import records

pytestmark = pytest.mark.slow
COUNT = 120
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")


def name_of(row):
    return f"{row:03d}, <b>&amp;{load_digits().target[row]}.png"  # names are text, whatever they look like


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir of embed with the pixels of digits as features, their files, and a page of them."""
    root = tmp_path_factory.mktemp("page")
    images = np.round(load_digits().images[:COUNT] * 255 / 16).astype(np.uint8)
    (root / "photos").mkdir()
    for row, image in enumerate(images):
        Image.fromarray(image).save(root / "photos" / name_of(row))
    features = images.reshape(COUNT, -1).astype(np.float32)
    features[7] = features[3]
    write_embedded(root / "run", features, names=[name_of(row) for row in range(COUNT)])
    config = tiny_config("embed", **{"dataset.name": "folder", "dataset.path": str(root / "photos")})
    config.pretrained = "RUN"
    records.save_config(root / "run", config.to_dict())
    plots.main([str(root / "run")])
    return root / "run"


@pytest.fixture
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def open_page(context, run):
    """The page, and a list that gets what is wrong with it."""
    opened, faults = context.new_page(), []
    opened.on("console", lambda message: message.type == "error" and faults.append(message.text))
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on("request", lambda request: request.url.startswith("http") and faults.append(request.url))
    opened.goto(f"file://{run}/plots/index.html")
    opened.wait_for_function("Bokeh.documents.length && Bokeh.documents[0].is_idle")
    return opened, faults


def place_of(opened, row):
    """Where a point of the map is on the screen."""
    opened.locator("#map").scroll_into_view_if_needed()
    return opened.evaluate(
        """(row) => {
          const model = Bokeh.documents[0].get_model_by_name("map");
          const points = Bokeh.documents[0].get_model_by_name("points");
          const view = Bokeh.index.find_one(model);
          const frame = view.canvas_view.el.getBoundingClientRect();
          return [frame.x + view.frame.x_scale.compute(points.data.x[row]),
                  frame.y + view.frame.y_scale.compute(points.data.y[row])];
        }""",
        row,
    )


def test_it_is_one_file_without_addresses(run):
    text = (run / "plots" / "index.html").read_text()
    markup = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"""(src|href)=["']?(?!data:|#|")""", markup)
    assert len(text) < 4_000_000 and "<b>&amp;" not in markup


@needs_chromium
def test_thumbnails_of_some_thousand_photographs_are_shown(run, browser, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (1800, 1800, 3), np.uint8)
    sprite = page._jpeg(Image.fromarray(pixels))
    assert len(sprite) > 2**21  # More than a variable of CSS holds.
    text = (run / "plots" / "index.html").read_text()
    (tmp_path / "plots").mkdir()
    small = max(re.findall(r"data:image/jpeg;base64,[\w+/=]+", text), key=len)
    (tmp_path / "plots" / "index.html").write_text(text.replace(small, sprite))
    opened, faults = open_page(browser.new_context(), tmp_path)
    style = "getComputedStyle(document.querySelector('#panel .thumb')).backgroundImage.length"
    assert opened.evaluate(style) > len(sprite) and not faults


def write_predictions(workdir, dataset, probabilities, classes, several=False):
    """Writes what predict does: the config and the probabilities, [n, classes], of the first n images."""
    workdir.mkdir(parents=True)
    config = tiny_config("predict", **{"dataset.name": "folder"})
    config.update(dataset=dataset, pretrained="RUN")
    records.save_config(workdir, config.to_dict())
    probabilities = np.asarray(probabilities, np.float32)
    columns = {"name": [name_of(row) for row in range(len(probabilities))]}
    columns["label"] = [classes[row] for row in probabilities.argmax(axis=1)]
    columns |= {"probability": probabilities.max(axis=1)} | dict(zip(classes, probabilities.T))
    table = pyarrow.table(columns).replace_schema_metadata(
        {"class_names": json.dumps(classes), "several_labels": json.dumps(several)}
    )
    parquet.write_table(table, workdir / "predictions.parquet")


def data_of(run):
    text = (run / "plots" / "index.html").read_text()
    return json.loads(re.search(r"const DATA = (.*);</script>", text)[1])


def test_predictions_come_by_doubt_and_tell_who_made_them(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    sure = np.linspace(0.51, 1, COUNT)[::-1]
    dataset = records.read_config(run)["dataset"]
    write_predictions(copy / "a<b>", dataset, np.stack([sure, 1 - sure], axis=1), ["yes", "no"])
    plots.main([str(copy)])
    data = data_of(copy)
    names = [doubt["name"] for doubt in data["doubts"]]
    assert names == [name_of(row) for row in range(COUNT)][::-1][: page.DOUBTFUL]
    assert data["doubts"][0]["caption"] == "yes 0.51, no 0.49" and data["correctable"]
    assert "a&lt;b&gt; tells them apart" in (copy / "plots" / "index.html").read_text()
    assert set(data["columns"]["prediction"]) == {0} and data["margins"][0] == 1


def test_predictions_for_other_images_of_these_names_stay_off_the_map(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    others = shutil.copytree(run.parent / "photos", tmp_path / "others")
    dataset = records.read_config(run)["dataset"] | {"path": str(others)}
    write_predictions(copy / "predicted", dataset, np.eye(2)[np.arange(COUNT) % 2], ["yes", "no"])
    plots.main([str(copy)])
    data = data_of(copy)
    assert set(data["columns"]) == {"cluster"} and not data["margins"] and not data["correctable"]
    assert len(data["doubts"]) == page.DOUBTFUL
    assert "copy them into its folder first" in (copy / "plots" / "index.html").read_text()

    own = records.read_config(run)["dataset"]
    write_predictions(copy / "round-1" / "predicted", own, np.eye(2)[np.arange(COUNT) % 2], ["yes", "no"])
    os.utime(copy / "round-1" / "predicted" / "predictions.parquet", (0, 0))  # Older, but of the run's own.
    plots.main([str(copy)])
    data = data_of(copy)
    assert len(data["margins"]) == COUNT and data["correctable"]


@needs_chromium
@pytest.mark.parametrize("width", [1280, 400])
def test_a_point_shows_its_image_and_a_click_its_neighbours(run, browser, width):
    opened, faults = open_page(browser.new_context(viewport={"width": width, "height": 900}), run)
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    opened.locator("#colour").select_option("cluster")
    assert sum(map(int, re.findall(r"\((\d+)\)", opened.locator("#legend").inner_text()))) == COUNT
    colours = opened.evaluate("Bokeh.documents[0].get_model_by_name('points').data.colour")
    numbers = opened.evaluate("DATA.columns.cluster")
    assert colours == [figures.CLASSES[number] for number in numbers]
    for row in (5, 60):
        opened.mouse.move(0, 0)
        opened.mouse.move(*place_of(opened, row))
        opened.wait_for_function(f"document.getElementById('panel').dataset.row == {row}")
        assert name_of(row) in opened.locator("#panel figcaption").first.inner_text()
    opened.mouse.click(*place_of(opened, 60))
    near = opened.evaluate("DATA.images.nearest[60]")
    pixels = load_digits().images[:COUNT].reshape(COUNT, -1)
    pixels[7] = pixels[3]
    pixels /= np.linalg.norm(pixels, axis=1, keepdims=True)
    similar = pixels @ pixels[60]
    similar[60] = -1
    np.testing.assert_allclose(np.sort(similar[near])[::-1], np.sort(similar)[::-1][: len(near)], atol=0.02)
    opened.locator("#panel .rows .thumb").first.focus()
    opened.keyboard.press("Enter")
    assert int(opened.locator("#panel").get_attribute("data-row")) == near[0]
    groups = opened.evaluate("DATA.duplicates")
    assert [3, 7] in groups and opened.locator("#duplicate-groups .group").count() == len(groups)
    assert opened.locator("#outlier-rows .thumb").count() == page.OUTLIERS
    assert not faults


@needs_chromium
@pytest.mark.parametrize("width", [1280, 400])
def test_ten_images_are_labelled_by_keys_and_train_a_classifier(
    run, browser, pretrained_run, tmp_path, width
):
    context = browser.new_context(viewport={"width": width, "height": 900}, accept_downloads=True)
    opened, faults = open_page(context, run)
    opened.locator("#classes").fill('low, "high" one')
    opened.keyboard.press("Enter")

    def escape():
        return opened.locator("#large").get_attribute("alt")

    def digit(name):
        return int(name.removesuffix(".png")[-1])

    given, order = {}, []
    for step in range(10):
        name = escape()
        order.append(name)
        if step == 4:
            opened.keyboard.press("2")
            assert escape() != name
            opened.keyboard.press("u")  # it was the wrong one
            assert escape() == name
        if step == 6:
            opened.keyboard.press("1")
            opened.keyboard.press("u")  # whose label is gone, then
            opened.keyboard.press("s")
            continue
        if step == 7:
            opened.reload()  # which loses nothing
            assert escape() == name and opened.locator("#classes").input_value() == 'low, "high" one'
        if width < 600:
            opened.locator("#keys button").nth(int(digit(name) > 4)).click()
        else:
            opened.keyboard.press("12"[int(digit(name) > 4)])
        given[name] = ["low", '"high" one'][int(digit(name) > 4)]
    assert len(set(order)) == 10 and "9 of 50 labelled" in opened.locator("#progress").inner_text()
    with opened.expect_download() as download:
        opened.locator("#download").click()
    assert download.value.suggested_filename == "labels.csv"
    download.value.save_as(tmp_path / "labels.csv")
    assert not faults
    with open(tmp_path / "labels.csv", newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    assert {row["name"]: row["label"] for row in rows if row["label"]} == given and len(rows) == 50
    assert [row["name"] for row in rows[:10]] == order
    if width > 600:
        photos, labels = str(run.parent / "photos"), str(tmp_path / "labels.csv")
        settings = {"dataset.name": "folder", "dataset.path": photos, "dataset.labels": labels}
        workdir = tmp_path / "classifier"
        assert run_task("transfer", workdir, pretrained=str(pretrained_run), **settings)["labels"] == 9


@needs_chromium
def test_labels_and_corrections_go_on_from_those_of_the_newest_classifier(run, browser, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    digits = load_digits().target[:COUNT]
    rows = [f'"{name_of(row)}",{digits[row]}' for row in range(20)]
    (tmp_path / "given.csv").write_text("\n".join(["name,label", *rows, ""]))
    dataset = records.read_config(run)["dataset"] | {"labels": str(tmp_path / "given.csv")}
    likely = np.full((COUNT, 10), 0.05) + 0.5 * np.eye(10)[digits]
    likely[:40] += 0.3 * np.eye(10)[7]
    write_predictions(copy / "classifier", dataset, likely, list("0123456789"))
    plots.main([str(copy)])
    data = data_of(copy)
    assert len(data["given"]) == 20
    known = np.where(np.arange(COUNT) < 20, digits, -1)
    chosen = selection.doubtful(runs.load_features(copy).features, 50, known, 0)
    assert [image["name"] for image in data["suggested"]] == [name_of(row) for row in chosen]  # none again

    opened, faults = open_page(browser.new_context(accept_downloads=True), copy)
    opened.keyboard.press("7")  # no image is in sight
    assert opened.locator("#progress").inner_text().startswith("0 of 50")
    opened.locator("#large").scroll_into_view_if_needed()
    first = opened.locator("#large").get_attribute("alt")
    opened.keyboard.press("7")  # the key of a class of one character
    assert opened.locator("#progress").inner_text().startswith("1 of 50")
    second = opened.locator("#large").get_attribute("alt")
    opened.keyboard.press("/")
    opened.keyboard.type("letter s")  # a class without a key
    opened.keyboard.press("Enter")
    opened.locator("#by").select_option(label=f"7 ({(likely.argmax(axis=1) == 7).sum()})")
    figures = opened.locator("#doubt-rows figure")
    wrong, right = (figures.nth(place).get_attribute("data-name") for place in (0, 1))
    figures.first.locator("button").click()
    opened.keyboard.press("3")
    opened.keyboard.press("Enter")  # on the next one
    assert "wrong" in figures.first.get_attribute("class") and "labelled 3" in figures.first.inner_text()
    opened.locator("#classes").fill(opened.locator("#classes").input_value().replace("letter s", "S"))
    opened.keyboard.press("Enter")
    opened.reload()
    with opened.expect_download() as download:
        opened.locator("#download").click()
    download.value.save_as(tmp_path / "labels.csv")
    with open(tmp_path / "labels.csv", newline="", encoding="utf-8-sig") as file:
        labels = {row["name"]: row["label"] for row in csv.DictReader(file) if row["label"]}
    assert labels == data["given"] | {first: "7", second: "S", wrong: "3", right: "7"}
    opened.locator("#classes").fill("cat; dog")
    opened.keyboard.press("Enter")
    assert opened.locator("#keys button", has_text="dog").inner_text() == "b: dog"  # digits are taken
    assert not faults


def properties(digits):
    """The classes of a digit, bool [n, 3]."""
    return np.stack([digits % 2 == 0, digits > 4, np.isin(digits, [0, 6, 8, 9])], axis=1)


@pytest.fixture
def several(run, tmp_path):
    """A run whose classifier tells several classes of an image, and has learnt from 20 labels."""
    copy, digits = shutil.copytree(run, tmp_path / "run"), load_digits().target[:COUNT]
    classes, truth = ["even", "high", "round"], properties(digits)
    cells = [";".join(np.array(classes)[row]) or ";" for row in truth]
    rows = [f'"{name_of(row)}","{cells[row]}"' for row in range(20)]
    (tmp_path / "given.csv").write_text("\n".join(["name,label", *rows, ""]))
    own = records.read_config(run)["dataset"]
    dataset = own | {"labels": str(tmp_path / "given.csv"), "several_labels": True}
    likely = np.where(truth, 0.9, 0.1) - 0.3 * np.eye(1, 3, 2) * (np.arange(COUNT) > 60)[:, None]
    likely[40] = [0.8, 0.45, 0.7]
    likely[41] = [0.2, 0.52, 0.3]
    write_predictions(copy / "classifier" / "predicted", own, likely.clip(0, 1), classes, several=True)
    records.save_config(copy / "classifier", tiny_config("finetune").to_dict() | {"dataset": dataset})
    plots.main([str(copy)])
    return copy, cells, likely


def test_several_labels_an_image_come_from_the_classifier_and_its_file(several):
    run, cells, likely = several
    data = data_of(run)
    assert data["several"] and data["given"] == {name_of(row): cells[row] for row in range(20)}
    doubts = {entry["name"]: entry for entry in data["doubts"]}
    assert next(iter(doubts)) == name_of(41) and doubts[name_of(41)]["caption"] == "high 0.52"
    # Behind those that are predicted, the one that makes it doubtful.
    assert doubts[name_of(40)]["caption"] == "even 0.80, round 0.70, high 0.45"
    assert doubts[name_of(40)]["prediction"] == "even;round"
    predicted = [data["classes"][number] for number in data["columns"]["prediction"]]
    names = np.array(["even", "high", "round"])
    assert predicted == [";".join(names[row > 0.5]) or ";" for row in likely]
    margins = np.abs(2 * likely.clip(0, 1) - 1).min(axis=1)
    np.testing.assert_allclose(data["margins"], margins, atol=1e-3)
    text = (run / "plots" / "index.html").read_text()
    assert "--labels=labels.csv --config.dataset.several_labels=True</code>" in text
    assert "20 with a label of 3 classes" in text


@needs_chromium
@pytest.mark.parametrize("width", [1280, 400])
def test_keys_add_and_take_away_one_of_several_labels(several, browser, tmp_path, width):
    copy, _, _ = several
    context = browser.new_context(viewport={"width": width, "height": 900}, accept_downloads=True)
    opened, faults = open_page(context, copy)
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    assert opened.locator("#classes").input_value() == "even, high, round"

    def in_hand():
        return opened.locator("#large").get_attribute("alt")

    def press(*keys, place="#keys"):
        for key in keys:
            if width < 600:
                opened.locator(f"{place} button", has_text=re.compile(f"^{key}:")).click()
            else:
                opened.keyboard.press(key)

    def pressed(place):
        return opened.locator(f"{place} [aria-pressed=true]").all_inner_texts()

    opened.locator("#large").scroll_into_view_if_needed()
    first = in_hand()
    press("1", "1")  # Enter alone says that it has none of them.
    assert in_hand() == first and not opened.evaluate("Object.keys(state.labels).length")
    press("1", "2", "3", "1")
    opened.reload()  # which keeps what is in hand
    opened.locator("#large").scroll_into_view_if_needed()
    assert in_hand() == first and pressed("#keys") == ["2: high", "3: round"]
    press("Enter")
    second = in_hand()
    press("1")
    opened.evaluate("(name) => (DATA.given[name] = 'even')", second)  # as after a save and a reload
    press("s")
    assert opened.evaluate("(name) => labelOf(name) ?? null", second) is None
    third = in_hand()
    press("Enter")  # none of the classes
    fourth = in_hand()
    assert len({first, second, third, fourth}) == 4
    press("2", "Enter")
    press("u")
    assert in_hand() == fourth and pressed("#keys") == ["2: high"]
    press("u")
    assert in_hand() == fourth and not pressed("#keys")
    press("s")

    opened.locator("#by").select_option(
        label=re.search(r"even \(\d+\)", opened.locator("#by").inner_text())[0]
    )
    figures = opened.locator("#doubt-rows figure")
    names = [figures.nth(place).get_attribute("data-name") for place in range(3)]
    assert figures.first.inner_text().startswith(f"{names[0]}: even;round, margin 0.1")
    figures.first.locator("button").click()
    assert pressed("#correct") == ["1: even", "3: round"]
    press("1", "2", "1", place="#correct")
    assert "wrong" in figures.first.get_attribute("class")
    press("2", "1", "1", place="#correct")  # as it was predicted, in whatever order
    assert "wrong" not in figures.first.get_attribute("class")
    press("3", "Enter", place="#correct")
    press("Enter", place="#correct")  # on the next one
    for key in [text[0] for text in pressed("#correct")]:  # and all are taken away from the one behind
        press(key, place="#correct")
    press("Enter", place="#correct")
    assert "labelled even" in figures.first.inner_text() and "wrong" in figures.first.get_attribute("class")
    assert "wrong" not in figures.nth(1).get_attribute("class")
    opened.locator("#classes").fill("even, large, round")
    opened.keyboard.press("Enter")
    with opened.expect_download() as download:
        opened.locator("#download").click()
    download.value.save_as(tmp_path / "labels.csv")
    with open(tmp_path / "labels.csv", newline="", encoding="utf-8-sig") as file:
        labels = {row["name"]: row["label"] for row in csv.DictReader(file) if row["label"]}

    def renamed(label):
        return ";".join(sorted("large" if part == "high" else part for part in label.split(";")))

    likeliest = opened.evaluate(
        "(name) => DATA.doubts.find((doubt) => doubt.name === name).prediction", names[1]
    )
    made = {first: "large;round", third: ";", names[0]: "even", names[1]: renamed(likeliest), names[2]: ";"}
    assert labels == {name: renamed(label) for name, label in data_of(copy)["given"].items()} | made
    assert not faults
