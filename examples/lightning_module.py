"""PyTorch Lightning with the loader of cnnrs.

Usage: python examples/lightning_module.py cat_and_dog
"""

import sys

import lightning
import torch
from torch import nn
from torchvision import models, transforms

import cnnrs


class Classifier(lightning.LightningModule):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.model = models.resnet18(num_classes=num_classes)

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self.model(images), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


if __name__ == "__main__":
    transform = transforms.Compose([transforms.Resize((128, 128)), transforms.ToTensor()])
    photos = cnnrs.ImageFolder(sys.argv[1], transform)
    trainer = lightning.Trainer(max_epochs=2, logger=False, enable_checkpointing=False)
    trainer.fit(Classifier(len(photos.classes)), cnnrs.DataLoader(photos, batch_size=32, shuffle=True))
    print(trainer.callback_metrics)
