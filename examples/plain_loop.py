"""A plain PyTorch training loop; only the data loading is from cnnrs.

Usage: python examples/plain_loop.py cat_and_dog
"""

import sys

import torch
from torch import nn
from torchvision import models, transforms

import cnnrs

transform = transforms.Compose(
    [transforms.Resize((128, 128)), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
)
photos = cnnrs.ImageFolder(sys.argv[1], transform)
loader = cnnrs.DataLoader(photos, batch_size=32, shuffle=True, cache="ram")
model = models.resnet18(num_classes=len(photos.classes))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for epoch in range(2):
    total = 0.0
    for images, labels in loader:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        total += loss.item() * len(images)
    print(f"epoch {epoch + 1}: loss {total / len(photos):.4f}")
