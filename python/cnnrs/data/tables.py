"""Photos and their labels as tables have them: a CSV file, or a data frame of pandas or polars."""

from __future__ import annotations

import csv
import io
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnnrs.data.photos import ENDINGS

_PATHS = {"path", "file", "filename", "filepath", "image", "imagepath", "imagefile", "imagename", "img", "photo"}
_LABELS = {"label", "labels", "class", "classname", "category", "species", "target", "y", "tag", "tags"}
_YES_NO = {"0": 0, "0.0": 0, "false": 0, "1": 1, "1.0": 1, "true": 1}
# With more numbers than this, most of them for one photo or two, they measure something.
_MOST_NUMBERS = 20


@dataclass(frozen=True)
class Table:
    """Columns of cells, as text.

    Attributes:
        name: what messages call it.
        columns: their names.
        rows: one list of cells per row.
        places: what messages call a row: "line 7", "row 5".
        folder: what relative paths begin at.
    """

    name: str
    columns: list[str]
    rows: list[list[str]]
    places: list[str]
    folder: str

    def column(self, name: str) -> list[str]:
        """The cells of a column."""
        at = self.columns.index(name)
        return [row[at] for row in self.rows]


@dataclass(frozen=True)
class Labelled:
    """What a table says of photos.

    Attributes:
        paths: of files that are there.
        labels: the class number of each, or the numbers of its classes where a photo may have several.
        classes: names by number.
        extra: the cells of another column, if one was asked for.
    """

    paths: list[str]
    labels: Sequence[int | tuple[int, ...]]
    classes: list[str]
    extra: list[str] | None


def read_csv(file: str | os.PathLike[str]) -> Table:
    """A CSV file in UTF-8 whose first line names the columns, separated by commas, semicolons or tabs.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such table; says in which line.
    """
    path = Path(file)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 (byte {error.start} is 0x{error.object[error.start]:02x}): save it as CSV UTF-8"
        ) from None
    first = text.lstrip("\r\n").partition("\n")[0]
    separator = max(",;\t", key=lambda one: len(next(csv.reader([first], delimiter=one), [])))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    columns: list[str] = []
    rows, places = [], []
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if not columns:
                columns = [cell.strip() for cell in cells]
                continue
            if len(cells) != len(columns):
                raise ValueError(
                    f"{path}, line {reader.line_num}: {len(cells)} cells, but {len(columns)} columns in the first line "
                    f"({', '.join(columns)}); a cell with {separator!r} in it is quoted"
                )
            rows.append(cells)
            places.append(f"line {reader.line_num}")
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
    return _checked(Table(str(path), columns, rows, places, os.path.dirname(path)))


def of_frame(frame: Any) -> Table:
    """A data frame, whose library nobody needs here: it has ``columns``, and ``frame[name]`` is one.

    Raises:
        TypeError: it is none.
    """
    if not hasattr(frame, "columns") or not hasattr(frame, "__getitem__"):
        raise TypeError(f"a data frame (of pandas or polars) is wanted, got a {type(frame).__name__}")
    columns = list(frame.columns)
    # Both would come by the name of one.
    _check_names("the data frame", list(map(str, columns)))
    cells = [[_text(cell) for cell in list(frame[name])] for name in columns]
    # As in a file, rows without anything are no rows.
    numbered = [(i, list(row)) for i, row in enumerate(zip(*cells, strict=True)) if any(row)]
    rows, places = [row for _, row in numbered], [f"row {i}" for i, _ in numbered]
    return _checked(Table("the data frame", list(map(str, columns)), rows, places, ""))


def photos_of(
    table: Table,
    path_column: str | None,
    label_column: str | Sequence[str] | None,
    separator: str | None,
    extra_column: str | None,
    root: str | os.PathLike[str] | None,
) -> Labelled:
    """The photos of a table; see :meth:`cnnrs.ImageList.from_csv`.

    Raises:
        FileNotFoundError: photos are not there.
        ValueError: a column is unclear or not there, a label is missing, or labels are no classes.
    """
    several = label_column is not None and not isinstance(label_column, str)
    named = list(label_column or []) if several else [label_column] if isinstance(label_column, str) else []
    for name in [path_column, *named, extra_column]:
        if name is not None and name not in table.columns:
            raise ValueError(f"{table.name} has no column {name!r}; it has {', '.join(map(repr, table.columns))}")
    if several and separator is not None:
        raise ValueError("label_column=[...] are columns of 0 and 1, separator= cuts the cells of one column: give one")
    path_column = path_column if path_column is not None else _path_column(table, named)
    if several:
        labels: Any = _yes_no(table, named)
        classes = named
    else:
        label = named[0] if named else _label_column(table, path_column, extra_column)
        cells = [cell.strip() for cell in table.column(label)]
        labels, classes = _listed(cells, separator) if separator is not None else _named(table, cells)
    extra = None if extra_column is None else table.column(extra_column)
    return _once(table, Labelled(_paths(table, path_column, root), labels, classes, extra))


# -- columns -------------------------------------------------------------------------------------------------


def _check_names(table: str, columns: Sequence[str]) -> None:
    if twice := [name for name in columns if columns.count(name) > 1]:
        raise ValueError(f"{table} has two columns {twice[0]!r}")


def _checked(table: Table) -> Table:
    if not table.rows:
        raise ValueError(f"{table.name} has no rows")
    _check_names(table.name, table.columns)
    if any(_is_photo(name) for name in table.columns):
        raise ValueError(
            f"the first line of {table.name} must name the columns, as in path,label; it is {','.join(table.columns)}"
        )
    return table


def _path_column(table: Table, taken: Sequence[str]) -> str:
    found = _known(table, _PATHS, taken)
    if len(found) != 1:
        left = found or [name for name in table.columns if name not in taken]
        found = [name for name in left if all(_is_photo(cell) for cell in table.column(name))]
    if len(found) != 1:
        raise ValueError(f"which column of {table.name} holds the photos: {_or(table.columns)}? Give path_column=")
    return found[0]


def _label_column(table: Table, path_column: str, extra_column: str | None) -> str:
    others = [name for name in table.columns if name not in (path_column, extra_column)]
    found = _known(table, _LABELS, [name for name in table.columns if name not in others])
    if len(found) != 1 and len(others) == 1:
        found = others
    if len(found) != 1:
        raise ValueError(
            f"which column of {table.name} holds the labels: {_or(found or others)}? Give label_column=, or the list "
            "of several columns of 0 and 1"
            if others
            else f"{table.name} has no column for labels beside {path_column!r}"
        )
    return found[0]


def _known(table: Table, names: set[str], taken: Sequence[str]) -> list[str]:
    return [name for name in table.columns if name not in taken and re.sub(r"[\s_-]", "", name).casefold() in names]


def _is_photo(name: str) -> bool:
    return name.rstrip().lower().endswith(ENDINGS)


def _or(names: Sequence[str]) -> str:
    return " or ".join(map(repr, names))


# -- labels --------------------------------------------------------------------------------------------------


def _named(table: Table, cells: list[str]) -> tuple[list[int], list[str]]:
    """One class per photo; whole numbers are classes in the order of the numbers."""
    if empty := [i for i, cell in enumerate(cells) if not cell]:
        raise ValueError(
            f"{table.name}: {_number(len(empty), 'photo has', 'photos have')} no label, the first in "
            f"{table.places[empty[0]]}; fill it in, or leave the photo out"
        )
    names = set(cells)
    numbers = [_float(name) for name in names]
    if None not in numbers and _are_measurements(numbers, len(cells)):  # type: ignore[arg-type]
        shown = ", ".join(dict.fromkeys(cells[:3]))
        raise ValueError(
            f"the labels of {table.name} are measurements ({shown}, ...), not classes: cnnrs tells classes apart, it "
            "fits no regression targets; make ranges of them, such as 'young' and 'old', or fit them with cnnrs.fit "
            "and F.mse_loss"
        )
    if None not in numbers:
        # Data frames make 1.0 of 1 where a number is missing.
        cells = [re.sub(r"\.0*$", "", cell) for cell in cells]
        classes = sorted(set(cells), key=lambda name: (float(name), name))
    else:
        classes = sorted(names)
    numbered = {name: i for i, name in enumerate(classes)}
    return [numbered[cell] for cell in cells], classes


def _are_measurements(numbers: Sequence[float], rows: int) -> bool:
    """Whether different numbers are no names of classes: fractions, or nearly as many of them as photos."""
    if not all(math.isfinite(one) and one == int(one) for one in numbers):
        return True
    return len(numbers) > _MOST_NUMBERS and 2 * len(numbers) > rows


def _listed(cells: list[str], separator: str) -> tuple[list[tuple[int, ...]], list[str]]:
    """Any number of classes per photo, in one cell."""
    if not separator:
        raise ValueError('separator must be what stands between two labels, such as "|", got ""')
    found = [{name.strip() for name in cell.split(separator)} - {""} for cell in cells]
    classes = sorted(set().union(*found))
    numbered = {name: i for i, name in enumerate(classes)}
    return [tuple(sorted(numbered[name] for name in names)) for names in found], classes


def _yes_no(table: Table, columns: Sequence[str]) -> list[tuple[int, ...]]:
    """Any number of classes per photo, one column of 0 and 1 for each."""
    if not columns:
        raise ValueError("label_column=[] names no column: give those of 0 and 1, one per class")
    found: list[list[int]] = [[] for _ in table.rows]
    for number, name in enumerate(columns):
        for row, cell in enumerate(table.column(name)):
            value = _YES_NO.get(cell.strip().casefold())
            if value is None:
                raise ValueError(
                    f"{table.name}, {table.places[row]}: column {name!r} must hold 0 or 1, as every column of "
                    f"label_column=[...], got {cell!r}"
                )
            if value:
                found[row].append(number)
    return list(map(tuple, found))


def _float(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def _text(cell: Any) -> str:
    """A cell of a data frame as a CSV file would have it; "" for what is missing."""
    if not isinstance(cell, str) and hasattr(cell, "__len__"):
        raise TypeError(
            f"a cell holds a {type(cell).__name__}, and one label or path per cell is wanted: several labels are "
            "columns of 0 and 1, label_column=[...], or joined, as in frame[name].str.join('|') with separator='|'"
        )
    # A class may be called nan.
    if cell is None or (not isinstance(cell, str) and str(cell) in ("nan", "<NA>", "NaT")):
        return ""
    return str(cell)


# -- paths ---------------------------------------------------------------------------------------------------


def _paths(table: Table, column: str, root: str | os.PathLike[str] | None) -> list[str]:
    """Every photo where it is: relative paths in ``root`` if it is given, or else in the table's folder."""
    folders = [*([] if root is None else [os.path.expanduser(root)]), table.folder]
    found, missing = [], []
    for row, cell in enumerate(table.column(column)):
        name = cell.strip()
        # Names may begin or end with spaces, and tables may come from Windows. An absolute path stays itself.
        spelled = dict.fromkeys((cell, name, name.replace("\\", "/")))
        places = [os.path.join(folder, one) for folder in folders for one in spelled]
        place = next(filter(os.path.isfile, places), None) if name else None
        if place is None:
            missing.append(row)
        else:
            found.append(place)
    if missing:
        first = table.column(column)[missing[0]]
        where = " and ".join(map(repr, (os.path.abspath(folder) for folder in folders)))
        raise FileNotFoundError(
            f"{table.name}: {_number(len(missing), 'photo is', 'photos are')} not there, of {len(table.rows):,}; the "
            f"first is {first!r} in {table.places[missing[0]]}, looked for in {where}; give root= the folder that the "
            "paths begin at"
        )
    return found


def _once(table: Table, found: Labelled) -> Labelled:
    """Equal rows once; the same photo with other labels is an error."""
    first: dict[str, int] = {}
    seen, kept = set(), []
    for row, (path, label) in enumerate(zip(found.paths, found.labels, strict=True)):
        # The same, however often it goes to the folder that it is in.
        key = str(Path(path))
        other = first.setdefault(key, row)
        if found.labels[other] != label:
            raise ValueError(
                f"{table.name}: {path!r} is in {table.places[other]} and, with another label, in {table.places[row]}; "
                "a photo has one row: several labels are joined in one cell, separator='|', or columns of 0 and 1, "
                "label_column=[...]"
            )
        cells = (key, None if found.extra is None else found.extra[row])
        if cells not in seen:
            seen.add(cells)
            kept.append(row)
    extra = None if found.extra is None else [found.extra[row] for row in kept]
    return Labelled([found.paths[row] for row in kept], [found.labels[row] for row in kept], found.classes, extra)


def _number(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"
