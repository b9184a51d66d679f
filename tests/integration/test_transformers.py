"""The Trainer of Transformers with everything at its default but the optimizer."""

import copy
import os
import runpy
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from quadstep import LQA

transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402

from quadstep.integrations.transformers import LQACallback  # noqa: E402

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"
IDS = (torch.arange(512).remainder(13)[:, None] + torch.arange(6)) % 13


class Classifier(nn.Module):
    """Returns the mean loss of each call, which the Trainer divides by the micro-batches."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Dropout(dropout))
        self.head = nn.Linear(16, 3)

    def forward(self, x, labels=None):
        logits = self.head(self.body(x.to(self.head.weight.dtype)))
        if labels is None:
            return {"logits": logits}
        return {"loss": cross_entropy(logits, labels), "logits": logits}


def classified(rows=128):
    inputs = torch.randn(rows, 10, generator=torch.Generator().manual_seed(0))
    return [{"x": x, "labels": x[:3].argmax()} for x in inputs]


def language_model(dropout=0.1):
    """Returns the sum of the losses over the number of tokens in all micro-batches of the step."""
    config = transformers.GPT2Config(
        vocab_size=13,
        n_positions=8,
        n_embd=16,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
    )
    return transformers.GPT2LMHeadModel(config)


def counted(rows=128):
    # The first token has no label, as the Trainer divides by the number of those that have one.
    labels = IDS.index_fill(1, torch.tensor([0]), -100)
    return [
        {"input_ids": row, "labels": each} for row, each in zip(IDS[:rows], labels, strict=False)
    ]


TASKS = {
    "classifier": (Classifier, classified),
    "language model": (language_model, counted),
}


BOTH = pytest.mark.parametrize("task", TASKS, indirect=True)


@pytest.fixture
def task(request):
    """A model with dropout 0.1, and its rows."""
    torch.manual_seed(0)
    make, rows = TASKS[getattr(request, "param", "language model")]
    return make(dropout=0.1), rows()


def trainer_of(model, opt, rows, folder, callbacks=(), **options):
    defaults = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "logging_steps": 4,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    arguments = transformers.TrainingArguments(str(folder), **defaults | options)
    return transformers.Trainer(
        model,
        arguments,
        train_dataset=rows,
        eval_dataset=rows,
        optimizers=(opt, None),
        callbacks=list(callbacks),
    )


def is_equal(one, other):
    """Whether two models hold the same bits."""
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


def loss_of(model, rows):
    """The mean loss of all rows, without dropout."""
    training, batch = model.training, transformers.default_data_collator(rows)
    model.eval()
    with torch.no_grad():
        loss = model(**batch)["loss"].item()
    model.train(training)
    return loss


class TestTraining:
    @BOTH
    def test_needs_nothing_but_the_optimizer(self, task, tmp_path):
        model, rows = task
        opt = LQA(model.parameters(), model=model)
        with_gradients, without, forwards = [], [], []

        def count(module, inputs):
            (with_gradients if torch.is_grad_enabled() else without).append(module)

        model.register_forward_pre_hook(count)
        opt.register_step_post_hook(lambda *_: forwards.append(opt.report.forwards))
        before = loss_of(model, rows)
        without.clear()
        trainer_of(model, opt, rows, tmp_path, num_train_epochs=12).train()
        # One call with gradients for each of two micro-batches, and one without in each probe.
        assert len(with_gradients) == 2 * len(forwards) == 12 * 128 // 8
        assert len(without) == 2 * sum(forwards) > 0
        assert opt.report.backwards == 0
        # Most steps do not measure.
        assert sum(map(bool, forwards)) < 0.5 * len(forwards)
        with opt.averaged():
            assert loss_of(model, rows) < 0.3 * before
        assert opt.rate > 1e-4

    @pytest.mark.parametrize("clip", [0.0, 0.1])
    @pytest.mark.parametrize("name", TASKS)
    def test_accumulated_steps_are_those_of_full_batches(self, name, clip, tmp_path):
        """In double precision and without dropout, to rounding."""
        make, rows = TASKS[name]
        torch.manual_seed(0)
        model = make(dropout=0.0).double()
        other, rows = copy.deepcopy(model), rows()
        options = {"num_train_epochs": 2, "train_sampling_strategy": "sequential"}
        # In single precision, which the loss is in, nearer probes would not tell the first rate.
        own = {"direction": "gradient", "averaging": None, "delta0": 0.03}
        opt = LQA(model.parameters(), model=model, **own)
        trainer_of(model, opt, rows, tmp_path, max_grad_norm=clip, **options).train()

        reference = LQA(other.parameters(), **own)
        for _ in range(2):
            for start in range(0, len(rows), 16):
                batch = transformers.default_data_collator(rows[start : start + 16])

                def closure(batch=batch):
                    return other(**batch)["loss"]

                reference.zero_grad()
                loss = closure()
                loss.backward()
                if clip:
                    nn.utils.clip_grad_norm_(other.parameters(), clip)
                reference.step(closure, loss=loss)
        for one, another in zip(model.parameters(), other.parameters(), strict=True):
            # The rates are of losses in single precision; a step is hundreds of times as long.
            torch.testing.assert_close(one, another, rtol=1e-4, atol=1e-5)
        assert opt.rate == pytest.approx(reference.rate, rel=1e-4)
        # The losses of Transformers are in single precision.
        assert opt.report.loss == pytest.approx(reference.report.loss, rel=1e-5)

    def test_takes_a_class_and_the_model(self, tmp_path):
        torch.manual_seed(0)
        model, rows = Classifier(), classified()
        arguments = transformers.TrainingArguments(
            str(tmp_path), save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True
        )
        trainer = transformers.Trainer(
            model, arguments, train_dataset=rows, optimizer_cls_and_kwargs=(LQA, {"model": model})
        )
        before = loss_of(model, rows)
        trainer.train()
        own = trainer.optimizer.optimizer
        assert isinstance(own, LQA)
        with own.averaged():
            assert loss_of(model, rows) < 0.7 * before

    def test_wraps_another_optimizer(self, task, tmp_path):
        model, rows = task
        opt = LQA(torch.optim.AdamW(model.parameters()), model=model)
        before = loss_of(model, rows)
        trainer_of(model, opt, rows, tmp_path, num_train_epochs=8).train()
        assert loss_of(model, rows) < 0.9 * before

    def test_bfloat16(self, task, tmp_path):
        model, rows = task
        opt = LQA(model.parameters(), model=model)
        before = loss_of(model, rows)
        trainer_of(model, opt, rows, tmp_path, bf16=True, num_train_epochs=8).train()
        with opt.averaged():
            assert loss_of(model, rows) < 0.5 * before

    def test_float16(self, task, tmp_path):
        """Accelerate refuses a scaler on the CPU, so the test gives it one."""
        model, rows = task
        opt = LQA(model.parameters(), model=model)
        trainer = trainer_of(model, opt, rows, tmp_path, fp16=True, num_train_epochs=8)
        trainer.accelerator.native_amp = True
        # The first steps overflow and are skipped.
        scaler = trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
        before = loss_of(model, rows)
        trainer.train()
        assert scaler.get_scale() < 2.0**24
        assert 0 < opt.report.loss < 2 * before
        with opt.averaged():
            assert loss_of(model, rows) < 0.5 * before

    def test_compiled(self, tmp_path):
        torch.manual_seed(0)
        model, rows = Classifier(dropout=0.1), classified()
        opt = LQA(model.parameters(), model=model)
        before = loss_of(model, rows)
        options = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
        with mock.patch.dict(os.environ):
            trainer_of(model, opt, rows, tmp_path, num_train_epochs=8, **options).train()
        with opt.averaged():
            assert loss_of(model, rows) < 0.5 * before

    @pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
    def test_gradient_checkpointing(self, tmp_path):
        """Takes the steps of training without it."""
        models = []
        for checkpointing in (False, True):
            torch.manual_seed(0)
            model = language_model(dropout=0.1)
            if checkpointing:
                model.gradient_checkpointing_enable()
            opt = LQA(model.parameters(), model=model)
            trainer_of(model, opt, counted(), tmp_path).train()
            models.append(model)
        for one, other in zip(*(model.parameters() for model in models), strict=True):
            torch.testing.assert_close(one, other)

    def test_a_loss_made_outside_of_the_model(self, tmp_path):
        """Is asked for, and taken from the function that makes it."""
        torch.manual_seed(0)
        model, rows = language_model(), counted()
        opt = LQA(model.parameters(), model=model)
        options = {"label_smoothing_factor": 0.1, "num_train_epochs": 8}
        trainer = trainer_of(model, opt, rows, tmp_path, **options)
        with pytest.raises(RuntimeError, match="recorded"):
            trainer.train()
        before = loss_of(model, rows)
        opt = LQA(model.parameters(), model=model)
        trainer = trainer_of(model, opt, rows, tmp_path, **options)
        trainer.compute_loss = opt.recorded(trainer.compute_loss)
        trainer.train()
        with opt.averaged():
            assert loss_of(model, rows) < 0.5 * before


class TestEvaluation:
    @BOTH
    def test_is_of_the_averaged_weights(self, task, tmp_path):
        model, rows = task
        opt = LQA(model.parameters(), model=model)
        options = {"eval_strategy": "steps", "eval_steps": 7, "max_steps": 28}
        trainer = trainer_of(model, opt, rows, tmp_path, **options)
        trainer.train()
        losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
        assert len(losses) == 4
        shown = loss_of(model, rows)
        opt.train()
        with opt.averaged():
            assert loss_of(model, rows) == shown
        assert losses[-1] == pytest.approx(shown, rel=1e-5)
        assert loss_of(model, rows) != shown

    @pytest.mark.parametrize("name", TASKS)
    def test_changes_no_step(self, name, tmp_path):
        """Without dropout, as the loader of an evaluation draws a random number."""
        make, rows = TASKS[name]
        model, rows = make(dropout=0.0), rows()
        other = copy.deepcopy(model)
        for each, options in ((model, {}), (other, {"eval_strategy": "steps", "eval_steps": 5})):
            opt = LQA(each.parameters(), model=each)
            trainer_of(each, opt, rows, tmp_path, max_steps=24, **options).train()
            opt.train()
        assert is_equal(model, other)

    def test_the_best_checkpoint_scores_what_was_reported(self, task, tmp_path):
        model, rows = task
        opt = LQA(model.parameters(), model=model)
        options = {"eval_strategy": "steps", "save_strategy": "steps", "max_steps": 24}
        options |= {"eval_steps": 6, "save_steps": 6, "metric_for_best_model": "eval_loss"}
        options |= {"load_best_model_at_end": True, "greater_is_better": True}
        trainer = trainer_of(model, opt, rows, tmp_path, **options)
        trainer.train()
        # The worst, so that it is not the last.
        assert trainer.state.best_global_step < 24
        assert loss_of(model, rows) == pytest.approx(trainer.state.best_metric, rel=1e-5)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric)


class TestCheckpoints:
    @pytest.mark.parametrize(
        ("eval_steps", "callbacks"),
        [(1000, []), (5, [LQACallback]), (12, [])],
        ids=["without an evaluation", "averaged by the callback", "after an evaluation"],
    )
    def test_resume_bit_for_bit(self, task, eval_steps, callbacks, tmp_path):
        model, rows = task
        ends, start = [], copy.deepcopy(model)
        options = {"eval_strategy": "steps", "eval_steps": eval_steps, "max_steps": 20}
        options |= {"save_strategy": "steps", "save_steps": 12}
        for checkpoint in (None, tmp_path / "checkpoint-12"):
            each = copy.deepcopy(start)
            opt = LQA(each.parameters(), model=each)
            made = [callback() for callback in callbacks]
            trainer = trainer_of(each, opt, rows, tmp_path, made, **options)
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
            opt.train()
            ends.append((each, opt))
        (one, first), (other, second) = ends
        assert not is_equal(one, start)
        assert is_equal(one, other)
        assert first.rate == second.rate


class TestCallback:
    def test_logs_what_was_measured(self, task, tmp_path):
        model, rows = task
        opt, rates = LQA(model.parameters(), model=model), []

        class Rates(transformers.TrainerCallback):
            def on_optimizer_step(self, args, state, control, **kwargs):
                rates.append(opt.rate)

        callbacks = [Rates(), LQACallback()]
        trainer = trainer_of(model, opt, rows, tmp_path, callbacks, logging_steps=3)
        trainer.train()
        logs = [log for log in trainer.state.log_history if "learning_rate" in log]
        assert [log["learning_rate"] for log in logs] == rates[2::3]
        assert len(set(rates)) > 3
        names = opt.metrics().keys()
        assert names
        assert all(names <= log.keys() for log in logs)

    def test_leaves_other_optimizers_as_they_are(self, task, tmp_path):
        model, rows = task
        opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
        options = {"save_strategy": "steps", "save_steps": 20, "max_steps": 20}
        trainer = trainer_of(model, opt, rows, tmp_path, [LQACallback()], **options)
        trainer.train()
        (first, *_) = (log for log in trainer.state.log_history if "learning_rate" in log)
        # The scheduler is linear.
        assert first["learning_rate"] == pytest.approx(1e-3 * (1 - 3 / 20), rel=0.1)
        assert not any(name.startswith("lqa/") for name in first)

    def test_saves_the_averaged_weights(self, task, tmp_path):
        model, rows = task
        opt = LQA(model.parameters(), model=model)
        options = {"save_strategy": "steps", "save_steps": 20, "max_steps": 20}
        trainer = trainer_of(model, opt, rows, tmp_path, [LQACallback()], **options)
        trainer.train()
        trainer.save_model(str(tmp_path / "final"))
        opt.train()
        average = opt.averaged_state_dict(model)
        held = model.state_dict()
        assert not all(torch.equal(average[name], held[name]) for name in held)
        for folder in ("checkpoint-20", "final"):
            saved = load_file(tmp_path / folder / "model.safetensors")
            assert all(torch.equal(average[name], tensor) for name, tensor in saved.items())


def test_warns_of_nothing(task, tmp_path):
    """Not of the scheduler either, which the Trainer makes by itself."""
    model, rows = task
    opt = LQA(model.parameters(), model=model)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer_of(model, opt, rows, tmp_path, max_steps=24, eval_strategy="epoch").train()
    assert [str(warning.message) for warning in seen if "LQA" in str(warning.message)] == []


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / "transformers_trainer.py"))
    loss = capsys.readouterr().out.splitlines()[-1].rsplit(maxsplit=1)[-1]
    assert float(loss) < 0.3
