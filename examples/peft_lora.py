"""PEFT: LoRA adapters of a small GPT-2 learn to count, in Transformers' Trainer.

    python examples/peft_lora.py

Only the adapters and the head train.
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from quadstep import LQA


def rows(count: int) -> list[dict[str, torch.Tensor]]:
    """Sequences of 8 tokens, each one more than the last."""
    ids = [(torch.arange(8) + start) % 16 for start in torch.randint(0, 16, (count,))]
    return [{"input_ids": row, "labels": row} for row in ids]


torch.manual_seed(0)
config = GPT2Config(
    vocab_size=16,
    n_positions=8,
    n_embd=32,
    n_layer=2,
    n_head=2,
    bos_token_id=0,
    eos_token_id=0,
    tie_word_embeddings=False,
)
adapters = LoraConfig(
    r=8, target_modules=["c_attn", "c_fc"], modules_to_save=["lm_head"], fan_in_fan_out=True
)
model = get_peft_model(GPT2LMHeadModel(config), adapters)
arguments = TrainingArguments(
    "peft_lora", num_train_epochs=10, per_device_train_batch_size=32, report_to=[], use_cpu=True
)
trainer = Trainer(
    model,
    arguments,
    train_dataset=rows(512),
    eval_dataset=rows(64),
    optimizers=(LQA(model.parameters(), model=model), None),
)
trainer.train()
print(f"loss on new sequences: {trainer.evaluate()['eval_loss']:.3f}")
model.save_pretrained("peft_lora/adapters")  # the averaged weights, which evaluate() has shown
