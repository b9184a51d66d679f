"""Makes LQA by name, as timm makes its optimizers.

    pip install quadstep timm
    python examples/timm_by_name.py

It is registered once; `create_optimizer_v2` hands further arguments to it.
"""

import timm
import torch
from timm.optim import OptimInfo, create_optimizer_v2
from timm.optim._optim_factory import default_registry

from quadstep import LQA

default_registry.register(OptimInfo("lqa", LQA, description="the learning rate is measured"))

torch.manual_seed(0)
images = torch.randn(256, 1, 32, 32)
labels = (images.mean((1, 2, 3)) > 0).long()
model = timm.create_model("resnet10t", in_chans=1, num_classes=2)
criterion = torch.nn.CrossEntropyLoss()
opt = create_optimizer_v2(model, "lqa", weight_decay=0.05, model=model, criterion=criterion)
for epoch in range(3):
    for rows in torch.randperm(256).split(32):
        opt.zero_grad()
        loss = criterion(model(images[rows]), labels[rows])
        loss.backward()
        opt.step()
    print(f"epoch {epoch}  loss {loss.item():.4f}  rate {opt.rate:.1e}")
