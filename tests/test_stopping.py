"""Early stopping: when it stops, what it cannot read, and that it goes on counting after a resumed run."""

from types import SimpleNamespace

import pytest

from recipes.stages.recipe import UserError
from recipes.stages.stopping import EarlyStopping, Patience


def test_what_can_be_said() -> None:
    assert EarlyStopping.parse("off") is None
    assert EarlyStopping.parse("patience=3,watch=validation") == EarlyStopping(3, 0.001, "validation")
    assert EarlyStopping.parse("min_delta=0.5") == EarlyStopping(10, 0.5, "train")


@pytest.mark.parametrize(
    "text", ["patience", "patience=x", "patience=0", "watch=test", "min_delta=-1", "speed=9", "min_delta=nan"]
)
def test_what_cannot(text: str) -> None:
    with pytest.raises(UserError, match="--early-stopping"):
        EarlyStopping.parse(text)


def test_patience_counts_checks_that_do_not_improve() -> None:
    patience = Patience(EarlyStopping(patience=2, min_delta=0.1))
    assert [patience.exhausted(loss) for loss in (5.0, 4.0, 3.95, 3.8, 3.75, 3.71)] == [
        False, False, False, False, False, True,
    ]  # fmt: skip


def control() -> SimpleNamespace:
    return SimpleNamespace(should_training_stop=False, should_evaluate=False)


def feed(losses: list[float], every: int, history: tuple[float, ...] = ()) -> int | None:
    """The step at which a run with these losses ends; `history` is what it did before it was resumed."""
    from recipes.stages.callbacks import StopEarly

    callback, here = StopEarly(EarlyStopping(patience=2, min_delta=0.1), every), control()
    logs = [{"loss": loss} for loss in history]
    callback.on_train_begin(None, SimpleNamespace(log_history=logs), here)
    for step, loss in enumerate(losses, len(history) + 1):
        callback.on_log(None, SimpleNamespace(global_step=step), here, logs={"loss": loss})
        if here.should_training_stop:
            return step
    return None


def test_a_resumed_run_stops_where_an_uninterrupted_one_does() -> None:
    losses = [5.0, 4.0, 3.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    whole = feed(losses, every=2)
    assert whole == 10
    for cut in range(1, 10):
        assert feed(losses[cut:], 2, history=tuple(losses[:cut])) == whole


def test_validation_is_watched_instead() -> None:
    from recipes.stages.callbacks import StopEarly

    callback, here = StopEarly(EarlyStopping(patience=1, watch="validation"), 1), control()
    state = SimpleNamespace(global_step=4, log_history=[])
    callback.on_train_begin(None, state, here)
    for _ in range(5):
        callback.on_log(None, state, here, logs={"loss": 1.0})
    callback.on_log(None, state, here, logs={"eval_loss": 1.0})
    assert not here.should_training_stop
    callback.on_log(None, state, here, logs={"eval_loss": 1.0})
    assert here.should_training_stop


def test_a_resumed_training_knows_its_best_validation() -> None:
    """Also where it was stopped behind it: what is kept, and told, is of that step."""
    from recipes.stages.callbacks import Validations

    logs = [
        {"step": 2, "eval_x": 0.5},
        {"step": 4, "eval_x": 0.7},
        {"step": 5, "loss": 1.0},
        {"step": 6, "eval_x": 0.6},
    ]
    for higher, expected in ((True, (4, 0.7)), (False, (2, 0.5))):
        checks = Validations("eval_x", higher, None, lambda *_: None)
        checks.on_train_begin(None, SimpleNamespace(log_history=logs), None)
        assert (checks.best_step, checks.best) == expected
