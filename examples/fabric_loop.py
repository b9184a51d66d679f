"""Trains in a loop of Fabric, in bfloat16.

    pip install quadstep lightning
    python examples/fabric_loop.py

With clipping; the state is saved and loaded at the end.
"""

import torch
from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from quadstep import LQA

torch.manual_seed(0)
inputs = torch.randn(1024, 10)
labels = inputs[:, :3].argmax(1)
loader = DataLoader(TensorDataset(inputs[:768], labels[:768]), 32, shuffle=True)

fabric = Fabric(accelerator="cpu", precision="bf16-mixed")
model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 3))
criterion = nn.CrossEntropyLoss()
opt = LQA(model.parameters(), model=model, criterion=criterion)
model, opt = fabric.setup(model, opt)
for epoch in range(10):
    model.train()
    for x, y in fabric.setup_dataloaders(loader):
        opt.zero_grad()
        fabric.backward(criterion(model(x), y))
        fabric.clip_gradients(model, opt, max_norm=1.0)
        opt.step()
    model.eval()
    with opt.averaged(), torch.no_grad():
        accuracy = (model(inputs[768:]).argmax(1) == labels[768:]).float().mean()
    print(f"epoch {epoch}  rate {opt.rate:.1e}  accuracy {accuracy:.3f}")
fabric.save("fabric_loop.ckpt", {"model": model, "opt": opt})
fabric.load("fabric_loop.ckpt", {"model": model, "opt": opt})  # training goes on bit for bit
