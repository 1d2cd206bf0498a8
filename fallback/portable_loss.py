"""Per-token log-probabilities from hidden states, without Triton and without tokens x vocabulary in float32.

TRL 1.15 computes its loss through ChunkedLogProbFunction, a Triton kernel: it dies on a CPU ("0 active
drivers") and on GPUs below compute capability 7.0. This is the same function in plain torch. TRL hands it the
supervised positions only, so an answer of three tokens costs three rows of logits.
"""

from typing import Any

import torch

CHUNK_BYTES = 64 * 2**20
"""Logits alive at one time, in float32."""


def _rows(vocabulary: int) -> int:
    return max(1, CHUNK_BYTES // (4 * vocabulary))


def _logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, scale: float, softcap: float | None
) -> torch.Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    if scale != 1.0:
        logits = logits * scale
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    return logits


class PortableLogProb(torch.autograd.Function):
    """Stands where trl.trainer.utils._ChunkedLogProbFunction stands, argument for argument."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float = 1.0,
        chunk_size: int = 0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("log_probs",),
    ) -> tuple[torch.Tensor | None, ...]:
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
        else:
            dtype = weight.dtype
        count = hidden.shape[0]
        scale = logit_scale / temperature
        # The cap acts before the temperature: tanh(s z / c) c / t.
        cap = softcap / temperature if softcap else None
        log_probs = hidden.new_empty(count, dtype=torch.float32)
        extra = {
            name: hidden.new_empty(count, dtype=torch.bool if name == "is_top1" else torch.float32)
            for name in ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
            if name in outputs
        }
        rows = _rows(weight.shape[0])
        for start in range(0, count, rows):
            piece = slice(start, start + rows)
            logits = _logits(hidden[piece].to(dtype), weight.to(dtype), _cast(bias, dtype), scale, cap)
            target = targets[piece]
            norm = logits.logsumexp(-1)
            chosen = logits.gather(-1, target[:, None]).squeeze(-1)
            log_probs[piece] = chosen - norm
            if "is_top1" in extra:
                extra["is_top1"][piece] = logits.argmax(-1) == target
            if "mean_logits" in extra:
                extra["mean_logits"][piece] = logits.mean(-1)
            if "log_sum_sq_probs" in extra:
                extra["log_sum_sq_probs"][piece] = (2 * logits).logsumexp(-1) - 2 * norm
            if "entropy" in extra:
                # H = log Z - E[z]; the probabilities overwrite the logits, which are not needed any more.
                expected = (logits.sub(norm[:, None]).exp_().mul_(logits)).sum(-1)
                extra["entropy"][piece] = norm - expected
            del logits
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.dtype, ctx.scale, ctx.cap = dtype, scale, cap
        ctx.mark_non_differentiable(*extra.values())
        return log_probs, *(extra.get(n) for n in ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"))

    @staticmethod
    def backward(ctx: Any, grad_log_probs: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if want_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if want_bias else None
        cast_weight = weight.to(ctx.dtype)
        rows = _rows(weight.shape[0])
        for start in range(0, hidden.shape[0], rows):
            piece = slice(start, start + rows)
            here = hidden[piece].to(ctx.dtype)
            logits = _logits(here, cast_weight, _cast(bias, ctx.dtype), ctx.scale, ctx.cap)
            slope = (1 - (logits / ctx.cap) ** 2) if ctx.cap else None
            # d log p(target) / d z = onehot - softmax
            grad = logits.softmax(-1).neg_()
            del logits
            grad[torch.arange(grad.shape[0], device=grad.device), targets[piece]] += 1
            grad *= grad_log_probs[piece, None].float()
            if slope is not None:
                grad *= slope
            if ctx.scale != 1.0:
                grad *= ctx.scale
            grad = grad.to(ctx.dtype)
            if grad_hidden is not None:
                grad_hidden[piece] = (grad @ cast_weight).to(hidden.dtype)
            if grad_weight is not None:
                grad_weight += (grad.T @ here).float()
            if grad_bias is not None:
                grad_bias += grad.float().sum(0)
        return (
            grad_hidden,
            grad_weight.to(weight.dtype) if grad_weight is not None else None,
            grad_bias.to(bias.dtype) if grad_bias is not None else None,
            *[None] * 6,
        )


def _cast(bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if bias is None else bias.to(dtype)


def install() -> None:
    """Put the portable function where TRL looks its own up at every call."""
    from trl.trainer import utils

    utils._ChunkedLogProbFunction = PortableLogProb
