"""Real images to trained classifiers, by both roads of the tutorial: ``make demo``, or ``python -m cnnrs.app.demo``.

Without arguments: 5,000 handwritten digits. With ``--data``: the transfer road on your own photos.
"""

import argparse
import contextlib
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from cnnrs._util.text import Plain, message
from cnnrs.app.demo.digits import digits
from cnnrs.app.demo.photos import photos


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code: 0 all well, 1 a threshold was missed, 2 something is not there."""
    parser = argparse.ArgumentParser(prog="python -m cnnrs.app.demo", description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of class folders, or with train/ and valid/ of them")
    parser.add_argument(
        "--backbone",
        default="vgg16",
        help="of torchvision, timm/NAME, or efficientnet_lite0 (default: vgg16)",
    )
    parser.add_argument("--weights", type=Path, help="its weights as .pth; default: torch's cache, then a download")
    parser.add_argument("--epochs", type=int, default=5, help="for the head on your photos (default: 5)")
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="default: demo-output")
    args = parser.parse_args(arguments)

    # The tutorial puts Dropout2d behind linear layers, which torch remarks on at every call.
    warnings.filterwarnings("ignore", message="dropout2d: Received a 2-D input")
    torch.manual_seed(0)
    try:
        if args.data is None:
            return digits(args.out)
        with contextlib.redirect_stdout(Plain(sys.stdout)):
            return photos(args.data, args.backbone, args.weights, args.epochs, args.out)
    except (ImportError, OSError, ValueError) as error:
        print(f"\ndemo: {message(str(error))}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
