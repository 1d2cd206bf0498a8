"""The fused head without Triton against log_softmax in float64."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fallback import portable_loss
from fallback.portable_loss import PortableLogProb

TOKENS, HIDDEN, VOCABULARY = 37, 16, 101


def inputs(bias: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    offset = torch.randn(VOCABULARY, generator=generator) if bias else None
    targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    return hidden, weight, offset, targets


def reference(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor,
    temperature: float, softcap: float | None, scale: float,
) -> dict[str, torch.Tensor]:  # fmt: skip
    logits = torch.nn.functional.linear(hidden, weight, bias) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / temperature
    log_probs = logits.log_softmax(-1)
    return {
        "log_probs": log_probs.gather(-1, targets[:, None]).squeeze(-1),
        "entropy": -(log_probs.exp() * log_probs).sum(-1),
        "log_sum_sq_probs": (2 * log_probs).logsumexp(-1),
        "mean_logits": logits.mean(-1),
        "is_top1": logits.argmax(-1) == targets,
    }


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("temperature", "softcap", "scale"), [(1.0, None, 1.0), (0.7, None, 1.0), (1.0, 5.0, 1.0), (1.3, 5.0, 0.5)]
)
def test_values_and_gradients(
    bias: bool, temperature: float, softcap: float | None, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Chunks of five rows, so that several of them and a shorter last one occur.
    monkeypatch.setattr(portable_loss, "CHUNK_BYTES", 5 * 4 * VOCABULARY)
    hidden, weight, offset, targets = inputs(bias)
    hidden.requires_grad_()
    exact, *head = [None if t is None else t.detach().double() for t in (hidden, weight, offset)]
    assert exact is not None
    exact.requires_grad_()
    names = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    got = dict(
        zip(
            names,
            PortableLogProb.apply(hidden, weight, offset, targets, temperature, 32768, softcap, scale, names),
            strict=True,
        )
    )
    wanted = reference(exact, *head, targets, temperature, softcap, scale)
    for name in names:
        torch.testing.assert_close(got[name].double(), wanted[name].double(), rtol=1e-4, atol=3e-5)
    slopes = torch.linspace(-1, 2, TOKENS)
    (got["log_probs"] * slopes).sum().backward()
    (wanted["log_probs"] * slopes).sum().backward()
    torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=1e-4, atol=1e-4)


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight, _, targets = inputs(False)
    hidden.requires_grad_()
    PortableLogProb.apply(hidden, weight, None, targets)[0].sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_a_head_that_is_trained_is_refused() -> None:
    hidden, weight, _, targets = inputs(False)
    found = PortableLogProb.apply(hidden.requires_grad_(), weight.requires_grad_(), None, targets)[0]
    with pytest.raises(RuntimeError, match="has to be frozen"):
        found.sum().backward()


class Products(TorchDispatchMode):
    """Counts the matrix products."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in ("mm", "addmm", "bmm", "matmul", "linear")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("trained", [True, False])
def test_logits_are_computed_once(trained: bool) -> None:
    hidden, weight, _, targets = inputs(False)
    with Products() as seen:
        found = PortableLogProb.apply(hidden.requires_grad_(trained), weight, None, targets)[0]
        if trained:
            found.sum().backward()
    # The second is their way back to the hidden states.
    assert seen.count == 1 + trained


def test_no_tokens_at_all() -> None:
    hidden, weight, _, targets = inputs(False)
    hidden.requires_grad_()
    log_probs = PortableLogProb.apply(hidden[:0], weight, None, targets[:0])[0]
    assert log_probs.shape == (0,)
    log_probs.sum().backward()


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_never_holds_tokens_times_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, vocabulary = 512, 1000
    monkeypatch.setattr(portable_loss, "CHUNK_BYTES", 16 * 4 * vocabulary)
    hidden = torch.randn(tokens, 8, requires_grad=True)
    weight = torch.randn(vocabulary, 8)
    with Largest() as seen:
        PortableLogProb.apply(hidden, weight, None, torch.zeros(tokens, dtype=torch.long))[0].sum().backward()
    assert seen.elements <= 16 * vocabulary


def test_bfloat16_head_is_close() -> None:
    hidden, weight, _, targets = inputs(False)
    got = PortableLogProb.apply(hidden.bfloat16(), weight.bfloat16(), None, targets)[0]
    wanted = reference(hidden.double(), weight.double(), None, targets, 1.0, None, 1.0)["log_probs"]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), wanted, rtol=0.05, atol=0.1)


def test_what_is_nearly_certain_still_has_a_gradient_in_float16() -> None:
    """Loss scaling comes later: 4e-8 for each of the other tokens has to outlive the head."""
    _, weight, _, targets = inputs(False)
    targets[:] = 7
    weight[:, 0] = 0
    weight[7, 0] = 1
    weight = weight.half()
    hidden = torch.zeros(TOKENS, HIDDEN, dtype=torch.float16)
    hidden[:, 0] = 17
    exact = hidden.double().requires_grad_()
    log_probs = PortableLogProb.apply(hidden.requires_grad_(), weight, None, targets)[0]
    (log_probs * 2.0**16).sum().backward()
    wanted = reference(exact, weight.double(), None, targets, 1.0, None, 1.0)["log_probs"]
    (wanted * 2.0**16).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.float16
    assert (hidden.grad.double() - exact.grad).norm() < 0.03 * exact.grad.norm()
