"""Accelerate: a loop with accumulation, bfloat16 and clipping, saved and resumed.

    python examples/accelerate_loop.py

The loop is the one for AdamW.
"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from quadstep import LQA

torch.manual_seed(0)
x = torch.randn(1024, 10)
y = x[:, :3].argmax(1)
model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 3))
loss_fn = nn.CrossEntropyLoss()
opt = LQA(model.parameters(), model=model, criterion=loss_fn)

accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
net, optimizer, loader = accelerator.prepare(
    model, opt, DataLoader(TensorDataset(x, y), 32, shuffle=True)
)
for epoch in range(10):
    for inputs, targets in loader:
        with accelerator.accumulate(net):
            loss = loss_fn(net(inputs), targets)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    net.eval()
    with opt.averaged(), torch.no_grad():
        accuracy = (net(x).argmax(1) == y).float().mean()
    net.train()
    print(f"epoch {epoch}: accuracy {accuracy:.3f}, rate {opt.rate:.2g}")
accelerator.save_state("accelerate_loop")
accelerator.load_state("accelerate_loop")  # training goes on bit for bit
