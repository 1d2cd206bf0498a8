"""What PEFT and transformers compute in many passes over memory, in fewer: the same function, and the same gradients.

On CPUs a step over some hundred tokens spent half its time beside the matrix products. PEFT clones what a layer made,
casts its input to LoRA's precision and back, multiplies LoRA's outcome by its scaling, adds it, and goes all the way
back again; a norm is written as seven operations, each of which reads and writes every number.

A GPU's memory is faster by far and nobody measured this there: it is installed on CPUs alone. Nor is it where another
library divides the parameters among processes, and has to be asked before one of them is read.
"""

import os
import sys
from collections.abc import Callable
from types import MethodType, ModuleType
from typing import Any

import torch
from torch.nn import functional

_KNOWN = ("modeling_llama", "modeling_gemma2", "modeling_gemma3")
"""Whose norms and rotations are known: heads are rotated from their first number to their last. Other families have
norms that are called alike and are others."""
_ORIGINAL: dict[str, Callable[..., Any]] = {}
"""Module of model code -> its rotation, where it was replaced."""


def fitting(device: str) -> bool:
    divided = any(os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true" for name in ("FSDP", "DEEPSPEED"))
    return device == "cpu" and not divided


def install(network: Any) -> None:
    """Teach a network with LoRA; the rotation of its heads stands in its library's module, for all such networks."""
    teach(network)
    code = sys.modules[type(network.get_base_model()).__module__]
    if rotates_whole(code):
        _ORIGINAL.setdefault(code.__name__, code.apply_rotary_pos_emb)
        code.apply_rotary_pos_emb = rotated  # type: ignore[attr-defined]


def original_rotation(code: ModuleType) -> Callable[..., Any]:
    return _ORIGINAL.get(code.__name__, code.apply_rotary_pos_emb)


def teach(network: Any) -> None:
    """Its layers alone."""
    from peft.tuners.lora import LoraLayer

    for module in network.modules():
        if isinstance(module, LoraLayer):
            if _is_plain(module):
                module.forward = MethodType(lora_forward, module)
        elif type(module).__name__.endswith("RMSNorm") and _is_known(type(module).__module__):
            module.forward = MethodType(norm_forward, module)


def rotates_whole(code: ModuleType) -> bool:
    return _is_known(code.__name__)


def _is_known(model_code: str) -> bool:
    return model_code.rpartition(".")[2] in _KNOWN


def _is_plain(module: Any) -> bool:
    """One adapter, of products alone, around weights that can be had as a matrix."""
    kind = type(module.get_base_layer()).__name__
    vanilla = len(module.lora_A) == 1 and not module.lora_variant and not any(module.lora_bias.values())
    return vanilla and kind in ("Linear", "Linear4bit", "Nf4Linear")


def lora_forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    usual = len(self.lora_A) == 1 and self.active_adapters == list(self.lora_A)
    if not usual or self.disable_adapters or self.merged or args or kwargs:
        return type(self).forward(self, x, *args, **kwargs)
    (name,) = self.lora_A
    down, up = self.lora_A[name].weight, self.lora_B[name].weight
    seen = self.lora_dropout[name](x)
    if not torch.is_grad_enabled():
        return _with_lora(x, seen, self.base_layer, down, up, self.scaling[name])[0]
    return _WithLora.apply(x, None if seen is x else seen, self.base_layer, down, up, self.scaling[name])


def _with_lora(
    x: torch.Tensor, seen: torch.Tensor, base: Any, down: torch.Tensor, up: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """W x + scaling * B A seen, and A seen."""
    y = base(x)
    dtype = _computed_in(x, down)
    narrow = functional.linear(_rows(seen).to(dtype), down.to(dtype))
    rows = y.view(-1, y.shape[-1])
    if rows.dtype == dtype:
        rows.addmm_(narrow, up.to(dtype).t(), alpha=scaling)
    else:
        rows += (narrow * scaling) @ up.to(dtype).t()
    return y, narrow


class _WithLora(torch.autograd.Function):
    """The same with its gradients, where seen is x if None, or what dropout left of it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        seen: torch.Tensor | None,
        base: Any,
        down: torch.Tensor,
        up: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        ctx.dropped = seen is not None
        seen = x if seen is None else seen
        y, narrow = _with_lora(x, seen, base, down, up, scaling)
        ctx.save_for_backward(seen, narrow, down, up)
        ctx.base, ctx.scaling = base, scaling
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        seen, narrow, down, up = ctx.saved_tensors
        dtype = narrow.dtype
        rows = _rows(grad).to(dtype)
        inner = rows @ (up * ctx.scaling).to(dtype)
        to_x = to_seen = None
        if ctx.needs_input_grad[0]:
            to_x = rows @ frozen_weight(ctx.base, dtype)
            if not ctx.dropped:
                to_x.addmm_(inner, down.to(dtype))
            to_x = to_x.view(seen.shape).to(seen.dtype)
        if ctx.dropped and ctx.needs_input_grad[1]:
            to_seen = (inner @ down.to(dtype)).view(seen.shape).to(seen.dtype)
        to_down = (inner.t() @ _rows(seen).to(dtype)).to(down.dtype)
        # This way around, the long side is read along its rows.
        to_up = (narrow.t() @ rows).t().to(up.dtype) * ctx.scaling
        return to_x, to_seen, None, to_down, to_up, None


def frozen_weight(base: Any, dtype: torch.dtype) -> torch.Tensor:
    state = getattr(base.weight, "quant_state", None)
    if state is None:
        return base.weight.to(dtype)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(base.weight.data.view(-1, 1), state).to(dtype)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


def _computed_in(x: torch.Tensor, down: torch.Tensor) -> torch.dtype:
    """Under autocast its precision; otherwise LoRA's own, to which PEFT casts."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return down.dtype


def norm_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    if type(self).__name__.startswith("Gemma"):
        # Gemma's weights are what is added to one, and multiply before the outcome is rounded.
        return _Norm.apply(x, 1.0 + self.weight.float(), self.eps)
    if x.dtype == torch.float32:
        return _Norm.apply(x, self.weight, self.variance_epsilon)
    return self.weight * _Norm.apply(x, None, self.variance_epsilon)


class _Norm(torch.autograd.Function):
    """x by its root mean square, times frozen weights."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
        wide = x.float()
        size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = size.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        made = wide * inverse
        if weight is not None:
            made.mul_(weight)
        ctx.save_for_backward(x, inverse, weight)
        return made.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        x, inverse, weight = ctx.saved_tensors
        wide = x.float()
        grad = grad.float() * inverse if weight is None else (grad.float() * weight).mul_(inverse)
        along = torch.linalg.vecdot(grad, wide).unsqueeze(-1).mul_(inverse).mul_(inverse).div_(-x.shape[-1])
        return grad.addcmul_(wide, along).to(x.dtype), None, None


def rotated(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    half = cos.shape[-1] // 2
    # Both halves of the angles are the same.
    cos, sin = cos[..., :half].unsqueeze(unsqueeze_dim), sin[..., :half].unsqueeze(unsqueeze_dim)
    return _Rotated.apply(query, cos, sin), _Rotated.apply(key, cos, sin)


class _Rotated(torch.autograd.Function):
    """Every number of a head's first half and its fellow of the second, turned by the token's angle."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, sin, -1), None, None


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, way: int) -> torch.Tensor:
    made = torch.empty_like(x)
    first, second = x.chunk(2, -1)
    to_first, to_second = made.chunk(2, -1)
    torch.mul(first, cos, out=to_first).addcmul_(second, sin, value=-way)
    torch.mul(second, cos, out=to_second).addcmul_(first, sin, value=way)
    return made
