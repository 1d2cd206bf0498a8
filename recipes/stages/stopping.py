"""Early stopping: no more training than helps."""

from dataclasses import dataclass
from typing import Literal

from recipes.stages.recipe import UserError


@dataclass(frozen=True)
class EarlyStopping:
    """What --early-stopping says: patience=10,min_delta=0.001,watch=train."""

    patience: int = 10
    """Checks without improvement after which training ends."""
    min_delta: float = 0.001
    """What counts as an improvement of the loss."""
    watch: Literal["train", "validation"] = "train"
    """train: the mean loss of every --log-every steps; validation: every evaluation."""

    @classmethod
    def parse(cls, text: str) -> "EarlyStopping | None":
        """None where it is off. Parts that are not named keep their defaults."""
        if text.strip() in ("", "off"):
            return None
        given: dict[str, str] = {}
        for part in text.split(","):
            name, sign, value = part.partition("=")
            if not sign or name.strip() not in ("patience", "min_delta", "watch"):
                raise UserError(
                    f"--early-stopping {text}: cannot read {part.strip()!r}; "
                    "write patience=10,min_delta=0.001,watch=train or off"
                )
            given[name.strip()] = value.strip()
        watch = given.get("watch", "train")
        if watch not in ("train", "validation"):
            raise UserError(f"--early-stopping {text}: watch is train or validation")
        try:
            patience, min_delta = int(given.get("patience", 10)), float(given.get("min_delta", 0.001))
        except ValueError as error:
            raise UserError(f"--early-stopping {text}: {error}") from None
        if patience < 1 or not min_delta >= 0:
            raise UserError(f"--early-stopping {text}: patience is 1 or more, min_delta 0 or more")
        return cls(patience, min_delta, "validation" if watch == "validation" else "train")


@dataclass
class Patience:
    """Counts checks without improvement."""

    rule: EarlyStopping
    best: float = float("inf")
    waited: int = 0

    def exhausted(self, loss: float) -> bool:
        if loss < self.best - self.rule.min_delta:
            self.best, self.waited = loss, 0
        else:
            self.waited += 1
        return self.waited >= self.rule.patience
