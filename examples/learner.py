"""A learner in the manner of fastai: data, model and loop in one object.

Usage: python examples/learner.py cat_and_dog
"""

import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torchvision import models, transforms

import cnnrs


@dataclass
class Learner:
    train: Any
    valid: Any
    model: nn.Module
    history: cnnrs.History = field(default_factory=cnnrs.History)

    def fit_one_cycle(self, epochs: int, lr: float) -> None:
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs + 1)
        fit = cnnrs.compile(optimizer=optimizer, loss_fn=nn.CrossEntropyLoss())
        for epoch in range(epochs):
            trained = fit(epoch, self.model, self.train, "training")
            self.history.append(train=trained, valid=fit(epoch, self.model, self.valid, "validation"))
            schedule.step()


if __name__ == "__main__":
    transform = transforms.Compose([transforms.Resize((128, 128)), transforms.ToTensor()])
    halves = cnnrs.ImageFolder(sys.argv[1], transform).split(0.2)
    loaders = [cnnrs.DataLoader(half, batch_size=32, shuffle=True) for half in halves]
    learner = Learner(*loaders, models.resnet18(num_classes=len(halves[0].classes)))
    learner.fit_one_cycle(2, lr=1e-3)
    print(learner.history)
