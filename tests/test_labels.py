"""Labels by CSV: what spreadsheets write is read, and what is wrong is said with its row."""

import csv

import numpy as np
import pytest
from conftest import tiny_config
from test_datasets import config, write_folder

from simclr_jax import supervised
from simclr_jax.data import datasets, labels
from simclr_jax.process import files
from simclr_jax.process.errors import UserError

NAMES = ["a/1.png", "a/2.png", "b/3, big.png", "gr\u00fcn.png", "x\udcff.png"]


def read(tmp_path, contents, **options):
    path = tmp_path / "labels.csv"
    path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    return labels.read(str(path), NAMES, "PHOTOS", **options)


@pytest.mark.parametrize(
    "contents, message",
    [
        (
            "class,weight\ncat,1\ndog,2\ncow,1\n",
            "row 4: 'cow' is no class: write one row for each of cat, dog",
        ),
        ("class,weight\ncat,1\ncat,1\n", "row 3: 'cat' is there twice"),
        ("class,weight\ncat,0\ndog,1\n", "row 2: the weight is '0': expected one above 0"),
        ("class,weight\ncat,1\n", "has no row for dog: add its weight"),
        ("name,label\ncat,1\n", "expected one column class and one weight, as in class,weight"),
        ("", "is empty: expected a row class,weight and one for each class"),
    ],
)
def test_weights_of_classes_are_checked(tmp_path, contents, message):
    (tmp_path / "weights.csv").write_text(contents)
    with pytest.raises(UserError, match=f"class_weights=.*{message}"):
        labels.read_weights(str(tmp_path / "weights.csv"), ("cat", "dog"))


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_files_of_spreadsheets_are_read(tmp_path, delimiter, encoding, newline):
    rows = [
        ["Name ", "split", "LABEL"],
        ["a/1.png", "all", "cat"],
        ["", "", ""],
        ['"b/3, big.png"', "all", '" a ""big"" dog; wet"'],
        ["a/2.png", "all", " "],
        ["./a/1.png", "all", "cat"],
        ["gru\u0308n.png", "all", "\u00fc"],
        ["x\\udcff.png", "all", "cat"],
    ]
    text = newline.join(delimiter.join(row) for row in rows)
    assert read(tmp_path, text.encode(encoding)) == {
        "a/1.png": "cat",
        "b/3, big.png": 'a "big" dog; wet',
        "gr\u00fcn.png": "\u00fc",
        "x\udcff.png": "cat",
    }


@pytest.mark.parametrize(
    "contents, message",
    [
        ("", "is empty: expected a row name,label"),
        ("\n\n", "is empty"),
        ("name,label\n", "no row has a label"),
        ("name,label\na/1.png,\n", "no row has a label"),
        ("file,label\na/1.png,cat\n", "its first row is file, label: expected one column name, as in name"),
        ("name,label,label\na/1.png,cat,cat\n", "expected one column label"),
        ("name,label\na/1.png,cat\nb/9.png,dog\n", "row 3: 'b/9.png' is no image of PHOTOS: .*'a/1.png'"),
        ("name,label\na/1.png,cat\n,dog\n", "row 3: '' is no image"),
        ("name,label\na/1.png,cat\n\na/1.png,dog\n", "row 4: 'a/1.png' is 'dog' here, but 'cat' in row 2"),
        ("name,label\na/1.png,cat\na/2.png,cat\n", "2 labels, all 'cat': expected at least 2 classes"),
        (b"name,label\na/1.png,\xe4\n", "row 2 is no UTF-8: save it as 'CSV UTF-8'"),
        (b"\0\0\0", "is no text"),
        ('name,label\n"a/1.png,cat\n', "row 2: unexpected end of data"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_with_its_row(tmp_path, contents, message):
    with pytest.raises(UserError, match=f"dataset.labels=.*labels.csv.*{message}") as error:
        read(tmp_path, contents)
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(UserError, match="cannot be read .*: set --config.dataset.labels to a CSV file"):
            labels.read(str(path), NAMES, "PHOTOS")


def test_predictions_are_labels_where_there_is_no_truth(tmp_path, capsys):
    head = "name,label,probability,cat,dog,margin,entropy"
    text = f"{head},truth\na/1.png,cat,0.9,0.9,0.1,0.8,0.3,dog\na/2.png,cat,0.9,0.9,0.1,0.8,0.3,\n"
    text += "gr\u00fcn.png,,0.6,0.6,0.4,0.2,0.7, \n" + '"b/3, big.png",cat,0.6,0.6,0.4,0.2,0.7,NaN\n'
    known = {"a/1.png": "dog", "a/2.png": "cat", "b/3, big.png": "cat"}
    assert read(tmp_path, text, predicted=True) == known
    assert "labels.csv holds predictions, which count as labels where there is no" in capsys.readouterr().out
    quoted = ",".join(f'"{cell.title()}"' for cell in [*head.split(","), "truth"])  # as R writes it
    text = f"{quoted}\na/1.png,cat,0.9,0.9,0.1,0.8,0.3,dog\n"
    assert read(tmp_path, text, classes=1, predicted=True) == {"a/1.png": "dog"}
    text = f"{head}\na/1.png,cat,0.9,0.9,0.1,0.8,0.3\n"
    assert read(tmp_path, text, classes=1, predicted=True) == {"a/1.png": "cat"}
    with pytest.raises(UserError, match="labels.csv holds predictions: give a file of labels"):
        read(tmp_path, text, classes=0)
    assert read(tmp_path, "name,label,truth\na/1.png,cat,dog\n", classes=1) == {"a/1.png": "cat"}
    assert "predictions" not in capsys.readouterr().out


def test_one_class_may_be_enough(tmp_path):
    assert read(tmp_path, "name,label\na/1.png,cat\n", classes=1) == {"a/1.png": "cat"}


def test_classes_that_differ_in_case_or_spaces_are_told():
    assert labels.similar_classes(["cat", "Cat", "dog", "sea lion", "sealion"]) == [
        "'Cat' and 'cat'",
        "'sea lion' and 'sealion'",
    ]


@pytest.mark.parametrize(
    "spelling",
    [
        "./a/1.png",
        "a\\1.png",
        "a//1.png",
        "PHOTOS/a/1.png",
        "{cwd}/PHOTOS/a/1.png",
        "C:\\me\\PHOTOS\\a\\1.png",
    ]
    + ["A/1.PNG", "a/1", " a/1.png\xa0", "\u200ba/1.png", "'a/1.png"],
)
def test_names_are_understood_where_one_image_fits(tmp_path, monkeypatch, capsys, spelling):
    monkeypatch.chdir(tmp_path)
    spelling = spelling.format(cwd=tmp_path)
    assert read(tmp_path, f"name,label\n{spelling},cat\n", classes=1) == {"a/1.png": "cat"}
    assert ("are taken for others" in capsys.readouterr().out) == (spelling != "./a/1.png")


def test_of_similar_images_the_one_that_is_spelt_so_is_meant(tmp_path):
    names = ["x.jpg", " x.jpg", "X.jpg", "x.png", "e\u0301.jpg", "\u00e9.jpg", "=x.jpg", "x.jpg.jpg"]
    path = csv_of(tmp_path / "labels.csv", {name: f"label {number}" for number, name in enumerate(names)})
    assert list(labels.read(path, names, "PHOTOS").values()) == [f"label {number}" for number in range(8)]
    csv_of(tmp_path / "labels.csv", {"/other/PHOTOS/ x.jpg": "a"})
    assert labels.read(path, names, "PHOTOS", classes=1) == {" x.jpg": "a"}
    csv_of(tmp_path / "labels.csv", {"x": "a"})
    with pytest.raises(UserError, match="row 2: 'x' is no image of PHOTOS: .*X.jpg, x.png fit: write the"):
        labels.read(path, names[1:4], "PHOTOS")


def test_names_that_we_write_come_back_from_a_spreadsheet(tmp_path):
    names = [" x.png", "\tx.png", "\xa0x.png", "=x.png", "-1.png", "+1.png", "@x.png", "'x.png", " d/x.png"]
    rows = [("name", "label"), *((files.csv_name(name), number) for number, name in enumerate(names))]
    path = tmp_path / "labels.csv"
    files.write_csv(path, rows)
    assert path.read_bytes().startswith(b"\xef\xbb\xbfname,label\n")
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = [[cell.strip() for cell in line] for line in csv.reader(file)]  # As some spreadsheets do.
    assert not [cell for cell, _ in rows if cell[0] in "=+-@'"]
    files.write_csv(path, rows)
    assert list(labels.read(str(path), names, "PHOTOS")) == names


@pytest.mark.parametrize(
    "text",
    [
        "sep=;\nname;label\na/1.png;cat\n",
        '"sep=\t"\r\nname\tlabel\r\na/1.png\tcat\r\n',
        '"name,label"\n"a/1.png,cat"\n',
        '"name,label";;\n"""a/1.png"",""cat""";;\n',
        "name|label\na/1.png|cat\n",
    ],
)
def test_other_forms_of_csv_are_read(tmp_path, text):
    assert read(tmp_path, text, classes=1) == {"a/1.png": "cat"}


def test_all_wrong_names_are_told_at_once_and_which_are_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "PHOTOS", ["damaged.png"])
    rows = {f"{number}.png": "cat" for number in range(9)} | {"damaged.png": "dog", "a/1.png": "cat"}
    with pytest.raises(UserError) as error:
        labels.read(csv_of(tmp_path / "labels.csv", rows), NAMES, "PHOTOS")
    assert str(error.value).startswith(
        "dataset.labels="
        + str(tmp_path / "labels.csv")
        + ", 10 of 11 names are no images of PHOTOS, as row 2: "
        "'0.png', row 3: '1.png', row 4: '2.png'; 9 of them: write names relative"
    )
    assert "; 1 of them: there, but damaged or left out" in str(error.value)


@pytest.mark.parametrize(
    "page, told", [("cp1252", "Windows-1252"), ("mac-roman", "Mac Roman"), ("cp850", "DOS")]
)
def test_accents_of_another_code_page_are_told(tmp_path, page, told):
    name, label = ("gr\u00fcn.png".encode().decode(page), "\u00fc".encode().decode(page))
    with pytest.raises(UserError, match=f"look like UTF-8 read as {told}: open it anew by Data > From Text"):
        read(tmp_path, f"name,label\n{name},cat\na/1.png,dog\n")
    (note,) = labels.notes({"a/1.png": label, "a/2.png": "\u00e4", "b/3, big.png": "\u56fe"})
    assert f"looks like '\u00fc', UTF-8 read as {told}" in note


def test_formulas_are_told(tmp_path):
    with pytest.raises(UserError, match="row 2: '#NAME.' .* took names for formulas: write ./ in front"):
        read(tmp_path, "name,label\n#NAME?,cat\n")
    with pytest.raises(UserError, match="row 2: 'a/1.png' is '#REF!', the error of a formula: type"):
        read(tmp_path, "name,label\na/1.png,#REF!\n")


def test_missing_labels_of_pandas_and_r_are_noted(tmp_path, capsys):
    text = "name,label\na/1.png,NaN\na/2.png,NA\ngr\u00fcn.png,none\n"
    assert read(tmp_path, text, classes=1) == {"gr\u00fcn.png": "none"}
    assert "2 rows with NA, NaN have no label" in capsys.readouterr().out


@pytest.mark.parametrize(
    "given, told",
    [
        (["1", "01", "2"], "'01' and '1' are two classes"),
        (["TRUE", "True"], "'TRUE' and 'True' are"),
        (["a", "a\u200b"], r"'a' and 'a\\u200b' are"),
        (["\u00e9", "e\u0301"], "'e\\u0301' and '\u00e9' are"),
        (
            [f"{number / 7:.4f}" for number in range(40)],
            "40 images have 40 labels, which look like measurements",
        ),
        ([f"image {number}" for number in range(40)], "40 images have 40 labels, which look like names"),
        ([str(number % 10) for number in range(40)], ""),
        ([str(number) for number in range(10)], ""),
    ],
)
def test_odd_classes_are_noted(given, told):
    lines = labels.notes(dict(enumerate(given)))
    assert len(lines) == bool(told) and told in "".join(lines)


def csv_of(path, rows):
    path.write_text("name,label\n" + "".join(f"{name},{label}\n" for name, label in rows.items()))
    return str(path)


def load(root, split, **settings):
    workdir = settings.pop("workdir", None)
    settings = {"path": str(root)} | settings
    return datasets.load(config("folder", **settings), split, seed=0, workdir=workdir)


class TestFolder:
    def test_labels_win_over_sub_folders_and_the_rest_has_none(self, tmp_path, capsys):
        root = write_folder(tmp_path / "photos", [f"{kind}/{n}.png" for kind in "xy" for n in range(20)])
        rows = {"x/3.png": "cat", "y/4.png": "dog", "y/5.png": "cat", "x/0.png": "ant"}
        given = {"labels": csv_of(tmp_path / "labels.csv", rows)}
        parts = {split: load(root, split, **given) for split in ("train", "eval", "all")}
        for source in parts.values():
            assert source.class_names == ("ant", "cat", "dog") and source.num_classes == 3
            for name, label in zip(source.names, source.labels):
                assert label == (source.class_names.index(rows[name]) if name in rows else -1)
        assert parts["train"].num_examples + parts["eval"].num_examples == parts["all"].num_examples == 40
        assert parts["all"].names.tolist() == sorted(parts["all"].names)
        printed = capsys.readouterr().out
        assert "labels: 4 images of" in printed and "in 3 classes, 1 to 2 in each: ant, cat, dog" in printed
        kept = datasets.labelled(parts["all"])
        assert dict(zip(kept.names, (kept.class_names[label] for label in kept.labels))) == rows
        plain = load(root, "train")
        assert plain.names.tolist() == parts["train"].names.tolist()  # the split is the same without them

    def test_a_changed_file_is_refused_and_a_lost_one_is_not_needed(self, tmp_path):
        root, workdir = write_folder(tmp_path / "photos", [f"{n}.png" for n in range(20)]), tmp_path / "run"
        path = csv_of(tmp_path / "labels.csv", {"3.png": "cat", "4.png": "dog"})
        first = load(root, "all", labels=path, workdir=workdir)
        again = load(root, "all", labels=path, workdir=workdir)
        np.testing.assert_array_equal(first.labels, again.labels)
        csv_of(tmp_path / "labels.csv", {"3.png": "cat", "4.png": "dog", "5.png": "dog"})
        with pytest.raises(UserError, match=r"labels.csv has changed: start with"):
            load(root, "all", labels=path, workdir=workdir)
        (tmp_path / "labels.csv").unlink()
        again = load(root, "all", labels=path, workdir=workdir)
        np.testing.assert_array_equal(first.labels, again.labels)

    def test_all_holds_what_no_split_takes(self, tmp_path, capsys):
        files = [
            f"{place}/{kind}/{n}.png" for place in ("train", "val", "test") for kind in "ab" for n in "12"
        ]
        root = write_folder(tmp_path / "photos", [*files, "beside.png"])
        whole = load(root, "all")
        assert whole.names.tolist() == sorted([*files, "beside.png"]) and whole.num_classes == 0
        labels = dict(zip(whole.names.tolist(), whole.labels.tolist()))
        assert labels["train/b/1.png"] == labels["val/b/2.png"] == 1 and labels["beside.png"] == -1
        assert "13 images, 2 classes" in capsys.readouterr().out

    def test_few_labels_are_all_learnt_from_and_many_are_held_out(self, tmp_path):
        root = write_folder(tmp_path / "photos", [f"{n:03d}.png" for n in range(300)])
        task = tiny_config("linear_eval")
        task.dataset.update(name="folder", path=str(root))
        for count, few in ((39, True), (240, False)):
            rows = {f"{n:03d}.png": "ab"[n % 2] for n in range(count)}
            task.dataset.labels = csv_of(tmp_path / "labels.csv", rows)
            source, held_out = supervised.load_labelled(task, tmp_path / f"run{count}")
            assert (held_out is None) == few and source.labels.min() == 0
            names = set(source.names) | set(() if few else held_out.names)
            assert names == set(rows) and (few or not set(source.names) & set(held_out.names))
