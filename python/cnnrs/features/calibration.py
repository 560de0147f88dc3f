"""Networks in int8 and bfloat16: the ranges of what int8 layers read, found on the first images; what both cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cnnrs import _cnnrs
from cnnrs._util.notes import note
from cnnrs.errors import UnsupportedModelError
from cnnrs.model.lowering import Lowered

#: Images that the ranges are found on: the first of the data set.
IMAGES = 256
#: The part of a layer's values that may be beyond its range, in percent; half of them on each side.
BEYOND = 0.01
#: Below this cosine to the float32 features it is said.
CLOSE = 0.98
#: Images of the first batch that are compared.
COMPARED = 16

#: What ``meta.json`` keeps of it.
Ranges = dict[str, Any]


@dataclass
class Calibration:
    """What int8 layers read.

    Attributes:
        ranges: "images": how many it was found on; "percent_beyond"; "ranges": (operation, lowest, highest) of every
            value that becomes int8. None: it is yet to be found.
        first_images: gives the first images of the data set, in batches. None: the batches themselves show it.
        found: told the ranges before there are rows of them.
    """

    ranges: Ranges | None = None
    first_images: Callable[[], Iterable[torch.Tensor]] | None = None
    found: Callable[[Ranges], object] = field(default=lambda _: None)

    @property
    def is_in_batches(self) -> bool:
        """Whether the batches to be computed must show it."""
        return self.ranges is None and self.first_images is None

    def find(
        self, network: _cnnrs.CpuNetwork, batches: Iterable[torch.Tensor], image: tuple[int, ...] | None = None
    ) -> Ranges:
        """The ranges, as they are known or as the network shows them on these batches.

        Args:
            network: in float32.
            batches: what it looks at where nobody else gives the first images.
            image: the shape of the images where the network's operations are those for one size; None: they are not.

        Raises:
            UnsupportedModelError: no layer would compute in int8, or images are of another size than that.
            ValueError: some values are infinite or NaN.
        """
        if self.ranges is None:
            count = 0
            for images in self.first_images() if self.first_images is not None else batches:
                images = _plain(images[: IMAGES - count])
                _check_size(images, image)
                network.look(images)
                count += len(images)
                if count == IMAGES:
                    break
            found = [list(one) for one in network.ranges()]
            self.ranges = {"images": count, "percent_beyond": BEYOND, "ranges": found}
            if image is not None:
                # Other operations may have these numbers at another size.
                self.ranges["image"] = list(image)
            self.found(self.ranges)
        if self.ranges.get("image", image and list(image)) != (image and list(image)):
            raise _other_size(self.ranges["image"], image)
        return self.ranges


def quantize(network: _cnnrs.CpuNetwork, ranges: Ranges, images: torch.Tensor, name: str, compare: bool) -> None:
    """Makes a network compute in int8, and says what that costs where it costs more than it should.

    Args:
        network: in float32.
        ranges: of its values.
        images: a batch, of which a few are computed both ways.
        name: of the model.
        compare: whether they are.
    """
    part = _plain(images[:COMPARED])
    before = network(part).clone() if compare else None
    network.quantize(list(images.shape), [(node, low, high) for node, low, high in ranges["ranges"]])
    if not _cnnrs.CpuNetwork.bytes_are_fast():
        note(
            "precision='int8': this processor has no instructions for it (VNNI), so it is no faster than float32. "
            "The features are those of processors that have them, up to rounding"
        )
    if before is None:
        return
    after = network(part)
    cosines = torch.nn.functional.cosine_similarity(before.flatten(1), after.flatten(1))
    if (cosine := float(cosines.mean())) < CLOSE:
        note(
            f"precision='int8': the features of {name} have a cosine of {cosine:.3f} to those in float32 (mean of "
            f"{len(part)} images): expect a less accurate head, or leave precision away"
        )


def narrow(network: _cnnrs.CpuNetwork, layers: Sequence[str], images: torch.Tensor, compare: bool) -> None:
    """Makes a network compute in bfloat16, and says what that costs where it costs more than roundings explain.

    Args:
        network: in float32.
        layers: that will compute in bfloat16.
        images: a batch, of which a few are computed both ways.
        compare: whether they are.

    Raises:
        UnsupportedModelError: there is no such layer.
    """
    if not layers:
        raise UnsupportedModelError(
            "no layer would compute in bfloat16: that takes linear layers, or convolutions other than Winograd's, of "
            "an even number of 16 and more input channels in one group, behind the first layer"
        )
    part = _plain(images[:COMPARED])
    before = network(part).flatten(1).clone() if compare else None
    network.in_bf16(list(images.shape))
    if before is None:
        return
    apart = torch.linalg.vector_norm(network(part).flatten(1) - before) / torch.linalg.vector_norm(before)
    # Each layer rounds two factors by up to 2^-9 of themselves, and hands on what it got.
    if apart > (most := 2 * 2**-9 * len(layers)):
        note(
            f"precision='bf16': the features are {100 * apart:.1f} % away from those in float32 (by the norm, of "
            f"{len(part)} images), more than {len(layers)} roundings explain ({100 * most:.1f} %): this network makes "
            "differences larger. Expect a less accurate head, or leave precision away"
        )


def of_one_size(
    network: Callable[[torch.Tensor], torch.Tensor], lowered: Lowered
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A network in int8 whose operations and ranges are those for images of one size and for weights as they are.

    Others raise: images of another size where the model looks at it, weights of which it computes others.
    """
    state = lowered.state()

    def computed(images: torch.Tensor) -> torch.Tensor:
        _check_size(images, lowered.image)
        if lowered.state() != state:
            raise UnsupportedModelError("precision='int8': weights of the model have changed during the call")
        return network(images)

    return computed


def _check_size(images: torch.Tensor, image: tuple[int, ...] | None) -> None:
    if image is not None and tuple(images.shape[1:]) != image:
        raise _other_size(image, images.shape[1:])


def _other_size(image: Sequence[int], found: Sequence[int] | None) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"precision='int8' takes images of one size where the model looks at it: {list(image)} at first, now "
        f"{list(found or ())}"
    )


def refused(reasons: Iterable[str]) -> UnsupportedModelError:
    """Why a model cannot be computed in int8, and what to do."""
    lines = ["precision='int8' is computed by engine 'cpu' only, which cannot run this model:", *reasons]
    return UnsupportedModelError("\n".join([*lines, "leave precision away to have it computed all the same"]))


def _plain(images: torch.Tensor) -> torch.Tensor:
    return images.resolve_conj().resolve_neg().contiguous()
