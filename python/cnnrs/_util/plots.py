"""Pictures for notebooks: a batch, features in two dimensions, who is taken for whom, the worst mistakes.

All need matplotlib (``pip install cnnrs[plots]``). Each returns a matplotlib figure; with a path it is written to a
file instead of being shown.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cnnrs._util.text import shown, width

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Path = str | os.PathLike[str] | None

_COLUMNS = 6
# Matplotlib's own font has no Chinese, Japanese or Korean; the first of these that is installed helps out.
_EAST_ASIAN = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "Source Han Sans CN",
    "Microsoft YaHei", "PingFang SC", "Hiragino Sans GB", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "SimHei",
)  # fmt: skip


def new_figure(what: str, path: Path, width: float, height: float) -> Figure:
    """An empty figure: inside pyplot, so that a notebook shows it, or outside when it goes to a file.

    Raises:
        ImportError: matplotlib is not installed; the message names ``what``.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("matplotlib"):
            raise
        raise ImportError(f"{what} needs matplotlib: pip install cnnrs[plots]", name="matplotlib") from None
    if path is None:
        from matplotlib import pyplot

        return pyplot.figure(figsize=(width, height), layout="constrained")
    # Outside pyplot: writing a file needs no display and leaves nothing open.
    return Figure(figsize=(width, height), layout="constrained")


def finish(figure: Figure, path: Path) -> Figure:
    """Write the figure where a path is given."""
    _spell(figure)
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure


def _spell(figure: Figure) -> None:
    """Give class names in Chinese, Japanese or Korean a font that has them."""
    from matplotlib import font_manager
    from matplotlib.text import Text

    texts = [text for text in figure.findobj(Text) if any(c >= "\u2e80" for c in text.get_text())]
    if not texts:
        return
    installed = set(font_manager.get_font_names())
    found = next((name for name in _EAST_ASIAN if name in installed), None)
    if found is not None:
        for text in texts:
            text.set_fontfamily([*text.get_fontfamily(), found])


def show_batch(loader: Iterable[Any], count: int = 12, path: Path = None) -> Figure:
    """Draw the first images of a loader with their labels, colours as in the files.

    Args:
        loader: yields (images, labels), (N, 1 or 3, H, W) float or uint8; undone is the ``Normalize`` of its transform.
        count: how many images, at most a batch.
        path: where to write the picture.

    Raises:
        TypeError: the batches are no images.
        ValueError: the loader is empty.
    """
    dataset = getattr(loader, "dataset", None)
    batch = next(iter(loader), None)
    if batch is None:
        raise ValueError("the loader yields no batch: nothing to show")
    images, labels = batch if isinstance(batch, (tuple, list)) and len(batch) == 2 else (batch, None)
    if not isinstance(images, Tensor) or images.dim() != 4 or images.shape[1] not in (1, 3):
        shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"show draws batches of images, (N, 1 or 3, H, W); this loader yields {shape}")
    names = _below(dataset, "classes")
    images = images[:count].cpu()
    if images.dtype != torch.uint8:
        images = denormalised(images, _below(dataset, "transform"))
    titles = [] if labels is None else [_short(_name(label, names)) for label in labels[:count]]
    return _grid("DataLoader.show", [image.permute(1, 2, 0).squeeze(-1).numpy() for image in images], titles, path)


def denormalised(images: Tensor, transform: Any) -> Tensor:
    """Undo the last ``Normalize`` of a transform: (N, C, H, W) float, back to 0..1 and clipped there."""
    steps = [transform, *getattr(transform, "transforms", [])] if transform is not None else []
    found = [step for step in steps if hasattr(step, "mean") and hasattr(step, "std")]
    if found:
        mean, std = (
            torch.tensor(values, dtype=images.dtype).view(-1, 1, 1) for values in (found[-1].mean, found[-1].std)
        )
        images = images * std + mean
    return images.clamp(0, 1)


def plot_features(features: Tensor, labels: Tensor, classes: Sequence[str] | None = None, path: Path = None) -> Figure:
    """Draw features as points in the plane of their two largest principal components, one colour per class.

    Args:
        features: (N, ...), flattened.
        labels: (N,) class numbers.
        classes: names.
        path: where to write the picture.

    Raises:
        ValueError: fewer than three rows.
    """
    if labels.dim() != 1:
        raise ValueError(f"a colour per class needs one label per row, got labels of shape {tuple(labels.shape)}")
    if len(features) < 3:
        raise ValueError(f"a projection needs at least three rows of features, got {len(features)}")
    rows = features.flatten(1).float()
    rows = rows - rows.mean(dim=0)
    # Exact for what is drawn; a fixed seed, because the method is a random one.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, _, axes = torch.pca_lowrank(rows, q=min(6, *rows.shape), center=False)
    points = rows @ axes[:, :2]
    if points.shape[1] < 2:
        points = torch.cat([points, torch.zeros_like(points)], dim=1)
    share = 100 * points.var(dim=0).sum() / rows.var(dim=0).sum().clamp(min=1e-30)
    present = sorted(set(labels.tolist()))
    # Beside the points where it would cover them.
    beside = 5 < len(present) <= 20
    figure = new_figure("Features.plot", path, 8 if beside else 6, 5)
    canvas = figure.subplots()
    canvas.set_prop_cycle(color=_colors(len(present)))
    for label in present:
        x, y = points[labels == label].T.numpy()
        canvas.scatter(x, y, s=14, alpha=0.7, label=_short(_name(label, classes), 28))
    canvas.set(xticks=[], yticks=[], title=f"two principal components, {share:.0f} % of the variance")
    if beside:
        figure.legend(loc="outside right upper")
    elif len(present) <= 5:
        canvas.legend()
    return finish(figure, path)


def plot_confusion(matrix: Tensor, classes: Sequence[str], path: Path = None) -> Figure:
    """Draw a matrix of counts, (C, C) int64, coloured by the share of the true class."""
    size = len(classes)
    side = min(max(3.0, 0.55 * size + 1.5), 16.0)
    figure = new_figure("Confusion.plot", path, side, side)
    canvas = figure.subplots()
    shares = matrix / matrix.sum(dim=1, keepdim=True).clamp(min=1)
    canvas.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    names = [_short(name, 28) for name in classes]
    canvas.set(
        xticks=range(size), yticks=range(size), xticklabels=names, yticklabels=names,
        xlabel="predicted", ylabel="true",
    )  # fmt: skip
    canvas.tick_params(axis="x", rotation=90 if size > 6 else 0)
    if size <= 25:
        for i in range(size):
            for j in range(size):
                color = "white" if shares[i, j] > 0.5 else "black"
                canvas.text(j, i, f"{int(matrix[i, j]):,}", ha="center", va="center", color=color)
    return finish(figure, path)


def plot_top_losses(worst: Sequence[Any], path: Path = None) -> Figure:
    """Draw the images of :class:`cnnrs.training.metrics.Loss`es with what they are and what they were taken for.

    Raises:
        ValueError: there are none, or their files are not known.
    """
    from PIL import Image

    if not len(worst):
        raise ValueError("there are no samples to draw")
    images = []
    for one in worst:
        if one.path is None:
            raise ValueError("the files are not known: give top_losses(..., paths=features.paths)")
        with Image.open(one.path) as image:
            images.append(image.convert("RGB").copy())
    titles = [f"{_short(one.target)}\n{_short(one.predicted)}? {100 * one.probability:.0f} %" for one in worst]
    return _grid("TopLosses.plot", images, titles, path)


def _grid(what: str, images: Sequence[Any], titles: Sequence[str], path: Path) -> Figure:
    columns = min(_COLUMNS, max(len(images), 1))
    rows = math.ceil(len(images) / columns)
    figure = new_figure(what, path, 1.7 * columns, 2.0 * rows)
    for i, image in enumerate(images):
        canvas = figure.add_subplot(rows, columns, i + 1)
        canvas.imshow(image, cmap="gray" if getattr(image, "ndim", 3) == 2 else None)
        canvas.set_axis_off()
        if i < len(titles):
            canvas.set_title(titles[i], fontsize=9)
    return finish(figure, path)


def _below(dataset: Any, name: str) -> Any:
    """An attribute of the data set, or of the one below any ``Subset``."""
    while dataset is not None and not hasattr(dataset, name):
        dataset = getattr(dataset, "dataset", None)
    return getattr(dataset, name, None)


def _short(name: str, most: int = 18) -> str:
    """A name that fits above a picture."""
    kept = shown(name)
    if width(kept) <= most:
        return kept
    while width(kept) >= most:
        kept = kept[:-1]
    return kept + "\N{HORIZONTAL ELLIPSIS}"


def _colors(count: int) -> Any:
    from matplotlib import colormaps

    # The strong ten first, their pale twins only for more classes.
    numbers = [*range(0, 20, 2), *range(1, 20, 2)]
    return colormaps["tab20"](numbers[: max(count, 1)])


def _name(label: Any, classes: Sequence[str] | None) -> str:
    if isinstance(label, Tensor) and label.dim():
        return ", ".join(_name(number, classes) for number in label.nonzero().flatten()) or "-"
    number = int(label)
    return classes[number] if classes and 0 <= number < len(classes) else str(number)
