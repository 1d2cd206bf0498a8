"""The loss on the probability of a whole answer, and how often each class is drawn.

p = exp(sum of the answer's token log-probabilities) is the model's probability of the code as a whole. With
neither weights, focusing nor adjustment the loss is TRL's own, to the digit: the mean over supervised tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from recipes.stages.recipe import Balance

# Beyond this many rows a class gains little from more of them (the beta = 0.999 of "class-balanced loss").
_EFFECTIVE = 0.999
# 1 - p and its logarithm have no useful gradient closer to certainty than this.
_CERTAIN = -1e-6


def draws(sizes: Sequence[int], balance: Balance) -> list[int]:
    """How often an epoch draws from each class."""
    wanted = [max(size, balance.oversample_to) for size in sizes]
    power = {"none": 1.0, "sqrt": 0.5, "weighted": 0.0}[balance.sampler]
    shares = [size**power for size in wanted]
    exact = [sum(wanted) * share / sum(shares) for share in shares]
    counts = [max(1, int(count)) for count in exact]
    # What rounding left over goes to the largest fractions.
    by_fraction = sorted(range(len(exact)), key=lambda c: (int(exact[c]) - exact[c], c))
    for c in by_fraction[: max(0, sum(wanted) - sum(counts))]:
        counts[c] += 1
    return counts


def class_weights(drawn: Sequence[int], balance: Balance) -> list[float]:
    """By how often a class is drawn, not by its rows: a sampler that evens the classes out leaves nothing to weigh."""
    if balance.class_weights == "none":
        return [1.0] * len(drawn)
    if balance.class_weights == "balanced":
        weights = [1 / count for count in drawn]
    else:
        weights = [(1 - _EFFECTIVE) / (1 - _EFFECTIVE**count) for count in drawn]
    average = sum(w * count for w, count in zip(weights, drawn, strict=True)) / sum(drawn)
    return [min(w / average, balance.weight_cap) for w in weights]


def prior_offsets(drawn: Sequence[int], power: float) -> list[float]:
    """What is added to a class's log-odds in training: log prior^power, less that of its rivals on average.

    Logit adjustment multiplies every class by its prior before they are compared. Only the true class's p is known
    here, so the mass of the others is taken to lie on them as their priors do.
    """
    priors = torch.tensor([count / sum(drawn) for count in drawn], dtype=torch.float64)
    powered = priors**power
    rivals = ((priors * powered).sum() - priors * powered) / (1 - priors)
    return (powered.log() - rivals.log()).tolist()


@dataclass(frozen=True)
class Objective:
    """A balance, worked out for the classes of a training split."""

    weights: torch.Tensor
    offsets: torch.Tensor | None
    focal_gamma: float

    @classmethod
    def of(cls, sizes: Sequence[int], balance: Balance) -> "Objective":
        drawn = draws(sizes, balance)
        adjusted = balance.logit_adjustment and len(drawn) > 1
        offsets = torch.tensor(prior_offsets(drawn, balance.logit_adjustment)).float() if adjusted else None
        return cls(torch.tensor(class_weights(drawn, balance)).float(), offsets, balance.focal_gamma)

    def mass(self, tokens: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """What a loss is divided by: supervised tokens, weighted. To be summed over all parts of a step."""
        return (self.weights.to(tokens.device)[classes] * tokens).sum()

    def loss(self, log_p: torch.Tensor, classes: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
        """log_p: log-probability of each example's whole answer."""
        log_p = log_p.float()
        if self.offsets is not None:
            log_p = log_p.clamp(max=_CERTAIN)
            shifted = log_p + self.offsets.to(log_p.device)[classes]
            log_p = shifted - torch.logaddexp(shifted, torch.log(-torch.expm1(log_p)))
        losses = -log_p
        if self.focal_gamma:
            losses = losses * (-torch.expm1(log_p.clamp(max=_CERTAIN))) ** self.focal_gamma
        return (self.weights.to(log_p.device)[classes] * losses).sum() / mass
