"""Keras on torch with `LQACallback`, against plain loops with a closure."""

import os
import re
import runpy
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from quadstep import LQA

os.environ["KERAS_BACKEND"] = "torch"
keras = pytest.importorskip("keras", reason="keras is not installed")

import numpy as np  # noqa: E402

from quadstep.integrations.keras import LQACallback  # noqa: E402

# Keras' variables are older than NumPy's keyword.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

EXAMPLE = Path(__file__).parents[2] / "examples" / "keras_fit.py"
BATCH = 32


@pytest.fixture(scope="module")
def data():
    inputs = np.random.default_rng(0).standard_normal((256, 10)).astype("float32")
    return inputs, inputs[:, :3].argmax(1)


def network(dropout=0.2):
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.layers.Input((10,)),
            keras.layers.Dense(32),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.Dropout(dropout, seed=0),
            keras.layers.Dropout(dropout),  # draws from torch's own generator
            keras.layers.Dense(3, kernel_regularizer="l2"),
        ]
    )


def compiled(model):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(loss=loss, metrics=["accuracy"])
    return model


class Seeded(keras.callbacks.Callback):
    """Seeds each batch, since Keras draws from torch's generator in between."""

    def on_train_batch_begin(self, batch, logs=None):
        torch.manual_seed(batch)


def fit(model, data, *callbacks, epochs=4, **options):
    callback = LQACallback(**options.pop("lqa", {}))
    history = model.fit(
        *data,
        BATCH,
        epochs,
        callbacks=[callback, Seeded(), *callbacks],
        shuffle=False,
        verbose=0,
        **options,
    )
    return callback, history.history


def loop(model, data, epochs=4, **options):
    """The plain loop; left with the averaged weights."""
    batches = DataLoader(TensorDataset(*map(torch.as_tensor, data)), BATCH)
    optimizer = LQA([weight.value for weight in model.trainable_variables], **options)
    state = [variable.value for variable in model.non_trainable_variables]
    for _ in range(epochs):
        for number, (x, y) in enumerate(batches):
            torch.manual_seed(number)
            before, first = [value.detach().clone() for value in state], []

            def closure(x=x, y=y, before=before, first=first):
                if first:  # a probe
                    for value, old in zip(state, before, strict=True):
                        value.data.copy_(old)
                loss = model.compute_loss(x, y, model(x, training=True))
                if not first:
                    first.extend(value.detach().clone() for value in state)
                return loss

            optimizer.step(closure)
            for value, new in zip(state, first, strict=True):
                value.data.copy_(new)
    optimizer.eval()
    return optimizer


def are_equal(one, other):
    values = zip(one.get_weights(), other.get_weights(), strict=True)
    return all(np.array_equal(value, other) for value, other in values)


def test_fit_takes_the_steps_of_a_plain_loop(data):
    model, plain = compiled(network()), compiled(network())
    callback, history = fit(model, data)
    optimizer = loop(plain, data)
    assert are_equal(model, plain)
    assert callback.optimizer.report.loss == optimizer.report.loss
    assert callback.optimizer.report.counts == optimizer.report.counts
    assert history["rate"][-1] == optimizer.rate


def test_probes_run_no_backward_pass_and_metrics_count_a_step_once(data):
    calls = []

    class Counting(keras.layers.Layer):
        def call(self, x, training=False):
            if training:
                calls.append(torch.is_grad_enabled())
            return x

    model = network()
    model.add(Counting())
    callback, _ = fit(compiled(model), data, epochs=1, lqa={"every": 1})
    steps = len(data[0]) // BATCH
    assert sum(calls) == steps
    assert len(calls) >= 2 * steps
    assert callback.optimizer.report.backwards == 0
    assert model.get_metrics_result().keys() == {"accuracy", "loss"}


def test_validation_sees_the_averaged_weights_and_changes_nothing(data):
    model, plain = compiled(network()), compiled(network())
    callback, history = fit(model, data, validation_data=data)
    fit(plain, data)
    assert are_equal(model, plain)
    evaluated = model.evaluate(*data, verbose=0, return_dict=True)
    assert evaluated["loss"] == pytest.approx(history["val_loss"][-1], rel=1e-5)
    averages = model.get_weights()
    callback.optimizer.train()
    assert not np.array_equal(model.get_weights()[0], averages[0])


def test_fitting_again_goes_on(data):
    model, plain = compiled(network()), compiled(network())
    callback, _ = fit(model, data, epochs=2)
    model.fit(*data, BATCH, 2, callbacks=[callback, Seeded()], shuffle=False, verbose=0)
    fit(plain, data)
    assert are_equal(model, plain)


def test_saved_models_hold_the_averaged_weights(data, tmp_path):
    saving = keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras")
    model = compiled(network())
    _, history = fit(model, data, saving, validation_data=data)
    assert not {"compute_loss", "train_step"} & vars(model).keys()
    assert isinstance(model.optimizer, keras.optimizers.RMSprop)
    for epoch in (1, 4):
        saved = keras.models.load_model(tmp_path / f"{epoch}.keras")
        evaluated = saved.evaluate(*data, verbose=0, return_dict=True)
        assert evaluated["loss"] == pytest.approx(history["val_loss"][epoch - 1], rel=1e-5)


def test_frozen_layers_and_own_models_train(data):
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.body, self.head = keras.layers.Dense(32, "relu"), keras.layers.Dense(3)

        def call(self, x):
            return self.head(self.body(x))

    keras.utils.set_random_seed(0)
    model = compiled(Own())
    model.body.trainable = False
    _, history = fit(model, data, epochs=12)
    assert history["loss"][-1] < 0.7 * history["loss"][0]


def test_layers_that_were_unfrozen_train(data):
    model = compiled(network())
    model.layers[0].trainable = False
    callback, _ = fit(model, data, epochs=1)
    weight = model.layers[0].get_weights()[0]
    model.layers[0].trainable = True
    model.fit(*data, BATCH, 1, callbacks=[callback], verbose=0)
    assert not np.array_equal(model.layers[0].get_weights()[0], weight)


def test_an_interrupt_leaves_the_model_to_the_next_fit(data):
    class Interrupt(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            raise KeyboardInterrupt

    model, callback = compiled(network()), LQACallback()
    with pytest.raises(KeyboardInterrupt):
        model.fit(*data, BATCH, callbacks=[callback, Seeded(), Interrupt()], verbose=0)
    model.fit(*data, BATCH, callbacks=[callback, Seeded()], verbose=0, shuffle=False)
    assert not {"compute_loss"} & vars(model).keys()
    assert not {"apply", "scale_loss"} & vars(model.optimizer).keys()
    assert sum(callback.optimizer.report.counts.values()) == 1 + len(data[0]) // BATCH


@pytest.mark.parametrize("option", ["optimizer", "jit_compile"])
def test_what_compile_must_leave_out_is_named(option):
    model, callback = network(), LQACallback()
    values = {"optimizer": None, "jit_compile": True}
    model.compile(loss="sparse_categorical_crossentropy", **{option: values[option]})
    callback.set_model(model)
    with pytest.raises(ValueError, match=f"leave {option} out"):
        callback.on_train_begin()


def test_another_backend_is_refused(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(RuntimeError, match="KERAS_BACKEND=torch"):
        LQACallback()


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLE))
    assert float(re.findall(r"accuracy (\d\.\d+)", capsys.readouterr().out)[-1]) > 0.85
