"""Labels by CSV, `--config.dataset.labels=FILE.csv`: a row an image, with the columns `name` and `label`.

Files of `simclr_jax.evaluation.suggest` and of spreadsheets may have more columns, rows without a label,
semicolons or tabs in place of commas, and a byte order mark.
"""

import csv
import io
import unicodedata
from collections.abc import Iterable

from etils import epath

from simclr_jax.process import UserError, escape, first_few, reason_of

_ENCODINGS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}  # Spreadsheets mark "Unicode text" so.


def read(path: str, names: Iterable[str], where: str, *, classes: int = 2) -> dict[str, str]:
    """Reads the labels of images from a CSV file.

    Args:
      path: the file, local or gs://.
      names: the names of all images, relative to their folder.
      where: the folder itself, for messages.
      classes: the smallest number of classes.

    Returns:
      {name: label}, in the file's order, of the rows with a label.

    Raises:
      UserError: the file cannot be read, lacks a column, names an image that is not there, gives an image
        two labels, or has too few classes; the message names the row.
    """
    # Bytes that are no text are escaped, as in the names that `embed` writes.
    name_of = {_normalize(name.encode("utf-8", "backslashreplace").decode()): name for name in names}
    label_of, row_of = {}, {}
    for row, spelling, label in _rows(path):
        where_row = f"dataset.labels={escape(path)}, row {row}: {escape(spelling)!r}"
        if not spelling and not label:
            continue
        name = name_of.get(_normalize(spelling))
        if name is None:
            raise UserError(
                f"{where_row} is no image of {escape(where)}: write names relative to that folder, as in "
                f"{escape(min(name_of.values()))!r}, or take the row out"
            )
        if not label:
            continue
        if label_of.get(name, label) != label:
            raise UserError(
                f"{where_row} is {escape(label)!r} here, but {escape(label_of[name])!r} in row "
                f"{row_of[name]}: keep one of the two"
            )
        label_of[name], row_of[name] = label, row
    labels = set(label_of.values())
    if not labels:
        raise UserError(f"dataset.labels={escape(path)}: no row has a label: fill in the column label")
    if len(labels) < classes:
        raise UserError(
            f"dataset.labels={escape(path)}: {len(label_of)} labels, all {escape(labels.pop())!r}: expected "
            f"at least {classes} classes; label images of another class, too"
        )
    return label_of


def similar_classes(classes: Iterable[str]) -> list[str]:
    """Returns 'cat and Cat' for classes that differ in case or spaces alone, most likely by mistake."""
    by_form = {}
    for name in sorted(classes):
        by_form.setdefault("".join(name.casefold().split()), []).append(name)
    return [" and ".join(map(repr, map(escape, names))) for names in by_form.values() if len(names) > 1]


def _rows(path):
    """Yields (number of the row in the file, name, label) without spaces around name and label."""
    text = _text(path)
    header, _, _ = text.lstrip("\n").partition("\n")
    delimiter = max(",;\t", key=header.count)
    columns, row = None, 0
    try:
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        for row, line in enumerate(lines, 1):
            cells = [cell.strip() for cell in line]
            if columns is not None:
                yield row, *(cells[column] if column < len(cells) else "" for column in columns)
            elif any(cells):
                titles = [cell.casefold() for cell in cells]
                if missing := [title for title in ("name", "label") if titles.count(title) != 1]:
                    raise UserError(
                        f"dataset.labels={escape(path)}: its first row is {first_few(map(escape, cells))}: "
                        f"expected one column {' and one '.join(missing)}, as in name,label"
                    )
                columns = [titles.index(title) for title in ("name", "label")]
    except csv.Error as error:
        where_row = f"dataset.labels={escape(path)}, row {row + 1}"
        raise UserError(f"{where_row}: {error}; save it as CSV again") from None
    if columns is None:
        raise UserError(
            f"dataset.labels={escape(path)} is empty: expected a row name,label and one for each image; "
            "python -m simclr_jax.evaluation.suggest writes such a file"
        )


def _text(path):
    try:
        contents = epath.Path(path).read_bytes()
    except OSError as error:
        raise UserError(
            f"dataset.labels={escape(path)} cannot be read ({reason_of(error)}): set "
            "--config.dataset.labels to a CSV file with the columns name and label"
        ) from None
    try:
        text = contents.decode(_ENCODINGS.get(contents[:2], "utf-8-sig"))
    except UnicodeDecodeError as error:
        row = contents[: error.start].count(b"\n") + 1
        where_row = f"dataset.labels={escape(path)}, row {row}"
        raise UserError(f"{where_row} is no UTF-8: save it as 'CSV UTF-8'") from None
    if "\0" in text:
        raise UserError(f"dataset.labels={escape(path)} is no text: give a CSV file")
    return text


def _normalize(name):
    """Returns a name without './' at its begin, in the one form of Unicode that all names are compared in."""
    return unicodedata.normalize("NFC", name.removeprefix("./"))
