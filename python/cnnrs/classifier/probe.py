"""Heads that are solved for on stored features, without epochs, and look like scikit-learn's."""

from __future__ import annotations

import inspect
import time
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from cnnrs.classifier import logistic, neighbours, ridge
from cnnrs.classifier.labelled import Standard, Targets, as_rows, chunks
from cnnrs.features.features import Features

ProbeHead = Literal["logistic", "ridge", "knn"]
PROBE_HEADS: tuple[str, ...] = get_args(ProbeHead)
# Of the rows, where none are given to choose by.
_HELD = 0.2


class Probe:
    """A classifier on features: scikit-learn's interface, a module for PyTorch.

    Args:
        head: "logistic": logistic regression; "ridge": regression on plus and minus one, solved in one go; "knn": the
            most similar rows vote.
        penalty: on the squares of the weights, of features that were centred and divided by one number so that the
            squares of a row add up to 1 on average. "logistic" adds half of it to the mean log loss, "ridge" all of
            it to the mean square error. None: the one that predicts held-out rows best.
        balance: whether all classes weigh the same, as scikit-learn's ``class_weight="balanced"``.
        k: of "knn": how many rows vote; None: the number that predicts held-out rows best.
        seed: which rows are held out; the same seed gives the same bits.

    Attributes:
        classes_: (C,) labels, sorted; 0 to C-1 where a row can have several.
        penalty_: the penalty that was used; None for "knn".
        k_: the number of neighbours that was used; None for the others.
        loss_: mean log loss of the held-out rows, by the head that had not seen them; None where none were held out.
        seconds_: what fitting took.
        n_features_in_: D, numbers per row.

    Example:
        >>> rows = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
        >>> kinds = ["big" if row[0] > 0 else "small" for row in rows]
        >>> Probe("ridge").fit(rows[:40], kinds[:40]).score(rows[40:], kinds[40:]) > 0.8
        True
    """

    _estimator_type = "classifier"

    def __init__(
        self,
        head: str = "logistic",
        *,
        penalty: float | None = None,
        balance: bool = False,
        k: int | None = None,
        seed: int = 0,
    ) -> None:
        self.head = head
        self.penalty = penalty
        self.balance = balance
        self.k = k
        self.seed = seed

    # -- fitting -----------------------------------------------------------------------------------------------

    def fit(self, features: Any, labels: Any, valid: tuple[Any, Any] | None = None, classes: Any = None) -> Probe:
        """Solve for the head.

        Args:
            features: (N, ...) rows, flattened to (N, D): a tensor, an array (also memory-mapped), or
                :class:`cnnrs.Features`; any real dtype.
            labels: (N,) integers or strings; or (N, C) zeros and ones where a row can have several labels.
            valid: features and labels that choose penalty (``k``) and how sure scores are. None: a stratified fifth of
                the rows does, then all rows are solved for with that.
            classes: all labels there can be, where some may have no row; None: those that occur.

        Returns:
            Itself.

        Raises:
            ValueError: lengths differ, there is one class only, a row is not finite, or an option is wrong.
        """
        begin = time.perf_counter()
        self._check()
        rows = as_rows(features)
        targets = Targets.of(labels, len(rows), classes)
        if not targets.several and len(targets.classes) < 2:
            raise ValueError(f"at least two classes are needed, all {len(rows):,} labels are {targets.classes[0]!r}")
        parts = self._parts(features, rows, targets, valid)
        if self.head == "knn":
            self._fit_knn(rows, targets, *parts)
        else:
            self._fit_linear(rows, targets, *parts)
        self.classes_ = targets.classes
        self.n_features_in_ = rows.shape[1]
        self._several = targets.several
        self.seconds_ = time.perf_counter() - begin
        return self

    def _check(self) -> None:
        if self.head not in PROBE_HEADS:
            raise ValueError(f"head must be one of {', '.join(PROBE_HEADS)}, got {self.head!r}")
        if self.penalty is not None and not 0 < self.penalty < float("inf"):
            raise ValueError(f"penalty must be a positive number, or None to have it chosen, got {self.penalty!r}")

    def _parts(
        self, features: Any, rows: Tensor, targets: Targets, valid: tuple[Any, Any] | None
    ) -> tuple[Tensor | None, int, tuple[Tensor, Targets] | None]:
        """Order of the rows, how many of them come before those held out, and rows that were given to hold out."""
        if valid is not None:
            seen, known = valid
            held = as_rows(seen, "validation features")
            if held.shape[1] != rows.shape[1]:
                raise ValueError(
                    f"the features have {rows.shape[1]} numbers per row, the validation features {held.shape[1]}"
                )
            return None, len(rows), (held, targets.like(known, len(held)))
        if self.head == "logistic" and self.penalty is not None:
            return None, len(rows), None
        train, out = targets.hold_out(_HELD, self.seed, features)
        return torch.cat([train, out]), len(train), None

    def _fit_linear(
        self, rows: Tensor, targets: Targets, order: Tensor | None, count: int, valid: tuple[Tensor, Targets] | None
    ) -> None:
        standard = Standard.of(rows, order)
        ordered = targets if order is None else targets.take(order)
        held, everything = _shares(standard.rows, ordered, count)
        if valid is not None:
            held = standard.like(valid[0], "validation features"), valid[1]
        solve = logistic.solve if self.head == "logistic" else ridge.solve
        found = solve(
            standard.rows[:count], ordered.take(slice(count)), held,
            penalty=self.penalty, balance=self.balance, everything=everything,
        )  # fmt: skip
        # What was done to the rows becomes part of the layer.
        weight = found.weight / standard.scale
        bias = found.bias - weight @ standard.mean
        weight, bias = (logistic.spread(one, targets) for one in (weight.T, bias.unsqueeze(0)))
        layer = nn.Linear(rows.shape[1], len(targets.classes))
        with torch.no_grad():
            layer.weight.copy_(weight.T)
            layer.bias.copy_(bias[0])
        self._module: nn.Module = layer.eval()
        self.penalty_: float | None = found.penalty
        self.k_: int | None = None
        self.loss_ = found.loss

    def _fit_knn(
        self, rows: Tensor, targets: Targets, order: Tensor | None, count: int, valid: tuple[Tensor, Targets] | None
    ) -> None:
        same = neighbours.unit(rows, order)
        ordered = targets if order is None else targets.take(order)
        held, everything = _shares(same, ordered, count)
        if valid is not None:
            held = neighbours.unit(valid[0], what="validation features"), valid[1]
        head, self.loss_ = neighbours.solve(
            same[:count], ordered.take(slice(count)), held, k=self.k, balance=self.balance, everything=everything,
            dtype=torch.float16 if rows.dtype == torch.float16 else torch.float32,
        )  # fmt: skip
        self._module = head.cpu()
        self.penalty_, self.k_ = None, head.k

    # -- predicting --------------------------------------------------------------------------------------------

    def module(self) -> nn.Module:
        """The head in eval mode, (N, D) float32 features to (N, C) scores, whose softmax are the probabilities.

        Where a row can have several labels it is their sigmoid. An ``nn.Linear``; for "knn" a module of buffers only.

        Raises:
            ValueError: nothing was fitted.
        """
        if not self.__sklearn_is_fitted__():
            raise ValueError("nothing was fitted yet: call fit(features, labels)")
        return self._module

    def predict(self, features: Any) -> np.ndarray:
        """(N,) labels of (N, ...) features; where a row can have several, (N, C) zeros and ones."""
        scores = self._scores(features)
        if self._several:
            return (scores > 0).long().numpy()
        taken: np.ndarray = self.classes_[scores.argmax(dim=1).numpy()]
        return taken

    def predict_proba(self, features: Any) -> np.ndarray:
        """(N, C) float32 probabilities; rows add up to 1, but where a row can have several labels."""
        scores = self._scores(features)
        return (scores.sigmoid() if self._several else scores.softmax(dim=1)).numpy()

    def decision_function(self, features: Any) -> np.ndarray:
        """(N, C) float32 scores; of two classes (N,), how much more is said for the second."""
        scores = self._scores(features)
        if not self._several and scores.shape[1] == 2:
            return (scores[:, 1] - scores[:, 0]).numpy()
        return scores.numpy()

    def score(self, features: Any, labels: Any) -> float:
        """The share of rows, 0 to 1, whose label (all labels, where there can be several) is predicted."""
        taken = self.predict(features)
        true = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
        if true.shape != taken.shape:
            raise ValueError(f"labels of shape {taken.shape} are needed for these features, got {true.shape}")
        return float((taken == true).reshape(len(true), -1).all(axis=1).mean())

    @torch.no_grad()
    def _scores(self, features: Any) -> Tensor:
        module = self.module()
        rows = as_rows(features)
        if rows.shape[1] != self.n_features_in_:
            raise ValueError(f"features of {self.n_features_in_} numbers per row were fitted, got {rows.shape[1]}")
        return torch.cat([module(part.cpu()) for _, part in chunks(rows)])

    # -- what scikit-learn asks ---------------------------------------------------------------------------------

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments it was made with."""
        return {name: getattr(self, name) for name in _PARAMETERS}

    def set_params(self, **params: Any) -> Probe:
        """Change arguments; they count from the next ``fit`` on.

        Raises:
            ValueError: there is no such argument.
        """
        for name, value in params.items():
            if name not in _PARAMETERS:
                raise ValueError(f"there is no parameter {name!r}, only {', '.join(_PARAMETERS)}")
            setattr(self, name, value)
        return self

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "_module")

    def __sklearn_tags__(self) -> Any:
        # Only scikit-learn asks, which is loaded then.
        from sklearn.utils import ClassifierTags, InputTags, Tags, TargetTags

        return Tags(
            estimator_type="classifier",
            target_tags=TargetTags(required=True, multi_output=True),
            classifier_tags=ClassifierTags(multi_label=True),
            input_tags=InputTags(),
        )

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={getattr(self, name)!r}" for name in _PARAMETERS[1:] if getattr(self, name))
        return f"Probe({self.head!r}{', ' if arguments else ''}{arguments})"


_PARAMETERS = tuple(inspect.signature(Probe).parameters)


def probe(features: Any, labels: Any = None, head: str = "logistic", **options: Any) -> Probe:
    """Train a classifier on features, without epochs.

    Args:
        features: :class:`cnnrs.Features`, or (N, ...) rows as a tensor or an array, flattened to (N, D).
        labels: (N,) integers or strings, or (N, C) zeros and ones where a row can have several; None: those of the
            features.
        head: "logistic", "ridge" or "knn".
        options: ``penalty``, ``balance``, ``k``, ``seed`` of :class:`Probe`, ``valid`` and ``classes`` of its ``fit``.

    Returns:
        A fitted :class:`Probe`: ``predict``, ``predict_proba``, ``score``, and ``module()`` for PyTorch.

    Raises:
        ValueError: lengths differ, there is one class only, a row is not finite, or an option is wrong.

    Example:
        >>> import torch, cnnrs
        >>> features = cnnrs.Features(torch.eye(8).repeat(3, 1), torch.arange(24) % 2)
        >>> head = cnnrs.probe(features)
        >>> head.score(*features), head.module()
        (1.0, Linear(in_features=8, out_features=2, bias=True))
    """
    if labels is None:
        if not isinstance(features, Features):
            raise ValueError(f"labels are missing: only cnnrs.Features bring theirs, not a {type(features).__name__}")
        labels = features.labels
    valid, classes = options.pop("valid", None), options.pop("classes", None)
    return Probe(head, **options).fit(features, labels, valid, classes)


def _shares(
    rows: Tensor, targets: Targets, count: int
) -> tuple[tuple[Tensor, Targets] | None, tuple[Tensor, Targets] | None]:
    """What is behind the first rows, to choose by, and all of them; None twice where there is nothing behind."""
    if count == len(rows):
        return None, None
    return (rows[count:], targets.take(slice(count, None))), (rows, targets)
