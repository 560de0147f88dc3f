"""What ``cnnrs train`` trains: a pretrained network by name, cut in two, with a head for the classes at hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from cnnrs.layers import put, set_dropout

if TYPE_CHECKING:
    from torchvision import transforms

    from cnnrs.model.weights import Found

_HIDDEN = 256


@dataclass(frozen=True)
class Preprocessing:
    """What happens to a photo: shorter side and square crop in pixels, mean and deviation per channel (0 to 1)."""

    resize: int
    crop: int
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, transform: Any) -> Preprocessing:
        """The same as numbers, of a torchvision preset or a ``Compose``.

        Raises:
            ValueError: the transform does something else as well.
        """
        if hasattr(transform, "resize_size") and hasattr(transform, "crop_size"):
            resize, crop = transform.resize_size[0], transform.crop_size[0]
            return cls(resize, crop, transform.interpolation.value, tuple(transform.mean), tuple(transform.std))
        steps = {type(step).__name__.removeprefix("Maybe"): step for step in getattr(transform, "transforms", [])}
        if list(steps) != ["Resize", "CenterCrop", "ToTensor", "Normalize"]:
            raise ValueError(f"these weights want more than resize, crop and normalise: {transform}")
        resize, crop = (_side(steps[name].size) for name in ("Resize", "CenterCrop"))
        norm = steps["Normalize"]
        mean, std = (tuple(float(value) for value in values) for values in (norm.mean, norm.std))
        return cls(resize, crop, steps["Resize"].interpolation.value, mean, std)

    def transform(self) -> transforms.Compose:
        """The same as torchvision's objects."""
        from torchvision import transforms
        from torchvision.transforms import InterpolationMode

        return transforms.Compose(
            [
                transforms.Resize(self.resize, InterpolationMode(self.interpolation)),
                transforms.CenterCrop(self.crop),
                transforms.ToTensor(),
                transforms.Normalize(self.mean, self.std),
            ]
        )


@dataclass(frozen=True)
class Parts:
    """A network in two.

    Attributes:
        body: computed once.
        head: trained.
        join: makes the network whole again and returns it, with ``head``, or with another one that was trained.
        path: of the head in the whole network.
        early: whether the cut is before the whole classifier, not before its last layer.
    """

    body: nn.Module
    head: nn.Module
    join: Callable[..., nn.Module]
    path: str
    early: bool


def cut(found: Found, head: str, num_classes: int, dropout: float = 0.0) -> Parts:
    """Give a network an untrained end for ``num_classes``, and cut it there.

    Args:
        found: a network by name, without its last linear layer; changed.
        head: "mlp" puts two linear layers there with ReLU and dropout between, others one; with "classifier" (VGG,
            AlexNet) the linear layers before it are trained as well.
        num_classes: at least 1.
        dropout: probability inside "mlp" and "classifier".

    Raises:
        ValueError: there is no linear layer; "classifier" for a network that has only one.
    """
    import torchvision

    model = body = found.model
    _drop_aux(found)
    if found.last is None:
        raise ValueError(f"{found.name} has no linear layer to put a new head in; try vgg16 or resnet18")
    path, in_features = found.last
    last = new_head("linear" if head == "classifier" else head, in_features, num_classes, dropout)
    if head == "classifier":
        if not isinstance(model, torchvision.models.VGG | torchvision.models.AlexNet):
            raise ValueError(
                "head 'classifier' trains all linear layers of VGG or AlexNet; "
                f"{type(model).__name__} takes 'linear' or 'mlp'"
            )
        put(model, path, last)
        set_dropout(model.classifier, dropout)
        body = nn.Sequential(model.features, model.avgpool, nn.Flatten())
        path, last = "classifier", model.classifier

    def join(trained: nn.Module = last) -> nn.Module:
        put(model, path, trained)
        return model

    return Parts(body, last, join, path, early=head == "classifier")


def new_head(kind: str, in_features: int, num_classes: int, dropout: float = 0.0) -> nn.Module:
    """An untrained head: (N, in_features) to (N, num_classes); also for heads in closed form, which are linear."""
    if kind == "mlp":
        return nn.Sequential(
            nn.Linear(in_features, _HIDDEN), nn.ReLU(), nn.Dropout(dropout), nn.Linear(_HIDDEN, num_classes)
        )
    return nn.Linear(in_features, num_classes)


def _drop_aux(found: Found) -> None:
    """Auxiliary heads serve training from scratch only, and tell the classes of the weights apart."""
    import torchvision

    if not isinstance(found.model, torchvision.models.GoogLeNet | torchvision.models.Inception3):
        return
    found.model.aux_logits = False
    for name in ("aux1", "aux2", "AuxLogits"):
        if hasattr(found.model, name):
            setattr(found.model, name, None)
    found.options = {**found.options, "aux_logits": False, "init_weights": False}


def _side(size: Any) -> int:
    sides = {int(side) for side in size} if isinstance(size, (tuple, list)) else {int(size)}
    if len(sides) > 1:
        raise ValueError(f"these weights want pictures that are not square: {size}")
    return sides.pop()
