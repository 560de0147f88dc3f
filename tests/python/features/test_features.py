"""`Features`: rows, parts, the way back to images, and resemblance, against plain torch."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset
from torchvision import transforms

import cnnrs
from cnnrs import Features
from cnnrs.model.backbone import Backbone

TRANSFORM = transforms.Compose([transforms.Resize((24, 24)), transforms.ToTensor()])


def backbone() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(4), nn.Dropout(0.5))


def head() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(150, 3))


def random(rows: int, classes: int, seed: int = 0, shape: tuple[int, ...] = (4, 2)) -> Features:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (rows,), generator=generator)
    features = torch.randn((rows, *shape), generator=generator)
    return Features(features, labels, [f"{i}.jpg" for i in range(rows)], [str(i) for i in range(classes)])


def test_pickles_without_the_transform() -> None:
    features = random(5, 2)
    features.transform = lambda image: image
    again = pickle.loads(pickle.dumps(features))
    assert torch.equal(again.features, features.features) and again.paths == features.paths and again.transform is None
    assert copy.copy(features).transform is features.transform is not None


# -- parts -------------------------------------------------------------------------------------------------------------


def test_take_keeps_rows_together() -> None:
    whole = random(20, 3)
    part = whole.take([7, 3, 3])
    assert torch.equal(part.features, whole.features[[7, 3, 3]]) and torch.equal(part.labels, whole.labels[[7, 3, 3]])
    assert part.paths == ["7.jpg", "3.jpg", "3.jpg"] and part.classes == whole.classes


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.9])
def test_split_is_stratified_and_repeats(fraction: float) -> None:
    whole = random(200, 4)
    train, valid = whole.split(fraction, seed=3)
    assert sorted([*(train.paths or []), *(valid.paths or [])]) == sorted(whole.paths or [])
    for label in range(4):
        count, chosen = int((whole.labels == label).sum()), int((valid.labels == label).sum())
        assert chosen == round(fraction * count)
    again = whole.split(fraction, seed=3)[1]
    assert again.paths == valid.paths and whole.split(fraction, seed=4)[1].paths != valid.paths
    for part in (train, valid):
        rows = [int(path.removesuffix(".jpg")) for path in part.paths or []]
        assert rows == sorted(rows) and torch.equal(part.features, whole.features[rows])


def test_a_class_of_two_is_in_both_parts_and_passes_stay_together() -> None:
    paths = ["a", "b", "c", "d"] * 3
    passes = Features(torch.arange(12.0).view(12, 1), torch.tensor([0, 0, 1, 1] * 3), paths)
    train, valid = passes.split(0.1)
    assert sorted(valid.labels.tolist()) == [0] * 3 + [1] * 3
    assert not set(train.paths or []) & set(valid.paths or [])
    with pytest.raises(ValueError, match="between 0 and 1"):
        passes.split(1.0)
    with pytest.raises(ValueError, match=r"one label per row, or a 0 or 1 per class, got labels of shape \(2, 3\)"):
        Features(torch.zeros(2, 1), torch.full((2, 3), 0.5)).split(0.5)
    with pytest.raises(ValueError, match=r"knn needs one label per row, got labels of shape \(2, 3\)"):
        Features(torch.zeros(2, 1), torch.full((2, 3), 0.5)).knn(1)


def test_to_moves_both() -> None:
    moved = random(4, 2).to("meta")
    assert moved.features.device.type == moved.labels.device.type == "meta" and moved.paths is not None


# -- back to images ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["torch", "python"])
@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16"])
def test_attach_is_the_head_on_the_features(folder: Path, tmp_path: Path, engine: Any, dtype: Any) -> None:
    body, top = backbone(), head()
    data = cnnrs.ImageFolder(folder, TRANSFORM)
    features = cnnrs.preconv(data, body, out=tmp_path / "f", batch_size=26, engine=engine, dtype=dtype)
    network = features.attach(top)
    network.train()  # the body's dropout and batch statistics stay as they were when the features were made
    images, _ = next(iter(cnnrs.DataLoader(data, batch_size=26)))
    with torch.no_grad():
        assert torch.equal(network(images), top(features.features.float()))
    assert network[-1] is top and top.training and not network[0].training
    expected = {**{f"0.{k}": v for k, v in body.state_dict().items()}}
    assert all(torch.equal(network.state_dict()[key], value) for key, value in expected.items())
    assert (cnnrs.explain(network.eval()).operations > 0) == (dtype is None)


def test_attach_trains_the_head_only(folder: Path) -> None:
    features = cnnrs.preconv(cnnrs.ImageFolder(folder, TRANSFORM), backbone())
    top = head()
    network = features.attach(top)
    before = copy.deepcopy(network[0].state_dict())
    optimizer = torch.optim.SGD(top.parameters(), lr=0.1)
    loader = cnnrs.DataLoader(cnnrs.FeatureDataset(*features), batch_size=8)
    cnnrs.fit(0, top, loader, optimizer=optimizer, loss_fn=nn.functional.cross_entropy, verbose=False)
    photos = cnnrs.DataLoader(cnnrs.ImageFolder(folder, TRANSFORM), batch_size=8)
    found = cnnrs.fit(0, network, photos, "validation", loss_fn=nn.functional.cross_entropy, verbose=False)
    expected = cnnrs.fit(0, top, loader, "validation", loss_fn=nn.functional.cross_entropy, verbose=False)
    assert found == pytest.approx(expected, rel=1e-5)
    assert all(torch.equal(before[key], value) for key, value in network[0].state_dict().items())


def test_attach_needs_a_body(folder: Path, tmp_path: Path) -> None:
    body, top = backbone(), head()
    cnnrs.preconv(cnnrs.ImageFolder(folder, TRANSFORM), body, out=tmp_path / "f", batch_size=26, engine="python")
    opened = cnnrs.load_features(tmp_path / "f")
    with pytest.raises(ValueError, match=r"pass it, features\.attach\(head, vgg\.features\)"):
        opened.attach(top)
    images, _ = next(iter(cnnrs.DataLoader(cnnrs.ImageFolder(folder, TRANSFORM), batch_size=26)))
    with torch.no_grad():
        assert torch.equal(opened.attach(top, body)(images), top(opened.features))


# -- resemblance -------------------------------------------------------------------------------------------------------


def cosines(features: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    return nn.functional.cosine_similarity(queries.flatten(1).unsqueeze(1), features.flatten(1).unsqueeze(0), dim=2)


@pytest.mark.parametrize("chunk", [3, 7, 2048])
@pytest.mark.parametrize("k", [1, 4, 9])
def test_knn_is_a_vote_of_the_most_similar(monkeypatch: pytest.MonkeyPatch, chunk: int, k: int) -> None:
    monkeypatch.setattr("cnnrs.features.resemblance._CHUNK", chunk)
    known, asked = random(40, 3), random(11, 3, seed=5)

    def vote(similar: torch.Tensor) -> list[int]:
        winners = []
        for row in similar.argsort(dim=1, descending=True)[:, :k]:
            labels = known.labels[row].tolist()
            counts = {label: labels.count(label) for label in labels}
            most = max(counts.values())
            winners.append(next(label for label in labels if counts[label] == most))
        return winners

    assert known.knn(k, asked).tolist() == vote(cosines(known.features, asked.features))
    assert known.knn(k, asked.features).tolist() == known.knn(k, asked).tolist()
    others = cosines(known.features, known.features).fill_diagonal_(-2)
    assert known.knn(k).tolist() == vote(others)


def test_rows_of_one_image_do_not_vote_for_each_other() -> None:
    whole = random(30, 3)
    twice = Features(
        torch.cat([whole.features] * 2), torch.cat([whole.labels] * 2), [*(whole.paths or []), *(whole.paths or [])]
    )
    assert twice.knn(2).tolist() == whole.knn(1).tolist() * 2
    assert twice.nearest("3.jpg", 2)[0].path == whole.nearest("3.jpg", 1)[0].path


def test_knn_finds_well_separated_classes() -> None:
    centers = torch.eye(3).repeat_interleave(10, 0)
    features = Features(centers + 0.1 * random(30, 3, shape=(3,)).features, torch.arange(3).repeat_interleave(10))
    assert torch.equal(features.knn(5), features.labels)


def test_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = random(20, 3)
    similar = cosines(whole.features, whole.features[4:5])[0]
    similar[4] = -2
    expected = similar.argsort(descending=True)[:5].tolist()
    for name in ("4.jpg", 4, Path("4.jpg"), str(Path("4.jpg").absolute())):
        found = whole.nearest(name, 5)
        assert [one.row for one in found] == expected
        assert [one.path for one in found] == [f"{row}.jpg" for row in expected]
        assert [one.label for one in found] == whole.labels[expected].tolist()
        # A sum of 8 products of numbers of length 1 in another order.
        assert [one.similarity for one in found] == pytest.approx(similar[expected].tolist(), abs=8 * 2**-23)
    assert whole.nearest(whole.features[4], 1)[0].row == 4
    with pytest.raises(KeyError, match=r"no row is of 99\.jpg; the first is of 0\.jpg"):
        whole.nearest("99.jpg")
    with pytest.raises(KeyError, match="give the number of a row"):
        Features(whole.features, whole.labels).nearest("4.jpg")
    for k in (0, 20):
        with pytest.raises(ValueError, match=f"k must be between 1 and the 19 rows of other images there are, got {k}"):
            whole.nearest(4, k)
    with pytest.raises(ValueError, match=r"features have shape \(4, 2\), the queries \(3,\)"):
        whole.knn(1, torch.zeros(2, 3))


@pytest.mark.parametrize("engine", ["auto", "python"])
def test_nearest_of_a_new_photo(folder: Path, tmp_path: Path, engine: Any) -> None:
    """A copy of a photo is nearest to it, in a file or in memory, and so is what the features are given for."""
    body, data = backbone(), cnnrs.ImageFolder(folder, TRANSFORM)
    features = cnnrs.preconv(data, body, tmp_path / "f", engine=engine)
    copied = tmp_path / "new.png"
    with Image.open(data.samples[7][0]) as image:
        image.convert("RGB").save(copied)
        pixels = np.asarray(image.convert("RGB"))
    with Image.open(copied) as image:
        for photo in (copied, str(copied), image, pixels, np.asarray(features)[7]):
            found = features.nearest(photo, 3)
            assert found[0].row == 7 and found[0].path == data.samples[7][0]
            # A sum of 150 products of numbers of length 1, and features by another engine.
            assert [one.similarity for one in found] == pytest.approx(
                [one.similarity for one in features.nearest(features.features[7], 3)], abs=1e-5
            )
    before = torch.random.get_rng_state()
    features.nearest(copied)
    assert torch.equal(torch.random.get_rng_state(), before)
    opened = cnnrs.load_features(tmp_path / "f")
    with pytest.raises(ValueError, match=r"pass it, features\.nearest\(photo, body=cnnrs\.backbone"):
        opened.nearest(copied)
    with pytest.raises(ValueError, match="whose transform prepares the photo"):
        opened.nearest(copied, body=body)
    whole = Backbone(body, nn.Identity(), "mine", TRANSFORM)
    assert [one.row for one in opened.nearest(copied, 3, whole)] == [one.row for one in features.nearest(copied, 3)]


def test_nearest_reads_photos_as_the_features_were(folder: Path, tmp_path: Path) -> None:
    data = cnnrs.ImageFolder(folder, TRANSFORM)
    with Image.open(data.samples[7][0]) as image:
        exif = image.getexif()
        exif[0x0112] = 3
        image.convert("RGB").rotate(180).save(tmp_path / "turned.png", exif=exif)
    features = cnnrs.preconv(cnnrs.DataLoader(data, batch_size=8, exif=True), backbone())
    for photo in (tmp_path / "turned.png", Image.open(tmp_path / "turned.png")):
        found = features.nearest(photo, 1)[0]
        assert found.row == 7 and found.similarity == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_as_an_array(dtype: torch.dtype) -> None:
    features = Features(random(5, 2).features.to(dtype), torch.zeros(5))
    array = np.asarray(features)
    assert array.shape == (5, 4, 2) and array.dtype == (np.float16 if dtype == torch.float16 else np.float32)
    assert np.array_equal(array, features.features.float().numpy())
    assert np.asarray(features, np.float64).dtype == np.float64
    assert np.mean(features, axis=0).shape == (4, 2)  # type: ignore[call-overload]


def test_take_by_mask_and_by_numbers() -> None:
    features = Features(torch.arange(6.0), torch.tensor([0, 1, 1, 0, 1, 0]), [f"{i}.jpg" for i in range(6)])
    for mask in (features.labels == 1, [False, True, True, False, True, False]):
        assert features.take(mask).features.tolist() == [1, 2, 4]
        assert features.take(mask).paths == ["1.jpg", "2.jpg", "4.jpg"]
    assert features.take([5, 0, 5]).features.tolist() == [5, 0, 5]
    assert len(features.take([])) == len(features.take(features.labels == 7)) == 0
    with pytest.raises(IndexError, match=r"a mask for 6 rows must have as many bools, got \(2,\)"):
        features.take([True, False])
    with pytest.raises(TypeError, match="rows must be integers or bools, got float32"):
        features.take(torch.tensor([1.7]))


@pytest.mark.parametrize("stored", [False, True])
def test_passes_of_images_without_files_stay_together(tmp_path: Path, stored: bool) -> None:
    data = TensorDataset(torch.rand(12, 1, 6, 6), torch.arange(12) % 2)
    loader = cnnrs.DataLoader(data, batch_size=5, shuffle=True)
    out = tmp_path / "features" if stored else None
    made = cnnrs.preconv(loader, torch.nn.Conv2d(1, 2, 3), out=out, passes=3, verbose=False)
    for features in (made, cnnrs.load_features(out) if out else made, made.take(range(36))):
        train, valid = features.split(0.25)
        assert len(train) == 24 and len(valid) == 12
        # The three rows of an image are the same: nothing is random here.
        images = [{tuple(row) for row in part.features.flatten(1).tolist()} for part in (train, valid)]
        assert not images[0] & images[1]
        assert {one.row % 12 for one in features.nearest(4, 33)} == set(range(12)) - {4}
        with pytest.raises(ValueError, match="the 33 rows of other images there are, got 34"):
            features.knn(34)


def test_rows_and_labels_must_match(tmp_path: Path) -> None:
    uneven = [(torch.rand(4, 3, 8, 8), torch.arange(3)), (torch.rand(4, 3, 8, 8), torch.arange(4))]
    for out in (None, tmp_path / "features"):
        with pytest.raises(ValueError, match=r"one target per input, got inputs of shape \(4, 3, 8, 8\)"):
            cnnrs.preconv(uneven, torch.nn.Conv2d(3, 2, 3), out=out, verbose=False)

    class Half(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[: len(x) // 2]

    for engine in ("auto", "python"):
        with pytest.raises(ValueError, match="the model made 4 rows of 8 images"):
            cnnrs.preconv([(torch.rand(8, 3), torch.arange(8))], Half(), engine=engine, verbose=False)
