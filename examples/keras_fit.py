"""Trains a model of Keras 3 on torch on handwritten digits.

    pip install quadstep keras scikit-learn
    python examples/keras_fit.py

With validation, batch normalization and the best checkpoint.
"""

import os

os.environ["KERAS_BACKEND"] = "torch"

import keras
from sklearn.datasets import load_digits

from quadstep.integrations.keras import LQACallback

keras.utils.set_random_seed(0)
images, labels = load_digits(return_X_y=True)
images = images.astype("float32") / 16.0

model = keras.Sequential(
    [
        keras.layers.Input((64,)),
        keras.layers.Dense(64, "relu"),
        keras.layers.BatchNormalization(),
        keras.layers.Dropout(0.1),
        keras.layers.Dense(10, "softmax"),
    ]
)
model.compile(loss="sparse_categorical_crossentropy", metrics=["accuracy"])
best = keras.callbacks.ModelCheckpoint("keras_fit.keras", "val_accuracy", save_best_only=True)
model.fit(
    images[:1500],
    labels[:1500],
    epochs=10,
    validation_data=(images[1500:], labels[1500:]),
    callbacks=[LQACallback(), best],
    verbose=2,
)
saved = keras.models.load_model("keras_fit.keras")
loss, accuracy = saved.evaluate(images[1500:], labels[1500:], verbose=0)
print(f"accuracy {accuracy:.3f}")
