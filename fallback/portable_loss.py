"""Per-token log-probabilities from hidden states, without Triton and without tokens x vocabulary in float32.

TRL 1.15 computes its loss through ChunkedLogProbFunction, a Triton kernel: it dies on a CPU ("0 active
drivers") and on GPUs below compute capability 7.0. This is the same function in plain torch. TRL hands it the
supervised positions only, so an answer of three tokens costs three rows of logits.

How a log-probability changes with its hidden state does not depend on what it is used for. So that is computed while
the logits are there, and they are not computed a second time for the gradients. The head itself is never trained here.
"""

from typing import Any

import torch

from fallback import cpu

CHUNK_BYTES = 64 * 2**20
"""Logits alive at one time, in float32."""


def _rows(vocabulary: int) -> int:
    return max(1, CHUNK_BYTES // (4 * vocabulary))


def _logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, scale: float, softcap: float | None
) -> torch.Tensor:
    logits = torch.nn.functional.linear(_few_lengths(hidden), weight, bias)[: len(hidden)].float()
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
        slopes = None
        if ctx.needs_input_grad[0]:
            # Loss scaling comes later, and float16 has nothing below 6e-8.
            kept, lifted = (torch.float32, 1024) if dtype == torch.float16 else (hidden.dtype, 1)
            slopes = torch.empty_like(hidden, dtype=kept)
        rows, head = _rows(weight.shape[0]), weight.to(dtype)
        for start in range(0, count, rows):
            piece = slice(start, start + rows)
            logits = _logits(hidden[piece].to(dtype), head, _cast(bias, dtype), scale, cap)
            target = targets[piece]
            if "mean_logits" in extra:
                extra["mean_logits"][piece] = logits.mean(-1)
            # d cap tanh(z / cap) / d z
            steepness = (logits / cap).square_().neg_().add_(1) if cap and slopes is not None else None
            log_p = logits.log_softmax(-1)
            del logits
            log_probs[piece] = log_p.gather(-1, target[:, None]).squeeze(-1)
            if "is_top1" in extra:
                extra["is_top1"][piece] = log_p.argmax(-1) == target
            if "log_sum_sq_probs" in extra:
                extra["log_sum_sq_probs"][piece] = (2 * log_p).logsumexp(-1)
            if "entropy" in extra:
                extra["entropy"][piece] = -log_p.exp().mul_(log_p).sum(-1)
            if slopes is not None:
                # d log p(target) / d z = onehot - softmax
                grad = log_p.exp_().neg_()
                grad[torch.arange(len(grad), device=grad.device), target] += 1
                if steepness is not None:
                    grad *= steepness
                if scale * lifted != 1.0:
                    grad *= scale * lifted
                del steepness
                slopes[piece] = (_few_lengths(grad.to(dtype)) @ head)[: len(grad)]
                if lifted != 1:
                    slopes[piece] /= lifted
                del grad
            del log_p
        if slopes is not None:
            ctx.save_for_backward(slopes)
            ctx.dtype = hidden.dtype
        ctx.mark_non_differentiable(*extra.values())
        return log_probs, *(extra.get(n) for n in ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"))

    @staticmethod
    def backward(ctx: Any, grad_log_probs: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        if any(ctx.needs_input_grad[1:3]):
            # Without this it would quietly stay as it was: LoRA alone is trained, and the logits are gone.
            raise RuntimeError("the head has to be frozen: this loss gives gradients for hidden states alone")
        (slopes,) = ctx.saved_tensors
        return (slopes * grad_log_probs[:, None]).to(ctx.dtype), *[None] * 8


def _few_lengths(rows: torch.Tensor) -> torch.Tensor:
    """With rows of zeros where a processor writes code for each number of them."""
    if rows.dtype != torch.bfloat16 or not rows.is_cpu:
        return rows
    return torch.nn.functional.pad(rows, (0, 0, 0, cpu.rounded(len(rows)) - len(rows)))


def _cast(bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if bias is None else bias.to(dtype)


def install() -> None:
    """Put the portable function where TRL looks its own up at every call."""
    from trl.trainer import utils

    utils._ChunkedLogProbFunction = PortableLogProb
