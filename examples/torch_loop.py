"""Trains a small network in a loop that calls `backward` and `step()`.

    pip install quadstep
    python examples/torch_loop.py

The loop is that of any optimizer of torch, with clipping; validation runs within `averaged()`.
"""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from quadstep import LQA

torch.manual_seed(0)
inputs = torch.randn(1024, 10)
labels = inputs[:, :3].argmax(1)
loader = DataLoader(TensorDataset(inputs[:768], labels[:768]), 32, shuffle=True)

model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 3))
criterion = nn.CrossEntropyLoss()
opt = LQA(model.parameters(), model=model, criterion=criterion)
for epoch in range(10):
    model.train()
    for x, y in loader:
        opt.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
    model.eval()
    with opt.averaged(), torch.no_grad():
        accuracy = (model(inputs[768:]).argmax(1) == labels[768:]).float().mean()
    print(f"epoch {epoch}  rate {opt.rate:.1e}  accuracy {accuracy:.3f}")
