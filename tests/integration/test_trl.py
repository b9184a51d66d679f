"""Adapters of PEFT and the SFTTrainer of TRL, on a small random GPT-2."""

import copy
import runpy
from pathlib import Path

import pytest
import torch

from quadstep import LQA

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
trl = pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    # PEFT and TRL use what Transformers has renamed.
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
]

EXAMPLES = Path(__file__).parents[2] / "examples"
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]


def language_model(dropout=0.1):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(WORDS) + 1,
        n_positions=16,
        n_embd=32,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        tie_word_embeddings=False,
    )
    return transformers.GPT2LMHeadModel(config)


def adapted():
    config = peft.LoraConfig(
        r=4,
        target_modules=["c_attn", "c_fc"],
        modules_to_save=["lm_head"],
        lora_dropout=0.1,
        fan_in_fan_out=True,
    )
    return peft.get_peft_model(language_model(), config)


MODELS = pytest.mark.parametrize("make", [language_model, adapted], ids=["all", "adapters"])


def texts():
    """Counting from each word on, in sequences of different lengths."""
    turned = [WORDS[i:] + WORDS[:i] for i in range(len(WORDS))]
    return [" ".join(words[: 4 + i % 5]) for i, words in enumerate(turned * 16)]


def tokenizer():
    vocabulary = {word: number for number, word in enumerate(["<eos>", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<eos>", pad_token="<eos>"
    )


def sft(model, opt, folder, **options):
    defaults = {
        "num_train_epochs": 5,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(str(folder), **defaults | options),
        train_dataset=Dataset.from_dict({"text": texts()}),
        processing_class=tokenizer(),
        optimizers=(opt, None),
    )
    trainer.compute_loss = opt.recorded(trainer.compute_loss)
    return trainer


def frozen(model):
    return {
        name: param.clone() for name, param in model.named_parameters() if not param.requires_grad
    }


class TestPEFT:
    def test_adapters_train_in_the_trainer(self, tmp_path):
        model = adapted()
        opt, body = LQA(model.parameters(), model=model), frozen(model)
        ids = (torch.randint(0, 9, (128, 1)) + torch.arange(6)) % 9
        arguments = transformers.TrainingArguments(
            str(tmp_path),
            num_train_epochs=10,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        # The first token has no label, as the Trainer divides by the number of those that have one.
        labels = ids.index_fill(1, torch.tensor([0]), -100)
        rows = [{"input_ids": row, "labels": each} for row, each in zip(ids, labels, strict=True)]
        trainer = transformers.Trainer(
            model, arguments, train_dataset=rows, eval_dataset=rows, optimizers=(opt, None)
        )
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
        assert after < 0.5 * before
        assert body
        assert all(torch.equal(param, body[name]) for name, param in frozen(model).items())
        assert not [param for param in opt.state if not param.requires_grad]

        model.save_pretrained(str(tmp_path / "adapters"))
        loaded = peft.PeftModel.from_pretrained(language_model(), str(tmp_path / "adapters"))
        with torch.no_grad():
            loss = loaded(input_ids=ids, labels=ids).loss.item()
        assert loss == pytest.approx(after, rel=1e-4)


class TestSFTTrainer:
    @MODELS
    def test_trains(self, make, tmp_path):
        """Also with its defaults: bfloat16, and activations that are computed anew in backward."""
        model = make()
        opt, body = LQA(model.parameters(), model=model), frozen(model)
        trainer = sft(model, opt, tmp_path)
        data = trainer.train_dataset
        before = trainer.evaluate(data)["eval_loss"]
        trainer.train()
        assert opt.rate > 1e-4
        assert trainer.evaluate(data)["eval_loss"] < 0.8 * before
        assert all(torch.equal(param, body[name]) for name, param in frozen(model).items())

    def test_asks_for_the_function_that_makes_the_loss(self, tmp_path):
        model = language_model()
        opt = LQA(model.parameters(), model=model)
        trainer = sft(model, opt, tmp_path)
        del trainer.compute_loss
        with pytest.raises(RuntimeError, match="recorded"):
            trainer.train()

    def test_measures_the_loss_that_is_differentiated(self, tmp_path):
        """The sum over the tokens of all micro-batches by their number."""
        model = language_model(dropout=0.0).double()
        expected = copy.deepcopy(model)
        opt = LQA(model.parameters(), model=model)
        trainer = sft(model, opt, tmp_path, bf16=False, max_steps=1)
        batches = list(trainer.get_train_dataloader())[:2]
        trainer.get_train_dataloader = lambda: batches
        trainer.train()
        losses, tokens = 0.0, 0
        for batch in batches:
            predicted = batch["labels"][:, 1:].ne(-100).sum().item()
            with torch.no_grad():
                inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
                losses += expected(**inputs).loss.item() * predicted
            # Without a `loss_type` in the configuration the Trainer counts first tokens, too.
            tokens += batch["labels"].ne(-100).sum().item()
        assert opt.report.loss == pytest.approx(losses / tokens)

    @MODELS
    def test_resumes_bit_for_bit(self, make, tmp_path):
        ends = []
        for checkpoint in (None, str(tmp_path / "checkpoint-6")):
            model = make()
            opt = LQA(model.parameters(), model=model)
            options = {"save_strategy": "steps", "save_steps": 6, "max_steps": 15}
            sft(model, opt, tmp_path, **options).train(resume_from_checkpoint=checkpoint)
            ends.append(model.state_dict().values())
        assert all(torch.equal(*pair) for pair in zip(*ends, strict=True))


@pytest.mark.parametrize("name", ["peft_lora", "trl_sft"])
def test_the_examples_run(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / f"{name}.py"))
    loss = capsys.readouterr().out.splitlines()[-1].rsplit(maxsplit=1)[-1]
    assert float(loss) < 0.5
