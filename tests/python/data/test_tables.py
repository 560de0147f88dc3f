"""Photos of CSV files and data frames: which columns, which labels, and what is said of the others."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import picture

from cnnrs import ImageList

pandas = pytest.importorskip("pandas")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six photos in a folder of their own."""
    (tmp_path / "photos").mkdir()
    for i in range(6):
        picture(20, 30, i).save(tmp_path / "photos" / f"{i}.jpg")
    return tmp_path


def write(place: Path, text: str, name: str = "labels.csv", encoding: str = "utf-8") -> Path:
    (place / name).write_bytes(text.encode(encoding))
    return place / name


def table(place: Path, header: str, labels: list[str], **options: Any) -> Path:
    """A row per photo."""
    rows = [f"photos/{i}.jpg,{label}" for i, label in enumerate(labels)]
    return write(place, "\n".join([header, *rows]) + "\n", **options)


NAMES = ["wren", "tit", "wren", "owl", "tit", "wren"]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_table_is_read_as_the_csv_module_reads_it(photos: Path, separator: str, ending: str, encoding: str) -> None:
    names = ["wren, house", "tit", "a;b", 'the "owl"', "猫", "two\nlines"]
    path = photos / "labels.csv"
    with open(path, "w", newline="", encoding=encoding) as file:
        writer = csv.writer(file, delimiter=separator, lineterminator=ending)
        writer.writerow(["file name", "species"])
        writer.writerows([f"photos/{i}.jpg", name] for i, name in enumerate(names))
        writer.writerow(["", ""])
    data = ImageList.from_csv(path)
    assert data.classes == sorted(names)
    assert [(path, data.classes[number]) for path, number in data.samples] == [
        (str(photos / "photos" / f"{i}.jpg"), name) for i, name in enumerate(names)
    ]
    frame = pandas.read_csv(path, sep=separator, encoding=encoding)
    assert ImageList.from_frame(frame, root=photos).samples == data.samples


@pytest.mark.parametrize(
    "header", ["path,label", "Image,CLASS", "file_name,target", "Img,y", "what,species", "path,what"]
)
def test_usual_names_and_the_only_possibility(photos: Path, header: str) -> None:
    assert ImageList.from_csv(table(photos, header, NAMES)).targets == [2, 1, 2, 0, 1, 2]


def test_columns_may_be_named(photos: Path) -> None:
    rows = "\n".join(f"{i},photos/{i}.jpg,{name},{i % 2}" for i, name in enumerate(NAMES))
    path = write(photos, f"label,where,bird,site\n{rows}\n")
    with pytest.raises(ValueError, match=r"has no column 'birds'; it has 'label', 'where', 'bird', 'site'"):
        ImageList.from_csv(path, label_column="birds")
    data = ImageList.from_csv(path, path_column="where", label_column="bird", extra_column="site")
    assert [data.classes[i] for i in data.targets] == NAMES and data.extra == ["0", "1", "0", "1", "0", "1"]
    assert [part.extra for part in data.split(0.5)] == [
        [(path.removesuffix(".jpg")[-1:] in "135" and "1") or "0" for path, _ in part.samples]
        for part in data.split(0.5)
    ]


def test_unclear_columns_are_listed(photos: Path) -> None:
    path = write(photos, "a,b,label\nphotos/0.jpg,photos/1.jpg,x\n")
    with pytest.raises(
        ValueError, match=r"which column of .*labels.csv holds the photos: 'a' or 'b' or 'label'\? Give"
    ):
        ImageList.from_csv(path)
    path = write(photos, "path,a,b\nphotos/0.jpg,x,y\n")
    with pytest.raises(ValueError, match=r"holds the labels: 'a' or 'b'\? Give label_column=, or the list of several"):
        ImageList.from_csv(path)
    path = write(photos, "path,label,class\nphotos/0.jpg,x,y\n")
    with pytest.raises(ValueError, match=r"holds the labels: 'label' or 'class'\?"):
        ImageList.from_csv(path)
    with pytest.raises(ValueError, match="no column for labels beside 'path'"):
        ImageList.from_csv(write(photos, "path\nphotos/0.jpg\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no rows"),
        ("path,label\n", "has no rows"),
        (
            "photos/0.jpg,wren\nphotos/1.jpg,tit\n",
            "the first line of .* must name the columns, as in path,label; it is",
        ),
        (
            "path,label\nphotos/0.jpg,a,b\n",
            "line 2: 3 cells, but 2 columns in the first line .path, label.; a cell with ','",
        ),
        ("path,path\n1,2\n", "has two columns 'path'"),
        ("path,label\nphotos/0.jpg,a\nphotos/1.jpg,\nphotos/2.jpg, \n", "2 photos have no label, the first in line 3"),
    ],
)
def test_what_is_no_table(photos: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageList.from_csv(write(photos, text))


def test_other_encodings_are_said(photos: Path) -> None:
    path = table(photos, "path,label", ["Käuzchen"] * 6, encoding="latin-1")
    with pytest.raises(ValueError, match=r"is not UTF-8 \(byte 25 is 0xe4\): save it as CSV UTF-8"):
        ImageList.from_csv(path)


# -- paths -------------------------------------------------------------------------------------------------------------


def test_paths_begin_at_the_table_or_at_root(
    photos: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    text = f"path,label\nphotos/0.jpg,a\n{photos}/photos/1.jpg,b\n"
    assert [path for path, _ in ImageList.from_csv(write(photos, text)).samples] == [
        f"{photos}/photos/0.jpg", f"{photos}/photos/1.jpg",
    ]  # fmt: skip
    path = write(elsewhere, text)
    with pytest.raises(
        FileNotFoundError, match=r"1 photo is not there, of 2; the first is 'photos/0.jpg' in line 2, .*"
    ):
        ImageList.from_csv(path)
    assert len(ImageList.from_csv(path, root=photos)) == 2
    monkeypatch.chdir(photos)
    write(photos, text)
    assert ImageList.from_csv("labels.csv").samples[0][0] == "photos/0.jpg"
    # As a spreadsheet on Windows has them.
    path = write(photos, "path,label\nphotos\\2.jpg,a\n photos/3.jpg ,b\n")
    assert [os.path.basename(path) for path, _ in ImageList.from_csv(path).samples] == ["2.jpg", "3.jpg"]
    for gone in ("", "photos/6.jpg"):
        with pytest.raises(FileNotFoundError, match=f"the first is '{gone}' in line 3, looked for in '{photos}'"):
            ImageList.from_csv(write(photos, f"path,label\nphotos/0.jpg,a\n{gone},b\nnone.jpg,b\n"))


def test_root_comes_before_the_folder_of_the_table(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "photos").mkdir()
    (elsewhere / "photos" / "0.jpg").touch()
    path = table(photos, "path,label", ["a", "b"])
    wanted = [f"{elsewhere}/photos/0.jpg", f"{photos}/photos/1.jpg"]
    assert [path for path, _ in ImageList.from_csv(path, root=elsewhere).samples] == wanted


@pytest.mark.parametrize("ending", [".heic", ".JFIF", ".avif", ".gif", ".tif"])
def test_columns_of_any_photos_are_known(photos: Path, ending: str) -> None:
    (photos / f"a{ending}").touch()
    path = write(photos, f"where,what,label\na{ending},b,c\n")
    assert ImageList.from_csv(path).samples == [(f"{photos}/a{ending}", 0)]
    with pytest.raises(ValueError, match="must name the columns"):
        ImageList.from_csv(write(photos, f"a{ending},cat\nb{ending},dog\n"))


def test_a_folder_is_no_photo(photos: Path) -> None:
    (photos / "1.jpg").mkdir()
    with pytest.raises(FileNotFoundError, match=r"1 photo is not there, of 2; the first is '1\.jpg'"):
        ImageList.from_csv(write(photos, "path,label\nphotos/0.jpg,a\n1.jpg,b\n"))


# -- labels ------------------------------------------------------------------------------------------------------------


def test_whole_numbers_are_classes_in_their_order(photos: Path) -> None:
    data = ImageList.from_csv(table(photos, "path,label", ["10", "2", "10", "0", "2", "10"]))
    assert data.classes == ["0", "2", "10"] and data.targets == [2, 1, 2, 0, 1, 2]
    frame = pandas.DataFrame({"path": [f"photos/{i}.jpg" for i in range(6)], "label": [10.0, 2, 10, 0, 2, 10]})
    assert ImageList.from_frame(frame, root=photos).samples == data.samples
    assert ImageList.from_frame(frame, root=photos).classes == ["0", "2", "10"]


def test_measurements_are_refused(photos: Path) -> None:
    for labels in (["0.5", "1", "2", "3", "4", "5"], ["1e-3"] * 6, ["nan", "1", "1", "1", "1", "1"]):
        with pytest.raises(ValueError, match=r"are measurements \(.*\), not classes: .* it fits no regression targets"):
            ImageList.from_csv(table(photos, "path,age", labels), label_column="age")
    ages = "".join(f"photos/{i % 6}.jpg,{i}\n" for i in range(40))
    with pytest.raises(ValueError, match=r"are measurements \(0, 1, 2, \.\.\.\), not classes"):
        ImageList.from_csv(write(photos, f"path,age\n{ages}"))
    # As many classes, with enough photos of each; and names, however many.
    for i in range(6, 80):
        (photos / "photos" / f"{i}.jpg").touch()
    more = "".join(f"photos/{i}.jpg,{i % 40}\n" for i in range(80))
    assert len(ImageList.from_csv(write(photos, f"path,code\n{more}")).classes) == 40
    names = "".join(f"photos/{i}.jpg,person {i}\n" for i in range(40))
    assert len(ImageList.from_csv(write(photos, f"path,who\n{names}")).classes) == 40
    with pytest.raises(TypeError, match=r"a label is a class, its name or its number, got 0\.5; .* regression targets"):
        ImageList([("a.jpg", 0.5)])  # type: ignore[list-item]


def expected(labels: list[set[str]], classes: list[str]) -> torch.Tensor:
    return torch.tensor([[float(name in names) for name in classes] for names in labels])


def test_several_labels_in_a_cell_or_in_columns(photos: Path) -> None:
    cells = ["sea|beach", "sea", "", "beach | dusk|", "dusk|sea|beach", "sea|sea"]
    wanted = [{"sea", "beach"}, {"sea"}, set(), {"beach", "dusk"}, {"dusk", "sea", "beach"}, {"sea"}]
    path = table(photos, "path,tags", cells)
    data = ImageList.from_csv(path, separator="|")
    assert data.multilabel and data.classes == ["beach", "dusk", "sea"]
    assert torch.equal(data.targets, expected(wanted, data.classes))
    # The same as pandas makes 0 and 1 of it.
    frame = pandas.read_csv(path, keep_default_na=False)
    dummies = frame["tags"].str.replace(" ", "").str.get_dummies("|")
    frame = frame[["path"]].join(dummies)
    columns = ["sea", "dusk", "beach"]
    by_frame = ImageList.from_frame(frame, label_column=columns, root=photos)
    assert by_frame.classes == columns and torch.equal(by_frame.targets, expected(wanted, columns))
    assert torch.equal(by_frame.targets, torch.tensor(frame[columns].to_numpy().copy()).float())
    frame.to_csv(photos / "hot.csv", index=False)
    assert torch.equal(ImageList.from_csv(photos / "hot.csv", label_column=columns).targets, by_frame.targets)
    with pytest.raises(ValueError, match=r"line 2: column 'path' must hold 0 or 1, .* got 'photos/0.jpg'"):
        ImageList.from_csv(photos / "hot.csv", path_column="path", label_column=["path", "sea"])
    with pytest.raises(ValueError, match="give one"):
        ImageList.from_csv(photos / "hot.csv", label_column=columns, separator="|")
    with pytest.raises(ValueError, match="names no column"):
        ImageList.from_csv(photos / "hot.csv", label_column=[])
    with pytest.raises(ValueError, match=r'such as "\|", got ""'):
        ImageList.from_csv(path, separator="")


def test_a_photo_that_is_listed_twice(photos: Path) -> None:
    data = ImageList.from_csv(write(photos, "path,label\nphotos/0.jpg,a\nphotos/1.jpg,b\n./photos/0.jpg,a\n"))
    assert data.samples == [(f"{photos}/photos/0.jpg", 0), (f"{photos}/photos/1.jpg", 1)]
    path = write(photos, "path,label,day\nphotos/0.jpg,a,1\nphotos/0.jpg,a,2\nphotos/0.jpg,a,1\n")
    assert ImageList.from_csv(path, label_column="label", extra_column="day").extra == ["1", "2"]
    path = write(photos, "path,label\nphotos/0.jpg,a\nphotos/1.jpg,b\nphotos/0.jpg,b\n")
    for separator in (None, "|"):
        with pytest.raises(
            ValueError,
            match=r"photos/0.jpg' is in line 2 and, with another label, in line 4; .* separator='\|', or columns of 0",
        ):
            ImageList.from_csv(path, separator=separator)


# -- data frames -------------------------------------------------------------------------------------------------------


def test_frames_of_any_types(photos: Path) -> None:
    paths = [photos / "photos" / f"{i}.jpg" for i in range(6)]
    for kind in (object, "string", "category"):
        frame = pandas.DataFrame({"path": paths, "label": pandas.array(NAMES, dtype=kind)}, index=range(5, 11))
        data = ImageList.from_frame(frame)
        assert data.samples == [(str(path), [2, 1, 2, 0, 1, 2][i]) for i, path in enumerate(paths)]
        for missing in (None, float("nan"), pandas.NA, pandas.NaT):
            frame["label"] = frame["label"].astype(object)
            frame.loc[7, "label"] = missing
            with pytest.raises(ValueError, match="the data frame: 1 photo has no label, the first in row 2"):
                ImageList.from_frame(frame)
    with pytest.raises(
        TypeError, match=r"a cell holds a list, .* columns of 0 and 1, label_column=\[\.\.\.\], or joined"
    ):
        ImageList.from_frame(pandas.DataFrame({"path": paths, "label": [["a"]] * 6}))
    with pytest.raises(TypeError, match=r"a data frame \(of pandas or polars\) is wanted, got a list"):
        ImageList.from_frame([1])


def test_a_class_may_be_called_nan(photos: Path) -> None:
    paths = [photos / "photos" / f"{i}.jpg" for i in range(3)]
    data = ImageList.from_frame(pandas.DataFrame({"path": paths, "label": ["nan", "NaT", "nan"]}))
    assert data.classes == ["NaT", "nan"] and data.targets == [1, 0, 1]


def test_two_columns_of_one_name_in_a_frame() -> None:
    frame = pandas.DataFrame([["a.jpg", "cat", "dog"]], columns=["path", "label", "label"])
    with pytest.raises(ValueError, match="the data frame has two columns 'label'"):
        ImageList.from_frame(frame)


# -- instead of a list -------------------------------------------------------------------------------------------------


def test_what_is_no_list_of_samples(photos: Path) -> None:
    for given, better in (
        ("labels.csv", r"ImageList.from_csv\('labels.csv'\)"),
        (photos, r"ImageFolder\('.*'\) for one folder per class, ImageFolder.flat\('.*'\) for photos without"),
        ("a.jpg", r"ImageList\(\['a.jpg'\]\)"),
    ):
        with pytest.raises(TypeError, match=f"got a path: {better}"):
            ImageList(given)
    with pytest.raises(TypeError, match=r"got a data frame: ImageList.from_frame\(it\)"):
        ImageList(pandas.DataFrame({"path": ["a.jpg"]}))
    assert ImageList({"a.jpg": "cat", "b.jpg": "dog"}.items()).samples == [("a.jpg", 0), ("b.jpg", 1)]
    assert ImageList({"a.jpg": "cat", "b.jpg": "dog"}).samples == [("a.jpg", 0), ("b.jpg", 1)]  # type: ignore[arg-type]


def test_classes_in_an_order_of_ones_own() -> None:
    data = ImageList([("a.jpg", "dog"), ("b.jpg", "cat")], classes=["dog", "emu", "cat"])
    assert data.targets == [0, 2] and data.class_to_idx == {"dog": 0, "emu": 1, "cat": 2}
    assert ImageList([("a.jpg", [2, 0])], classes=["dog", "emu", "cat"]).targets.tolist() == [[1, 0, 1]]
    for label in ("owl", 3):
        with pytest.raises(ValueError, match=f"label {label!r} is not among classes="):
            ImageList([("a.jpg", label), ("b.jpg", label)], classes=["dog", "emu", "cat"])
    assert ImageList(["a.jpg"], classes=["dog"]).targets == [-1]
    with pytest.raises(ValueError, match="label -1 is not among classes="):
        ImageList([("a.jpg", [0, -1])], classes=["dog", "emu", "cat"])
    for mixed in ([("a.jpg", "a"), ("b.jpg", ["a"])], [("a.jpg", ["a", 1])], [("a.jpg", [0, 1])]):
        with pytest.raises(TypeError):
            ImageList(mixed)
