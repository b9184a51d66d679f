"""Lightning's trainer with `LQACallback`, against plain loops with a closure."""

import copy
import csv
import re
import runpy
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from quadstep import LQA, Reason

lightning = pytest.importorskip("lightning", reason="lightning is not installed")

from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402
from lightning.pytorch.plugins.precision import MixedPrecision  # noqa: E402
from torchmetrics import CatMetric, MeanMetric, MetricCollection  # noqa: E402
from torchmetrics.classification import (  # noqa: E402
    MulticlassAccuracy,
    MulticlassPrecision,
)

from quadstep.integrations.lightning import LQACallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::Warning:lightning")

EXAMPLE = Path(__file__).parents[2] / "examples" / "lightning_trainer.py"
BATCH = 32


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(256, 10, generator=generator)
    return TensorDataset(inputs, inputs[:, :3].argmax(1))


def network(dropout=0.2):
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(10, 32),
        torch.nn.BatchNorm1d(32),
        torch.nn.ReLU(),
        torch.nn.Dropout(dropout),
        torch.nn.Linear(32, 3),
    )


class Module(lightning.LightningModule):
    """Counts the calls of its training step with and without gradients."""

    def __init__(self, model, **options):
        super().__init__()
        self.model, self.options = model, options
        self.passes = self.probes = 0

    def configure_optimizers(self):
        return LQA(self.parameters(), **self.options)

    def training_step(self, batch):
        self.passes += torch.is_grad_enabled()
        self.probes += not torch.is_grad_enabled()
        x, y = batch
        return cross_entropy(self.model(x), y)

    def validation_step(self, batch, _):
        x, y = batch
        self.log("validation", cross_entropy(self.model(x), y))


def trainer(*callbacks, **options):
    defaults = {
        "max_epochs": 4,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": any(isinstance(part, ModelCheckpoint) for part in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return lightning.Trainer(callbacks=[LQACallback(), *callbacks], **defaults | options)


def fit(module, data, *callbacks, held_out=None, resumed=None, **options):
    torch.manual_seed(1)
    fitted = trainer(*callbacks, **options)
    fitted.fit(module, DataLoader(data, BATCH), held_out, ckpt_path=resumed)
    return fitted


def are_equal(one, other):
    return all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


def loop(model, data, epochs=4, **options):
    """The plain loop with a closure, its model left with the averaged weights."""
    torch.manual_seed(1)
    optimizer = LQA(model.parameters(), **options)
    model.train()
    for _ in range(epochs):
        for x, y in DataLoader(data, BATCH):
            optimizer.step(lambda x=x, y=y: cross_entropy(model(x), y))
    optimizer.eval()
    return optimizer


@pytest.mark.parametrize("options", [{}, {"direction": "gradient", "averaging": None}], ids=str)
def test_the_trainer_takes_the_steps_of_a_plain_loop(data, options):
    module, model = Module(network(), **options), network()
    (optimizer,) = fit(module, data).optimizers
    plain = loop(model, data, **options)
    assert are_equal(module.model, model)
    assert optimizer.report == plain.report
    assert plain.report.counts.keys() - {Reason.REUSED}


def test_probes_run_no_backward_pass(data):
    module = Module(network(), every=1)
    (optimizer,) = fit(module, data, max_epochs=1).optimizers
    assert module.passes == len(data) // BATCH
    assert module.probes >= module.passes
    assert optimizer.report.backwards == 1


class Logging(Module):
    """Logs and updates metrics in its training step."""

    def __init__(self, model, **options):
        super().__init__(model, **options)
        self.loss, self.losses = MeanMetric(), CatMetric()
        parts = (MulticlassAccuracy(3), MulticlassPrecision(3))
        self.scores = MetricCollection(parts)
        self.seen = []

    def training_step(self, batch, _):
        x, y = batch
        logits = self.model(x)
        loss = cross_entropy(logits, y)
        self.losses.update(loss)
        self.scores.update(logits, y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"twice": 2 * loss, "mean": self.loss(loss)}, on_epoch=True)
        return {"loss": loss, "logits": logits}

    def on_train_batch_end(self, outputs, *_):
        self.seen.append(outputs["loss"])

    def on_train_epoch_end(self):
        seen = torch.stack(self.seen)
        assert torch.equal(self.losses.compute(), seen)
        assert [metric.update_count for metric in self.scores.values()] == [len(seen)] * 2
        self.log_dict(self.scores.compute())


def test_logs_and_metrics_count_a_training_step_once(data):
    module = Logging(network(), every=1)
    logged = fit(module, data, max_epochs=1).callback_metrics
    mean = torch.stack(module.seen).mean()
    torch.testing.assert_close(logged["loss_epoch"], mean)
    torch.testing.assert_close(logged["mean_epoch"], mean)
    torch.testing.assert_close(logged["twice_epoch"], 2 * mean)
    assert 0.0 < logged["MulticlassAccuracy"] < 1.0


def test_the_rate_and_the_metrics_are_logged(data, tmp_path):
    logger = CSVLogger(tmp_path)
    fitted = fit(Module(network()), data, logger=logger, log_every_n_steps=4)
    (optimizer,) = fitted.optimizers
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["lqa/rate"]]
    assert [int(row["step"]) for row in rows] == list(range(3, 32, 4))
    assert optimizer.metrics().keys() <= rows[-1].keys()
    assert float(rows[-1]["lqa/rate"]) == pytest.approx(optimizer.rate)
    assert float(rows[-1]["lqa/loss"]) == pytest.approx(optimizer.report.loss)


def test_accumulation_and_clipping_are_those_of_a_full_batch(data):
    """Of the default two micro-batches make one step, whose gradients are clipped together."""
    module, model = Module(network(0.0).double()), network(0.0).double()
    for net in (module.model, model):
        net[1] = torch.nn.Identity()  # its statistics are those of a micro-batch
    data = TensorDataset(data.tensors[0].double(), data.tensors[1])
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "precision": "64-true"}
    (optimizer,) = fit(module, data, **options).optimizers
    plain = LQA(model.parameters())
    for _ in range(4):
        for x, y in DataLoader(data, 2 * BATCH):
            plain.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            plain.step(lambda x=x, y=y: cross_entropy(model(x), y), loss=loss)
    plain.eval()
    assert optimizer.report.counts == plain.report.counts
    assert optimizer.report.loss == pytest.approx(plain.report.loss)
    for one, other in zip(module.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "options",
    [
        lambda: {"precision": "bf16-mixed"},
        lambda: {"plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))},
    ],
    ids=["bf16-mixed", "16-mixed"],
)
def test_mixed_precision_trains(data, options):
    module = Module(network(), every=1)
    fitted = fit(module, data, gradient_clip_val=1.0, max_epochs=8, **options())
    (optimizer,) = fitted.optimizers
    x, y = data.tensors
    assert cross_entropy(module.model(x), y) < 0.5
    counts = optimizer.report.counts
    assert sum(counts.values()) > 60
    assert module.probes > 60
    assert optimizer.report.backwards <= 1


def test_checkpoints_hold_the_averaged_weights(data, tmp_path):
    """After validation and within an epoch, with and without the state of the optimizer."""
    x, y = data.tensors
    held_out = DataLoader(data, 256)
    validated = ModelCheckpoint(tmp_path, "{epoch}-{validation:.9f}", "validation", save_top_k=-1)
    steps = ModelCheckpoint(tmp_path, "steps", every_n_train_steps=19)
    weights = ModelCheckpoint(tmp_path, "weights", every_n_train_steps=17, save_weights_only=True)
    averages = {}

    class Averages(lightning.Callback):
        def on_train_batch_end(self, fitted, module, *_):
            with fitted.optimizers[0].averaged():
                averages[fitted.global_step] = copy.deepcopy(module.state_dict())

    module = Module(network())
    kept = (validated, steps, weights, Averages())
    fit(module, data, *kept, held_out=held_out)
    files = sorted(tmp_path.glob("epoch=*"))
    assert len(files) == 4
    for file in files:
        reported = float(file.stem.split("validation=")[1])
        other = Module(network())
        other.load_state_dict(torch.load(file, weights_only=True)["state_dict"])
        scored = cross_entropy(other.model.eval()(x), y).item()
        assert scored == pytest.approx(reported, abs=1e-6)
        (row,) = trainer().validate(Module(network()), held_out, ckpt_path=file, verbose=False)
        assert row["validation"] == pytest.approx(reported, abs=1e-6)
    for name, count in (("steps", 19), ("weights", 17)):
        saved = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)
        assert saved["global_step"] == count
        assert ("optimizer_states" in saved) == (name == "steps")
        assert all(map(torch.equal, saved["state_dict"].values(), averages[count].values()))


def test_fit_goes_on_bit_for_bit_from_any_checkpoint(data, tmp_path):
    """Also from one within an epoch, where Lightning begins the data anew: batches are equal."""
    batch = TensorDataset(*(torch.cat([part] * 8) for part in data[:BATCH]))
    held_out = DataLoader(data, 256)
    module = Module(network(0.0))
    validated = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, monitor="validation")
    steps = ModelCheckpoint(tmp_path, "steps", every_n_train_steps=19)
    fit(module, batch, validated, steps, held_out=held_out)
    for name in ("epoch=1", "steps"):
        other = Module(network(0.0))
        fit(other, batch, held_out=held_out, resumed=tmp_path / f"{name}.ckpt")
        assert 0 < other.passes < module.passes
        assert are_equal(module.model, other.model)


def test_the_sanity_check_changes_nothing(data):
    held_out = DataLoader(data, 256)
    models = []
    for count in (0, 2):
        module = Module(network(0.0))
        fit(module, data, held_out=held_out, num_sanity_val_steps=count, max_epochs=1)
        models.append(module.model)
    assert are_equal(*models)


def test_validation_within_an_accumulated_step_changes_nothing(data):
    models = []
    for interval in (1.0, 0.25):
        module = Module(network(0.0))
        options = {"val_check_interval": interval, "accumulate_grad_batches": 4}
        fit(module, data, held_out=DataLoader(data, 256), **options)
        models.append(module.model)
    assert are_equal(*models)


def test_early_stopping_and_short_runs(data):
    stopping = EarlyStopping("validation", patience=1, min_delta=10.0)
    held_out = DataLoader(data, 256)
    module = Module(network())
    assert fit(module, data, stopping, held_out=held_out, max_epochs=9).current_epoch == 2
    module = Module(network())
    fit(module, data, fast_dev_run=True, held_out=held_out)
    assert module.passes == 1


class Manual(Module):
    """Several optimizers, the first with a closure, the last without."""

    automatic_optimization = False

    def __init__(self, model):
        super().__init__(model)
        self.other, self.last = network(0.0), network(0.0)
        self.criterion = torch.nn.CrossEntropyLoss()

    def configure_optimizers(self):
        return (
            LQA(self.model.parameters(), every=1),
            torch.optim.SGD(self.other.parameters(), 0.1),
            LQA(self.last.parameters(), model=self.last, criterion=self.criterion),
        )

    def training_step(self, batch, _):
        x, y = batch
        first, other, last = self.optimizers()
        first.step(lambda: cross_entropy(self.model(x), y))
        for optimizer, net in ((other, self.other), (last, self.last)):
            optimizer.zero_grad()
            self.manual_backward(self.criterion(net(x), y))
            optimizer.step()


def test_manual_optimization_is_that_of_plain_loops(data):
    module = Manual(network(0.0))
    fitted = fit(module, data, held_out=DataLoader(data, 256), log_every_n_steps=1)
    first, _, last = fitted.optimizers
    logged = fitted.callback_metrics
    assert [logged["lqa/rate"], logged["lqa/rate-1"]] == pytest.approx([first.rate, last.rate])
    for net, optimizer, options in (
        (module.model, first, {"every": 1}),
        (module.last, last, {}),
    ):
        model = network(0.0)
        plain = loop(model, data, **options)
        assert are_equal(net, model)
        assert optimizer.report.counts == plain.report.counts
    model = network(0.0)
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(4):
        for x, y in DataLoader(data, BATCH):
            sgd.zero_grad()
            cross_entropy(model(x), y).backward()
            sgd.step()
    assert are_equal(module.other, model)


def test_wrappers_share_the_mode_of_their_optimizer(data):
    """Lightning's own wrapper of an optimizer has the methods of LQA."""
    module = Manual(network(0.0))
    fit(module, data, max_epochs=1)
    wrapper, (optimizer, *_) = module.optimizers()[0], module.trainer.optimizers
    state = copy.deepcopy(optimizer.state_dict())
    wrapper.train()
    training = copy.deepcopy(module.model)
    wrapper.eval()
    assert not are_equal(module.model, training)
    optimizer.load_state_dict(state)
    with wrapper.averaged():
        pass
    wrapper.train()
    assert are_equal(module.model, training)
    assert wrapper.report == optimizer.report


class Plain(Module):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_other_optimizers_are_left_alone(data, tmp_path):
    module, model = Plain(network()), network()
    steps = ModelCheckpoint(tmp_path, "steps", every_n_train_steps=19)
    fit(module, data, steps)
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(4):
        for x, y in DataLoader(data, BATCH):
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
    assert are_equal(module.model, model)


class Interrupted(Module):
    def training_step(self, batch):
        if self.passes == 3:
            raise ValueError("interrupted")
        return super().training_step(batch)

    test_step = Module.validation_step

    def predict_step(self, batch, _):
        return self.model(batch[0])


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_the_averaged_weights_are_evaluated_after_an_interrupt(stage, data):
    module, held_out = Interrupted(network()), DataLoader(data, 256)
    fitted = trainer(max_epochs=1)
    with pytest.raises(ValueError, match="interrupted"):
        fitted.fit(module, DataLoader(data, BATCH))
    with fitted.optimizers[0].averaged():
        averages = copy.deepcopy(module.model)
    assert not are_equal(module.model, averages)
    getattr(fitted, stage)(module, held_out)
    assert are_equal(module.model, averages)
    # Weights that are loaded are evaluated as they are.
    other = network()
    module.model.load_state_dict(other.state_dict())
    getattr(fitted, stage)(module, held_out)
    assert are_equal(module.model, other)


@pytest.mark.parametrize("kind", [Module, Interrupted])
def test_the_module_has_its_methods_back(kind, data):
    module = kind(network())
    raised = pytest.raises(ValueError, match="interrupted")
    with raised if kind is Interrupted else nullcontext():
        fit(module, data, max_epochs=1)
    assert not {"training_step", "on_save_checkpoint", "log"} & vars(module).keys()


class Skipping(Module):
    """Skips every third batch."""

    def training_step(self, batch):
        loss = super().training_step(batch)
        return None if self.passes % 3 == 0 else loss

    def on_train_batch_start(self, *_):
        self.weight = self.model[0].weight.detach().clone()

    def on_train_batch_end(self, *_):
        skipped = self.passes % 3 == 0
        assert torch.equal(self.weight, self.model[0].weight) == skipped


def test_a_batch_may_be_skipped(data):
    module = Skipping(network())
    (optimizer,) = fit(module, data).optimizers
    assert optimizer.report.counts[Reason.NON_FINITE] == module.passes // 3
    assert module.probes > 0


def test_without_the_callback_the_closure_is_run_again_and_nothing_warns(data, recwarn):
    """Its user cannot change that it runs backward."""
    module = Module(network(), every=1)
    fitted = lightning.Trainer(max_epochs=1, accelerator="cpu", logger=False, barebones=True)
    fitted.fit(module, DataLoader(data, BATCH))
    assert module.passes >= 2 * len(data) // BATCH
    assert fitted.optimizers[0].report.backwards >= 2
    assert not [warning for warning in recwarn if "quadstep" in warning.filename]


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLE))
    assert float(re.findall(r"accuracy\W+(\d\.\d+)", capsys.readouterr().out)[-1]) > 0.9
