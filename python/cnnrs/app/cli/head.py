"""The head of ``cnnrs train``: trained on features, the weights of the best epoch kept."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cnnrs
from cnnrs.app.cli.clock import Clock


def train_head(
    head: nn.Module,
    train: cnnrs.Features,
    valid: cnnrs.Features,
    options: argparse.Namespace,
    clock: Clock,
    say: Callable[[str], None],
) -> tuple[cnnrs.History, int]:
    """Train; leaves the weights of the best epoch in ``head`` and returns its number, counted from 0."""
    # Once more: features that had to be computed have drawn numbers, features that were there have not.
    torch.manual_seed(options.seed)
    loaders = [
        cnnrs.DataLoader(cnnrs.FeatureDataset(*train), batch_size=options.batch_size, shuffle=True),
        cnnrs.DataLoader(cnnrs.FeatureDataset(*valid), batch_size=256),
    ]
    # Layers that were trained before are tuned gently.
    rate = options.lr or (1e-4 if options.head == "classifier" else 1e-3)
    optimizer = torch.optim.AdamW(head.parameters(), lr=rate)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs)
    fit = cnnrs.compile(optimizer=optimizer, loss_fn=F.cross_entropy, verbose=False)
    history = cnnrs.History()
    best, best_state = 0, copy.deepcopy(head.state_dict())
    width = len(str(options.epochs))
    for epoch in range(options.epochs):
        with clock.stage("training"):
            trained = fit(epoch, head, loaders[0], "training")
        with clock.stage("validation"):
            checked = fit(epoch, head, loaders[1], "validation")
        scheduler.step()
        history.append(train=trained, valid=checked)
        if epoch == 0 or _better(history, epoch, best):
            best, best_state = epoch, copy.deepcopy(head.state_dict())
        say(
            f"epoch {epoch + 1:{width}}/{options.epochs}   training: loss {trained[0]:.4f}, {trained[1]:6.2f} %   "
            f"validation: loss {checked[0]:.4f}, {checked[1]:6.2f} %"
        )
    head.load_state_dict(best_state)
    return history, best


def _better(history: cnnrs.History, epoch: int, best: int) -> bool:
    """More photos are right, or as many with a smaller loss."""
    new, old = ((history.val_accuracy[i], -history.val_losses[i]) for i in (epoch, best))
    return new > old


@torch.no_grad()
def scores_of(head: nn.Module, features: Tensor, device: torch.device) -> Tensor:
    """(N, C) float32 outputs of the head on the CPU, of (N, ...) features."""
    head.eval()
    return torch.cat([head(rows.to(device)).float().cpu() for rows in features.split(256)])  # type: ignore[no-untyped-call]
