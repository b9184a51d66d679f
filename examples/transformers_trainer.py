"""Transformers: a small BERT learns which of two kinds of token is more frequent.

    python examples/transformers_trainer.py

Accumulation, clipping, evaluation and checkpoints are the Trainer's. There is no learning rate and
no schedule.
"""

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from quadstep import LQA
from quadstep.integrations.transformers import LQACallback


def rows(count: int) -> list[dict[str, torch.Tensor]]:
    """Sequences of 8 tokens, labelled by whether most of them are below 10."""
    ids = torch.randint(0, 20, (count, 8))
    return [{"input_ids": row, "labels": (row < 10).sum().gt(4).long()} for row in ids]


torch.manual_seed(0)
config = BertConfig(
    vocab_size=20,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=8,
)
model = BertForSequenceClassification(config)
arguments = TrainingArguments(
    "transformers_trainer",
    num_train_epochs=8,
    per_device_train_batch_size=16,
    gradient_accumulation_steps=2,
    eval_strategy="epoch",
    save_strategy="epoch",
    save_total_limit=1,
    load_best_model_at_end=True,
    logging_steps=32,
    report_to=[],
    use_cpu=True,
)
trainer = Trainer(
    model,
    arguments,
    train_dataset=rows(512),
    eval_dataset=rows(512),
    optimizers=(LQA(model.parameters(), model=model), None),
    callbacks=[LQACallback()],  # optional: logs the measured rate, saves averaged weights
)
trainer.train()
print(f"loss on new sequences: {trainer.evaluate()['eval_loss']:.3f}")
