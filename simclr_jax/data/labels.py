"""Labels by CSV, `--config.dataset.labels=FILE.csv`: a row an image, with the columns `name` and `label`.

Files of `simclr_jax.evaluation.suggest` and of spreadsheets may have more columns, rows without a label, a
byte order mark, a line `sep=;`, semicolons, tabs or bars in place of commas, and lines quoted as a whole. In
predictions.csv, which `predict` writes, the `truth` of an image goes before its predicted label.
"""

import collections
import csv
import functools
import io
import itertools
import os
import re
import unicodedata
from collections.abc import Iterable
from contextlib import suppress

import numpy as np
from etils import epath

from simclr_jax.data import tiles
from simclr_jax.process import UserError, escape, files, first_few, reason_of, say_once

_ENCODINGS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}  # Spreadsheets mark "Unicode text" so.
_CODE_PAGES = {"cp1252": "Windows-1252", "mac-roman": "Mac Roman", "cp1250": "Windows-1250", "cp850": "DOS"}
_ANEW = "open it anew by Data > From Text/CSV with the origin UTF-8, then save it as 'CSV UTF-8'"
_MISSING = ("NaN", "nan", "NaT", "NA", "<NA>", "None", "#N/A")  # As pandas, R and spreadsheets write it.
_ERROR = re.compile(r"#(NAME\?|REF!|VALUE!|DIV/0!|NUM!|NULL!)|Err:\d+")  # As spreadsheets write it.
_NUMBER = re.compile(r"[+-]?\d+([.,]\d+)?", re.ASCII)
_nfc = functools.partial(unicodedata.normalize, "NFC")


def read(
    path: str,
    names: Iterable[str],
    where: str,
    *,
    classes: int = 2,
    several: bool = False,
    predicted: bool = False,
) -> dict[str, str]:
    """Reads the labels of images from a CSV file, and notes what is not taken as it is written.

    Args:
      path: the file, local or gs://.
      names, where: the names of all images, relative to their folder, and the folder.
      classes: the smallest number of classes; with 0 there may be no label.
      several: whether an image may have several labels, as `a;b`, or ';' for none of them. Without a column
        `label`, every column but `name` is a class then, with 1 or 0.
      predicted: whether predictions.csv may be the file; the `truth` of an image goes before its prediction.

    Returns:
      {name: label}, in the file's order, of the rows with a label; several are sorted, as in `split`.

    Raises:
      UserError: the file cannot be read, lacks a column, names images that are not there, gives an image
        two labels, or has too few classes; the message names the rows. Or it holds predictions.
    """
    name_of, tiles_of = _by_spelling(names)
    match, file = _matcher(name_of, where), f"dataset.labels={escape(path)}"
    label_of, row_of, wrong, respelt, missing = {}, {}, {}, {}, []
    holds_predictions = files.holds_predictions(path)
    rows = list(_rows(path, several=several, predicted=holds_predictions))
    if holds_predictions:
        if not predicted:
            raise UserError(
                f"{file} holds predictions: give a file of labels; finetune learns from predictions"
            )
        say_once(
            f"note: labels: {escape(path)} holds predictions, which count as labels where there is no truth: "
            "scores on them tell agreement with their classifier, not accuracy"
        )
    for row, spelling, label in rows:
        label = ";".join(sorted(split(label))) or ";" if several and label else label
        where_row, fitting = f"{file}, row {row}: {escape(spelling)!r} is {escape(label)!r}", match(spelling)
        if len(fitting) != 1:
            wrong.setdefault(spelling, row)
            continue
        name = name_of[fitting[0]]
        if _nfc(spelling.removeprefix("./")) != _nfc(fitting[0]):
            respelt[spelling] = f"{escape(spelling)!r} for {escape(name)!r}"
        if label in _MISSING:
            missing.append(label)
        elif _ERROR.fullmatch(label):
            raise UserError(f"{where_row}, the error of a formula: type the label as text")
        elif label_of.get(name, label) != label:
            other = f"{escape(label_of[name])!r} in row {row_of[name]}"
            raise UserError(f"{where_row} here, but {other}: keep one of the two")
        elif label:
            label_of[name], row_of[name] = label, row
    if wrong:
        raise UserError(f"{file}, {_describe(wrong, len(rows), match, min(name_of), where)}")
    if missing:
        text = f"{len(missing)} rows with {first_few(set(missing))} have no label, as pandas and R write it"
        say_once(f"note: labels: {escape(path)}: {text}; call a class otherwise")
    if respelt:
        text = f"{len(respelt)} names are taken for others: {first_few(respelt.values())}"
        say_once(f"note: labels: {escape(path)}: {text}")
    labels = set(label_of.values())
    if not labels and classes:
        raise UserError(f"{file}: no row has a label: fill in the column label")
    if len(labels) < classes:
        raise UserError(
            f"{file}: {len(label_of)} labels, all {escape(labels.pop())!r}: expected at least {classes} "
            "classes; label images of another class, too"
        )
    return _of_tiles(label_of, tiles_of)


def read_column(path: str, column: str, names: Iterable[str], where: str) -> dict[str, str]:
    """Reads another column than `label`; returns {name: its text} of the names that fit an image."""
    name_of, tiles_of = _by_spelling(names)
    match, rows = _matcher(name_of, where), _rows(path, ("name", column))
    texts = {
        name_of[fit]: text for _, spelling, text in rows if len(fits := match(spelling)) == 1 for fit in fits
    }
    return _of_tiles(texts, tiles_of)


def _by_spelling(names):
    """Returns {name in text: name} of images and of the files of tiles; and {file: its tiles}."""
    names, tiles_of = list(names), collections.defaultdict(list)
    for name in names:
        if (file := tiles.file_of(name)) != name:
            tiles_of[file].append(name)
    # Bytes that are no text are escaped, as in the names that `embed` writes.
    known = {name.encode("utf-8", "backslashreplace").decode(): name for name in (*names, *tiles_of)}
    return known, tiles_of


def _of_tiles(text_of, tiles_of):
    """Gives the texts of files to all their tiles, but for those with texts of their own."""
    spread = {tile: text for name, text in text_of.items() for tile in tiles_of.get(name, [name])}
    return spread | {name: text for name, text in text_of.items() if name in spread}


def update(path: str, changes: dict[str, str], names: Iterable[str], where: str) -> None:
    """Writes labels into a CSV file, in one piece; its other rows and columns stay.

    Args:
      path: the file, which is made where it is not there.
      changes: {name: label} of images, '' for none.
      names, where: the names of all images, relative to their folder, and the folder.
    """
    is_there = files.exists(path)
    head, columns, _, lines = _table(path) if is_there else (["name", "label"], (0, 1), {}, [])
    match, missing = _matcher(_by_spelling(names)[0], where), dict(changes)
    for _, cells in lines:
        for fitting in match(cells[columns[0]]):
            if fitting in changes:
                cells[columns[1]] = changes[fitting]
                missing.pop(fitting, None)
    for name, label in missing.items():
        cells = dict(zip(columns, (files.csv_name(name), label)))
        lines.append((0, [cells.get(number, "") for number in range(len(head))]))
    files.write_csv(path, [head, *(cells for _, cells in lines)])


def read_weights(path: str, class_names: tuple[str, ...]) -> np.ndarray:
    """Reads a CSV file with the columns `class` and `weight`; returns the weight of each class, [classes].

    Raises:
      UserError: a class is unknown, missing or there twice, or a weight is no positive number.
    """
    setting, weight_of = f"class_weights={escape(path)}", {}
    for row, name, text in _rows(path, ("class", "weight"), "class_weights"):
        if name.strip() not in class_names or name.strip() in weight_of:
            fault = "is there twice" if name.strip() in weight_of else "is no class"
            raise UserError(
                f"{setting}, row {row}: {escape(name)!r} {fault}: write one row for each of "
                f"{first_few(map(escape, class_names))}"
            )
        if not _NUMBER.fullmatch(text) or not float(text.replace(",", ".")) > 0:
            raise UserError(f"{setting}, row {row}: the weight is {escape(text)!r}: expected one above 0")
        weight_of[name.strip()] = float(text.replace(",", "."))
    if missing := [name for name in class_names if name not in weight_of]:
        raise UserError(f"{setting} has no row for {first_few(map(escape, missing))}: add its weight")
    return np.array([weight_of[name] for name in class_names])


def split(label: str) -> set[str]:
    """Returns the classes in `a;b`."""
    return {part.strip() for part in label.split(";")} - {""}


def notes(label_of: dict[str, str], several: bool = False) -> list[str]:
    """Returns what is odd about the classes of {name: label}; `several` as in `read`."""
    classes = sorted(set(label_of.values()))
    classes = sorted(set().union(*map(split, classes))) if several else classes
    lines = [f"{pair} are two classes" for pair in similar_classes(classes)]
    if joined := [name for name in classes if len(split(name)) > 1]:
        lines.append(
            f"{first_few(map(escape, joined))} are classes by themselves: "
            "--config.dataset.several_labels=True takes them as several labels"
        )
    are_numbers = all(map(_NUMBER.fullmatch, classes))
    # Fewer labels may well be the first ones of many classes.
    if len(label_of) >= 20 and len(classes) > (0.5 if are_numbers else 0.8) * len(label_of):
        kind = "measurements" if are_numbers else "names"
        remedy = "give many images the same label, as in small and large"
        lines.append(f"{len(label_of)} images have {len(classes)} labels, which look like {kind}: {remedy}")
    for label in classes:
        for page, text in itertools.islice(_repairs(label), 1):
            lines.append(f"{escape(label)!r} looks like {escape(text)!r}, UTF-8 read as {page}: {_ANEW}")
    return [f"labels: {line}" for line in lines]


def similar_classes(classes: Iterable[str]) -> list[str]:
    """Returns 'cat and Cat' for classes that look alike, or are the same number, most likely by mistake."""
    by_form = {}
    for name in sorted(classes):
        form = "".join(_trim(unicodedata.normalize("NFKC", name)).casefold().split())
        form = float(form.replace(",", ".")) if _NUMBER.fullmatch(form) else form
        # Two forms of an accent look the same, unless they are escaped.
        by_form.setdefault(form, []).append(repr(escape(name)) if name == _nfc(name) else ascii(name))
    return [" and ".join(pair) for names in by_form.values() for pair in itertools.pairwise(names)]


def _trim(text):
    """Returns a text without invisible characters, and without blanks and quotes around it."""
    return "".join(c for c in _nfc(text) if unicodedata.category(c) != "Cf").strip().strip("'")


def _matcher(names, folder):
    """Returns a function from the spelling of a name to the names that fit: the very one, or similar ones."""
    folder = os.path.join(os.path.abspath(folder) if files.is_local(folder) else folder, "")
    base = f"/{os.path.basename(folder[:-1])}/"  # Paths of other machines have it, too.
    alike, alike_but_type = collections.defaultdict(list), collections.defaultdict(list)
    for name in names:
        form = _trim(name).replace("\\", "/").casefold()
        alike[form].append(name)
        stem, kind = os.path.splitext(form)
        alike_but_type[stem + "".join(kind.partition("#")[1:])].append(name)

    def match(spelling):
        if (name := spelling.removeprefix("./")) in names:
            return [name]
        path = _trim(spelling).replace("\\", "/")
        inside = path.removeprefix(folder) if path.startswith(folder) else f"/{path}".partition(base)[2]
        path = os.path.normpath(inside or path)
        form = _trim(path).casefold()
        fitting = alike.get(form) or alike_but_type.get(form, [])
        return [name for name in fitting if _nfc(name) == path] or fitting

    return match


def _describe(wrong, count, match, example, where):
    """Returns what is wrong with {spelling: row} of names, of `count` rows, and the remedies."""

    def remedy(spelling):
        page, _ = next(_repairs(spelling), ("another code page" if "\ufffd" in spelling else None, ""))
        if page:
            return f"accents look like UTF-8 read as {page}: {_ANEW}"
        if _ERROR.match(spelling):
            return "a spreadsheet took names for formulas: write ./ in front of them, as in ./-1.jpg"
        if fitting := match(spelling):
            return f"{first_few(map(escape, fitting))} fit: write the whole name"
        if files.is_local(where) and os.path.isfile(os.path.join(where, spelling)):
            return "there, but damaged or left out: take the row out"
        return (
            f"write names relative to that folder, as in {escape(example)!r}, copy new images into it, or "
            "take the row out"
        )

    rows = [f"row {row}: {escape(spelling)!r}" for spelling, row in wrong.items()]
    remedies = collections.Counter(map(remedy, wrong)).most_common(3)
    if len(wrong) == 1:
        return f"{rows[0]} is no image of {escape(where)}: {remedies[0][0]}"
    text = f"{len(wrong)} of {count} names are no images of {escape(where)}, as {', '.join(rows[:3])}"
    return f"{text}; {'; '.join(f'{number} of them: {advice}' for advice, number in remedies)}"


def _repairs(text):
    """Yields (code page, text as it was) for a text of UTF-8 that may have been read in another code page."""
    for page, title in _CODE_PAGES.items():
        with suppress(UnicodeError):  # Bytes that a code page lacks are read as controls.
            original = b"".join(c.encode("latin-1" if c < "\xa0" else page) for c in text).decode()
            if original != text:
                yield title, original


def _rows(path, titles=("name", "label"), setting="dataset.labels", several=False, predicted=False):
    """Yields (number of the row in the file, name, label without blanks around it) of rows that hold any.

    `several` joins the columns of classes, where there is no column of labels, as in `a;b`. In a file of
    predictions, as `predicted` says, the column `truth` goes before the label.
    """
    head, columns, class_of, lines = _table(path, titles, setting, several)
    present = [cell.strip().casefold() for cell in head]
    truth = present.index("truth") if predicted and "truth" in present else None
    for row, cells in lines:
        name, label = (cells[number] for number in columns)
        if truth is not None and cells[truth].strip() not in ("", *_MISSING):
            label = cells[truth]
        label = _join(cells, class_of, f"{setting}={escape(path)}, row {row}") if class_of else label
        if name.strip() or label.strip():
            yield row, name, label.strip()


def _table(path, titles=("name", "label"), setting="dataset.labels", several=False):
    """Returns the first row, numbers of two columns, {number: class}, and (number, cells) of other rows."""
    text = _text(path, setting, titles)
    hint = re.match(r'"?sep=(.)"?[,;\t]*\r?\n', text, re.IGNORECASE)  # Spreadsheets take and leave it out.
    text = text[hint.end() :] if hint else text
    header = text.lstrip("\n").partition("\n")[0]
    delimiter = hint[1] if hint else max(",;\t|", key=header.count)
    head, columns, class_of, lines, inner, row = [], None, {}, [], None, 0
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        for row, cells in enumerate(reader, 2 if hint else 1):
            if columns is None and len(filled := list(filter(str.strip, cells))) == 1:
                inner = max(",;\t|", key=filled[0].count)  # Each line is quoted as a whole.
            if inner:
                cells = next(csv.reader(cells[:1], delimiter=inner, strict=True), [])
            if columns is not None:
                lines.append((row, cells + [""] * (len(head) - len(cells))))
            elif any(map(str.strip, cells)):
                present = [cell.strip().casefold() for cell in cells]
                if several and present.count("name") == 1 and "label" not in present:
                    class_of = {
                        i: cell.strip() for i, cell in enumerate(cells) if present[i] not in ("name", "")
                    }
                    titles = ("name", "name")
                if missing := [title for title in titles if present.count(title) != 1]:
                    raise UserError(
                        f"{setting}={escape(path)}: its first row is {first_few(map(escape, cells))}: "
                        f"expected one column {' and one '.join(missing)}, as in {','.join(titles)}"
                    )
                head, columns = cells, [present.index(title) for title in titles]
    except csv.Error as error:
        where_row = f"{setting}={escape(path)}, row {row + 1}"
        raise UserError(f"{where_row}: {error}; save it as CSV again") from None
    if columns is None:
        hint = "; python -m simclr_jax.evaluation.suggest writes such a file" * (titles[0] == "name")
        raise UserError(
            f"{setting}={escape(path)} is empty: expected a row {','.join(titles)} and one for each "
            f"{'image' if hint else 'class'}{hint}"
        )
    return head, columns, class_of, lines


def _join(cells, class_of, where):
    """Returns the classes whose columns, {number: class}, have a 1, as in `a;b`; '' where all are empty."""
    values = {name: cells[i].strip() for i, name in class_of.items()}
    if wrong := [f"{name} is {value!r}" for name, value in values.items() if value not in ("", "0", "1")]:
        raise UserError(
            f"{where}: {escape(wrong[0])}: expected 1 or 0 in the column of a class; or write a column "
            "label, as a;b"
        )
    return ";".join(name for name, value in values.items() if value == "1") or ";" * any(values.values())


def _text(path, setting, titles):
    try:
        contents = epath.Path(path).expanduser().read_bytes()
    except OSError as error:
        raise UserError(
            f"{setting}={escape(path)} cannot be read ({reason_of(error)}): set "
            f"--config.{setting} to a CSV file with the columns {' and '.join(titles)}"
        ) from None
    try:
        text = contents.decode(_ENCODINGS.get(contents[:2], "utf-8-sig"))
    except UnicodeDecodeError as error:
        row = contents[: error.start].count(b"\n") + 1
        where_row = f"{setting}={escape(path)}, row {row}"
        remedy = f"save it as 'CSV UTF-8' if its accents look right in the spreadsheet; if not, {_ANEW}"
        raise UserError(f"{where_row} is no UTF-8: {remedy}") from None
    if "\0" in text:
        raise UserError(f"{setting}={escape(path)} is no text: save it as 'CSV UTF-8'")
    return text
