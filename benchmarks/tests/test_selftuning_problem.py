"""Problems: their batches, what is evaluated, and the table of tasks."""

import math
from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch import Tensor, nn

from quadstep_bench.selftuning import problem
from quadstep_bench.selftuning.problem import (
    TRAINING_EXAMPLES,
    Columns,
    Problem,
    check_task,
    from_splits,
    regression,
)


def numbered(size: int, **options: int | None) -> Problem:
    """A problem whose examples are numbers from 0, and whose model doubles them."""
    examples = torch.arange(float(size)).unsqueeze(1)
    columns = examples, 2.0 * examples + 1.0
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 2.0)
    measured = dict.fromkeys(("train", "validation", "test"), columns)
    return Problem(model, columns, measured, regression, **options)


def numbers(batches: list[Columns]) -> list[list[float]]:
    return [batch[0].flatten().tolist() for batch in batches]


def test_an_epoch_has_all_examples_that_fill_batches_once() -> None:
    tested = numbered(10, batch_size=3)
    batches = numbers(list(islice(tested.batches(seed=0), 6)))
    assert [len(batch) for batch in batches] == [3] * 6
    for epoch in (batches[:3], batches[3:]):
        assert len({number for batch in epoch for number in batch}) == 9
    assert batches[:3] != batches[3:]
    assert numbers(list(islice(tested.batches(seed=0), 6))) == batches
    assert numbers(list(islice(tested.batches(seed=1), 6))) != batches


def test_columns_stay_together() -> None:
    for inputs, targets in islice(numbered(10, batch_size=3).batches(seed=0), 6):
        assert torch.equal(targets, 2.0 * inputs + 1.0)


def test_a_full_batch_has_all_examples() -> None:
    first, second = numbers(list(islice(numbered(5, batch_size=None).batches(seed=0), 2)))
    assert first != second
    assert sorted(first) == sorted(second) == [0.0, 1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("chunk", [1, 4, 7, 10])
def test_an_evaluation_is_the_mean_however_it_is_cut(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(problem, "CHUNK", chunk)
    tested = numbered(10)
    nn.init.zeros_(tested.model.weight)  # pyright: ignore[reportArgumentType]
    targets = tested.training[1]
    expected = float(targets.square().mean()), float(targets.mean())
    assert tested.evaluate("validation") == pytest.approx(expected)
    nn.init.constant_(tested.model.weight, 2.0)  # pyright: ignore[reportArgumentType]
    assert tested.evaluate("validation") == pytest.approx((1.0, 1.0))


def test_classification_counts_what_is_wrong() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0], [2.0, 0.0]])
    labels = torch.tensor([0, 1, 1, 0])
    loss, error = problem.classification(nn.Identity(), (logits, labels))
    right, wrong = math.log1p(math.exp(-2.0)), math.log1p(math.exp(2.0))
    assert float(loss) == pytest.approx((3 * right + wrong) / 4)
    assert float(error) == 0.25


def test_the_training_loss_is_the_first_measure_unless_there_is_another() -> None:
    tested = numbered(10)
    assert tested.train_loss(tested.training).item() == pytest.approx(1.0)

    def other(model: nn.Module, batch: Columns) -> Tensor:
        return model(batch[0]).sum()

    assert replace(tested, loss=other).train_loss(tested.training).item() == pytest.approx(90.0)


def test_no_more_than_so_many_training_examples_are_evaluated() -> None:
    columns = (torch.arange(2.0 * TRAINING_EXAMPLES),)
    made = from_splits(nn.Identity(), dict.fromkeys(("train", "validation", "test"), columns))
    assert len(made.measured["train"][0]) == TRAINING_EXAMPLES
    assert len(made.measured["test"][0]) == len(made.training[0]) == 2 * TRAINING_EXAMPLES


@pytest.mark.parametrize("part", ["training", "train", "validation", "test"])
def test_the_digest_shows_each_part_of_the_data(part: str) -> None:
    tested = numbered(10)
    changed = (tested.training[0] + 1.0, tested.training[1])
    other = (
        replace(tested, training=changed)
        if part == "training"
        else replace(tested, measured={**tested.measured, part: changed})
    )
    assert other.digest() != tested.digest() == numbered(10).digest()


def test_an_unknown_task_is_refused() -> None:
    from quadstep_bench.selftuning.tasks import TASKS

    with pytest.raises(ValueError, match=r"unknown task 'few': choose from .*few-data, "):
        check_task("few")
    for name in TASKS:
        check_task(name)
