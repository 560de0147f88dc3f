"""What can be typed: every command with its help and options. What it does is loaded when it runs."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable

import cnnrs
from cnnrs.app.cli.options import (
    Help,
    Parser,
    add_columns,
    add_json,
    add_reading,
    add_threads,
    between,
    named,
    novelty,
    place,
    positive,
    share_or_folder,
    whole,
)
from cnnrs.classifier.names import HEADS, TRASH

_EPILOG = """\
Three commands from photos to predictions, with one folder per class (pets/cat/1.jpg, pets/dog/2.jpg):

  cnnrs check pets                    are all photos readable, all classes there?
  cnnrs train pets --out runs/pets    train; writes runs/pets/report.html
  cnnrs predict runs/pets holiday/    what is on these photos?

exit codes: 0 all is well, 1 something was found (bad files), 2 it could not be done, 130 stopped by Ctrl-C
"""


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = Parser(
        prog="cnnrs", description="From a folder of photos to a classifier, without writing code.", epilog=_EPILOG,
        formatter_class=Help,
    )  # fmt: skip
    top.add_argument("--version", action="version", version=f"cnnrs {cnnrs.__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for add_arguments in _COMMANDS:
        text = inspect.getdoc(add_arguments) or ""
        summary = text.partition("\n\n")[0].rstrip(".")
        command = commands.add_parser(add_arguments.__name__, help=summary, description=text, formatter_class=Help)
        add_arguments(command)
    return top


_CHECK_EPILOG = """\
examples:
  cnnrs check pets
  cnnrs check pets --fix move        broken files go to pets-bad/
  cnnrs check pets --json | jq .corrupt

exit codes: 0 every file can be read (or --fix has dealt with the others), 1 some cannot or there are none,
2 it could not be done, as --fix where something cannot be read: nothing is moved
"""


def check(parser: argparse.ArgumentParser) -> None:
    """Read every photo of a folder and say what is wrong with it, before training finds out.

    Finds files that are damaged, cut off, empty or unreadable, names that promise another format, unusual colour
    modes, 16-bit and float images that would become white or black, several pages, photos that EXIF wants turned,
    duplicates by content, also in two classes, small, empty and hidden class folders; counts the files that are no
    photos, by ending and with the reason; and shows sizes and class balance. Nothing is changed unless --fix is given.
    """
    parser.epilog = _CHECK_EPILOG
    parser.add_argument("folder", type=named, metavar="DIR", help="one folder per class, or a folder of photos")
    parser.add_argument(
        "--fix",
        choices=["move", "delete"],
        help="put files that were read and found broken into DIR-bad (move) or "
        f"DIR{TRASH} (delete), to look at or to remove yourself; other findings are only reported",
    )
    parser.add_argument("--all", action="store_true", help="list every finding, not the first few of each kind")
    add_threads(parser)
    add_json(parser)


_TRAIN_EPILOG = """\
examples:
  cnnrs train pets                                 vgg16, into runs/pets
  cnnrs train pets --backbone resnet50 --out runs/resnet
  cnnrs train pets --head mlp --epochs 30          features are there: seconds
  cnnrs train pets --finetune last                 then its last block, too
  cnnrs train pets --weights vgg16-397923af.pth    without network

exit codes: 0 trained, 2 it could not be done, 130 stopped by Ctrl-C; features that were
computed stay, and the same command goes on from there
"""


def train(parser: argparse.ArgumentParser) -> None:
    """Train a classifier on a folder of photos: frozen pretrained network, features computed once, a head trained on
    them.

    DIR holds one folder per class. The accuracy comes from photos that had no say in the training: a test folder, or
    15 % of every class, beside 15 % that choose when to stop; of less than 300 photos all, in five folds. Copies and
    near-duplicates stay on one side. Folders called train, valid and test (or training_set, dev and the like) are used.

    The run folder then holds the classifier (model.safetensors, model.json), history.csv, and report.html: curves,
    which classes are confused, the worst mistakes, where the time went. The features are kept beside the run folder,
    so that the next run with another head, other epochs or another learning rate starts training at once.
    """
    parser.epilog = _TRAIN_EPILOG
    parser.add_argument(
        "folder",
        type=named,
        metavar="DIR|FILE",
        help="one folder per class, or train/, valid/ and test/ with these; or a table (.csv) with paths and labels",
    )
    parser.add_argument("--out", type=place, metavar="RUN", help="the run folder (default: runs/<name of DIR>)")
    parser.add_argument(
        "--backbone",
        default="vgg16",
        metavar="NAME",
        help="the pretrained network: any of torchvision, timm/NAME, or efficientnet_lite0 (default: vgg16, whose "
        "weights are a download of 528 MB, once)",
    )
    parser.add_argument(
        "--weights",
        type=named,
        default="DEFAULT",
        metavar="FILE|NAME",
        help="its weights: a .pth or .safetensors file, or a name",
    )
    parser.add_argument(
        "--head",
        choices=(*HEADS, "auto"),
        default="linear",
        metavar="HEAD",
        help="what is trained: linear (one layer, the default), mlp (two), classifier (all linear layers of VGG); or "
        "computed: logistic, ridge, knn (neighbours); auto: the one with the least loss on the validation photos",
    )
    parser.add_argument(
        "--epochs",
        type=whole(1),
        metavar="N",
        help="passes over the photos, at most (default: until validation no longer improves)",
    )
    parser.add_argument(
        "--batch-size",
        type=whole(1),
        default=32,
        metavar="N",
        help="photos per step, of both stages with --finetune (default: 32)",
    )
    parser.add_argument(
        "--lr", type=positive, metavar="X", help="learning rate (default: 0.001; 0.0001 for classifier)"
    )
    parser.add_argument(
        "--dropout", type=between(0, 1), default=0.2, metavar="P", help="inside mlp and classifier (default: 0.2)"
    )
    parser.add_argument(
        "--balance",
        choices=("auto", "none", "loss", "sampler"),
        default="auto",
        metavar="HOW",
        help="rare classes: loss (they weigh more), sampler (they are drawn more often), none; auto (the default): "
        "loss where a class has three times the photos of another",
    )
    parser.add_argument(
        "--valid",
        type=share_or_folder,
        metavar="F|DIR",
        help="photos that choose epoch and head: a share (default: 0.15), or a folder, which measures if it is alone",
    )
    parser.add_argument(
        "--test",
        type=share_or_folder,
        metavar="F|DIR",
        help="photos that measure, and nothing else: a share (default: 0.15; of few photos all, in folds), or a folder",
    )
    parser.add_argument(
        "--groups",
        metavar="PATTERN",
        help="photos that belong together stay on one side: a regular expression for their paths below DIR, "
        "'plant(\\d+)' for example, or a column of the table",
    )
    parser.add_argument(
        "--add-class", type=place, action="append", default=[], metavar="DIR", help="one more class: a folder of photos"
    )
    add_columns(parser)
    add_reading(parser)
    parser.add_argument(
        "--finetune",
        choices=("last", "all"),
        help="a second stage, on the photos themselves: last trains the last block of the network with what is behind "
        "it, all the whole network; says first what it takes, and keeps what was better (not in folds)",
    )
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N", help="of split and training (default: 0)")
    parser.add_argument(
        "--features", type=place, metavar="DIR", help="where features are kept (default: beside the run)"
    )
    parser.add_argument("--device", metavar="NAME", help="cpu or cuda (default: cuda when there is one)")
    parser.add_argument("--skip-bad", action="store_true", help="leave out photos that cannot be read, and list them")
    parser.add_argument("--force", action="store_true", help="replace RUN even if it was better on the same photos")
    parser.add_argument("--quiet", action="store_true", help="print the result only")
    add_threads(parser)
    add_json(parser)


_EVALUATE_EPILOG = """\
examples:
  cnnrs evaluate runs/pets new-photos
  cnnrs evaluate runs/pets labels.csv --json

exit codes: 0 measured, 2 it could not be done
"""


def evaluate(parser: argparse.ArgumentParser) -> None:
    """Measure a trained classifier with new labelled photos.

    RUN is a folder that cnnrs train wrote. DIR has one folder per class, called as the classifier's; FILE is a table
    with paths and labels. The same report as after training is written into RUN.
    """
    parser.epilog = _EVALUATE_EPILOG
    parser.add_argument("model", type=named, metavar="RUN", help="a folder that cnnrs train wrote")
    parser.add_argument("folder", type=named, metavar="DIR|FILE", help="labelled photos")
    parser.add_argument("--report", type=place, metavar="FILE", help="the page (default: RUN/evaluation-<name>.html)")
    add_columns(parser)
    parser.add_argument("--batch-size", type=whole(1), default=32, metavar="N", help="photos at a time (default: 32)")
    parser.add_argument("--skip-bad", action="store_true", help="leave out photos that cannot be read")
    add_threads(parser)
    add_json(parser)


_PREDICT_EPILOG = """\
examples:
  cnnrs predict runs/pets holiday/
  cnnrs predict runs/pets holiday/ --csv > labels.csv
  cnnrs predict runs/pets a.jpg --top-k 3 --json
  cnnrs predict runs/pets holiday/ --sort-into sorted    sorted/cat/1.jpg, ...

exit codes: 0 every file has a prediction, 1 some could not be read, 2 it could not be done
"""


def predict(parser: argparse.ArgumentParser) -> None:
    """Say what is on photos: class and probability of each file.

    RUN is a folder that cnnrs train wrote. Folders are searched for photos, with all folders inside them. A photo that
    is stranger than those of the classes is unknown.
    """
    parser.epilog = _PREDICT_EPILOG
    parser.add_argument("model", type=named, metavar="RUN", help="a folder that cnnrs train wrote")
    parser.add_argument("paths", type=named, nargs="+", metavar="FILE|DIR", help="photos, or folders of photos")
    parser.add_argument(
        "--top-k", type=whole(1), default=1, metavar="K", help="the K most probable classes (default: 1)"
    )
    parser.add_argument(
        "--sort-into",
        type=place,
        metavar="DIR",
        help="copy every photo to DIR/CLASS, or to DIR/unknown; nothing is overwritten, the photos stay where they are",
    )
    parser.add_argument(
        "--unknown",
        type=novelty,
        default="auto",
        metavar="HOW",
        help="from which novelty on a photo is unknown: a number, auto (all but 1 in 100 photos of the classes keep "
        "within, the default), or off",
    )
    parser.add_argument("--batch-size", type=whole(1), default=32, metavar="N", help="photos at a time (default: 32)")
    add_threads(parser)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="print a table for spreadsheets: path,class,probability")
    add_json(form)  # type: ignore[arg-type]


_SUMMARY_EPILOG = """\
examples:
  cnnrs summary vgg16
  cnnrs summary MnistNet
  cnnrs summary resnet50 --size 160 --json
"""


def summary(parser: argparse.ArgumentParser) -> None:
    """List the layers of a network: output sizes, parameters, receptive fields, cost, and which engine runs it.

    NAME is a network of torchvision, one of the tutorial's (SimpleCNN, MnistNet, CatDogNet), efficientnet_lite0, or a
    run folder. No weights are downloaded.
    """
    parser.epilog = _SUMMARY_EPILOG
    parser.add_argument("name", type=named, metavar="NAME|RUN", help="a network, or a folder that cnnrs train wrote")
    parser.add_argument("--size", type=whole(1), metavar="N", help="height and width of the input (default: the usual)")
    parser.add_argument("--batch", type=whole(1), default=1, metavar="N", help="images (default: 1)")
    add_json(parser)


_FEATURES_EPILOG = """\
examples:
  cnnrs features info runs/features
  cnnrs features verify runs/features
  cnnrs features clear runs/features/pets-vgg16

exit codes: 0 all is well, 1 damaged or incomplete features, 2 it could not be done
"""


def features(parser: argparse.ArgumentParser) -> None:
    """Look at stored features, check them, or throw them away.

    DIR is a folder that preconv or cnnrs train wrote, or one that holds several of them.
    """
    parser.epilog = _FEATURES_EPILOG
    parser.add_argument(
        "action", choices=["info", "verify", "clear"], metavar="ACTION",
        help="info: what is stored; verify: read all of it; clear: delete it, and nothing else",
    )  # fmt: skip
    parser.add_argument("folder", type=place, metavar="DIR", help="features, or a folder above them")
    add_json(parser)


_BENCH_EPILOG = """\
examples:
  cnnrs bench
  cnnrs bench pets --threads 4
  cnnrs bench pets --backbone vgg16 --rounds 5
"""


def bench(parser: argparse.ArgumentParser) -> None:
    """Measure on this machine, on your photos: cnnrs beside torchvision's loader and PyTorch's network and loop.

    Three things: reading photos as training does, features of a frozen network, training a small network. All sides are
    warmed up and measured in turn, as in benches/RESULTS.md; a ratio is to the best of the others, the median of the
    rounds, with its spread. Takes about a minute on two cores, on the CPU. Without DIR 200 generated photos are used.
    """
    parser.epilog = _BENCH_EPILOG
    parser.add_argument("folder", type=named, nargs="?", metavar="DIR", help="one folder per class")
    parser.add_argument(
        "--backbone", default="resnet18", metavar="NAME", help="the network of the features (default: resnet18)"
    )
    parser.add_argument("--rounds", type=whole(1), default=3, metavar="N", help="measurements of each (default: 3)")
    add_threads(parser)
    add_json(parser)


def info(parser: argparse.ArgumentParser) -> None:
    """Print versions, devices, and which engines can be used here; what to paste into a bug report."""
    add_json(parser)


_COMMANDS: tuple[Callable[[argparse.ArgumentParser], None], ...] = (
    check, train, evaluate, predict, summary, features, bench, info,
)  # fmt: skip
