"""The configurations that every promise is tested on."""

import torch

from quadstep import LQA

CONFIGURATIONS = {
    "lqa-paper": LQA.paper,
    "lqa": lambda params: LQA(params, direction="sgd", averaging=None),
    "lqa-auto": LQA,
    "lqa(adamw)": lambda params: LQA(torch.optim.AdamW(params, lr=1e-2)),
}
