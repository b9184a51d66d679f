"""TRL: supervised fine-tuning of a small random GPT-2 with a tokenizer made here.

    python examples/trl_sft.py

Nothing is downloaded.
"""

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from quadstep import LQA

words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
vocabulary = {word: number for number, word in enumerate(["<eos>", "<unk>", *words])}
made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
made.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=made, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>"
)
texts = [" ".join(words[i:] + words[:i]) for i in range(len(words))]
data = Dataset.from_dict({"text": texts * 16})

torch.manual_seed(0)
config = GPT2Config(
    vocab_size=len(vocabulary),
    n_positions=16,
    n_embd=32,
    n_layer=2,
    n_head=2,
    bos_token_id=0,
    eos_token_id=0,
)
model = GPT2LMHeadModel(config)
opt = LQA(model.parameters(), model=model)
arguments = SFTConfig(
    "trl_sft", num_train_epochs=10, per_device_train_batch_size=8, report_to=[], use_cpu=True
)
trainer = SFTTrainer(
    model,
    arguments,
    train_dataset=data,
    processing_class=tokenizer,
    optimizers=(opt, None),
)
# This trainer computes the loss from what the model returns.
trainer.compute_loss = opt.recorded(trainer.compute_loss)
trainer.train()
print(f"loss of the averaged weights: {trainer.evaluate(data)['eval_loss']:.3f}")
