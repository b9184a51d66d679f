"""The configurations that guarantees are tested on, and the optimizers that LQA is put around."""

from functools import partial

import torch

from quadstep import LQA

CONFIGURATIONS = {
    "lqa-paper": LQA.paper,
    "lqa": lambda params: LQA(params, direction="gradient", averaging=None),
    "lqa-auto": LQA,
    "lqa(adamw)": lambda params: LQA(torch.optim.AdamW(params, lr=1e-2)),
}

WITH_TRUST_REGION = ("lqa", "lqa-auto", "lqa(adamw)")
"""The configurations that do more than Algorithm 1 says."""

BASES = {
    "sgd": partial(torch.optim.SGD, lr=0.05),
    "momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "nesterov": partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
    "decayed": partial(torch.optim.SGD, lr=0.05, weight_decay=0.1),
    "adagrad": partial(torch.optim.Adagrad, lr=0.05),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.01),
    "adam": partial(torch.optim.Adam, lr=0.01),
    "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
}
