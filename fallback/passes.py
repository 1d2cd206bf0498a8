"""What PEFT and transformers compute in many passes over memory, in fewer: the same function, and the same gradients,
but for which numbers fall to dropout.

On CPUs a step over some hundred tokens spent half its time beside the matrix products. PEFT clones what a layer made,
casts its input to LoRA's precision and back, multiplies LoRA's outcome by its scaling, adds it, and goes all the way
back again; a norm is written as seven operations, each of which reads and writes every number.

A GPU's memory is faster by far and nobody measured this there: it is installed on CPUs alone. Nor is it where another
library divides the parameters among processes, and has to be asked before one of them is read.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import MethodType
from typing import Any

import numpy
import psutil
import torch
from torch.nn import functional

_KNOWN = ("modeling_llama", "modeling_gemma2", "modeling_gemma3")
"""Whose norms are known. Other families have some that are called alike and are others."""
_PACKED = ("Linear4bit", "Nf4Linear")
"""bitsandbytes' layers, and their stand-ins. PEFT's around them are called alike, and have no weights of their own."""
PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# With 16 bits there is no leaving out more.
_MOST_DROPPED = 1 - 2**-16


def fitting(device: str) -> bool:
    divided = any(os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true" for name in ("FSDP", "DEEPSPEED"))
    return device == "cpu" and not divided


def teach(network: Any) -> None:
    """A network with LoRA, in place."""
    from peft.tuners.lora import LoraLayer

    from fallback import attention

    attention.teach(network)
    for module in network.modules():
        if isinstance(module, LoraLayer):
            if _is_plain(module):
                module.forward = MethodType(lora_forward, module)
        elif type(module).__name__.endswith("RMSNorm") and _is_known(type(module).__module__):
            module.forward = MethodType(norm_forward, module)


def _is_known(model_code: str) -> bool:
    return model_code.rpartition(".")[2] in _KNOWN


def _is_plain(module: Any) -> bool:
    """One adapter, of products alone, around weights that can be had as a matrix."""
    kind = type(module.get_base_layer()).__name__
    vanilla = len(module.lora_A) == 1 and not module.lora_variant and not any(module.lora_bias.values())
    return vanilla and kind in ("Linear", *_PACKED)


def lora_forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    usual = len(self.lora_A) == 1 and self.active_adapters == list(self.lora_A)
    if not usual or self.disable_adapters or self.merged or args or kwargs or torch.compiler.is_compiling():
        return type(self).forward(self, x, *args, **kwargs)
    (name,) = self.lora_A
    share = getattr(self.lora_dropout[name], "p", 0.0) if self.training else 0.0
    if share > _MOST_DROPPED:
        return type(self).forward(self, x)
    down, up, scaling = self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
    kept = kept_by_dropout(x, share) if share else None
    if not torch.is_grad_enabled():
        return _with_lora(x, kept, self.base_layer, down, up, scaling / (1 - share))[0]
    return _WithLora.apply(x, kept, self.base_layer, down, up, scaling / (1 - share))


def put_together(network: Any, dtype: str) -> str | None:
    """For answering: each layer's weights and LoRA as the one matrix that they amount to. Unpacking 4 bits takes as
    long for one token as for a thousand, and an answer goes through a layer once for each of its tokens. In 16 bits a
    sum of matrices loses as much of a small change as a sum of what they make of a token.
    Returns why not. That follows from the machine, not from the moment: an interrupted file goes on with the same
    digits, and so do several processes."""
    from peft.tuners.lora import LoraLayer

    wanted = getattr(torch, dtype)
    layers = [module for module in network.modules() if isinstance(module, LoraLayer) and _is_plain(module)]
    if why_not := _too_large(layers, wanted.itemsize):
        return why_not
    with torch.no_grad():
        for layer in layers:
            (name,) = layer.lora_A
            weight = frozen_weight(layer.get_base_layer(), torch.float32)
            down, up = (part[name].weight.float() for part in (layer.lora_A, layer.lora_B))
            layer.whole = torch.addmm(weight, up, down, alpha=layer.scaling[name]).to(wanted)
            layer.forward = MethodType(whole_forward, layer)
    return None


def unpack(network: Any, dtype: str) -> str | None:
    """For training: 4-bit weights as the numbers that they stand for, kept beside them. They are unpacked in every
    forward and every backward pass otherwise, to the same numbers, so that no digit moves. Returns why not."""
    wanted = getattr(torch, dtype)
    # No text goes through a vision tower.
    named = [m for name, m in network.named_modules() if type(m).__name__ in _PACKED and "vision" not in name]
    layers = [layer for layer in named if "weight" in layer._parameters and _computed_as(layer, wanted)]
    # Every process of this machine keeps its own. `put_together` does not ask how many there are: its digits differ.
    if why_not := _too_large(layers, wanted.itemsize * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))):
        return why_not
    for layer in layers:
        layer.unpacked = numbers_of(layer, wanted)
        layer.forward = MethodType(unpacked_forward, layer)
    return None


def unpacked_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    bias = None if self.bias is None else self.bias.to(self.unpacked.dtype)
    return functional.linear(x.to(self.unpacked.dtype), self.unpacked, bias).to(x.dtype)


def _computed_as(layer: Any, dtype: torch.dtype) -> bool:
    """A checkpoint that was quantised by others may say that it is computed in another precision."""
    state = getattr(layer.weight, "quant_state", None)
    return layer.compute_dtype in (None, dtype) and (state is None or state.dtype == dtype)


def _too_large(layers: Sequence[Any], bytes_each: int) -> str | None:
    wanted, memory = bytes_each * sum(layer.in_features * layer.out_features for layer in layers), memory_bytes()
    if wanted <= memory // 4:
        return None
    return f"they take {wanted / 2**30:.1f} GiB, which is more than a quarter of {memory / 2**30:.1f} GiB of memory"


def memory_bytes() -> int:
    """Of the machine, or what a container or batch system allows."""
    found = [psutil.virtual_memory().total]
    with suppress(OSError):
        for line in (PROC / "self/cgroup").read_text(encoding="utf-8").splitlines():
            _, kinds, place = line.split(":", 2)
            folder, name = ("memory", "memory.limit_in_bytes") if kinds == "memory" else ("", "memory.max")
            if kinds in ("", "memory"):
                # Inside a container the place may be told as it is called outside, and is the root here.
                for group in (CGROUPS / folder / place.strip("/"), CGROUPS / folder):
                    with suppress(OSError, ValueError):
                        found.append(int((group / name).read_text(encoding="utf-8")))
    return min(found)


def whole_forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if self.active_adapters != list(self.lora_A) or self.disable_adapters or self.merged or args or kwargs:
        return lora_forward(self, x, *args, **kwargs)
    return functional.linear(x, self.whole, self.get_base_layer().bias)


def kept_by_dropout(x: torch.Tensor, share: float) -> torch.Tensor:
    """Which of its numbers dropout leaves, by 16 random bits for each. torch's generator, which seeds this one, takes
    five times as long, for a whole float each."""
    seed = int(torch.empty((), dtype=torch.int64).random_())
    bits = numpy.random.SFC64(seed).random_raw(-(-x.numel() // 4)).view(numpy.int16)
    return torch.from_numpy(bits)[: x.numel()].view(x.shape) >= round(share * 2**16) - 2**15


def _with_lora(
    x: torch.Tensor, kept: torch.Tensor | None, base: Any, down: torch.Tensor, up: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """W x + scaling * B A (what is kept of x), and scaling * A (what is kept of x)."""
    y = base(x)
    dtype = _computed_in(x, down)
    narrow = functional.linear(_rows(_left(x, kept)).to(dtype), down.to(dtype)).mul_(scaling)
    rows = y.view(-1, y.shape[-1])
    if rows.dtype == dtype:
        rows.addmm_(narrow, up.to(dtype).t())
    else:
        rows += narrow @ up.to(dtype).t()
    return y, narrow


def _left(x: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    """What dropout leaves. A product with booleans would first make numbers of them: as large as x, and three times as
    long."""
    return x if kept is None else torch.where(kept, x, 0.0)


class _WithLora(torch.autograd.Function):
    """The same with its gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        kept: torch.Tensor | None,
        base: Any,
        down: torch.Tensor,
        up: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        y, narrow = _with_lora(x, kept, base, down, up, scaling)
        ctx.save_for_backward(x, kept, narrow, down, up)
        ctx.base, ctx.scaling = base, scaling
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, kept, narrow, down, up = ctx.saved_tensors
        dtype = narrow.dtype
        rows = _rows(grad).to(dtype)
        inner = (rows @ up.to(dtype)).mul_(ctx.scaling)
        # This way around, the long side is read along its rows.
        to_up = (narrow.t() @ rows).t().to(up.dtype)
        seen = _rows(_left(x, kept)).to(dtype)
        to_down = (inner.t() @ seen).to(down.dtype)
        del seen
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = rows @ frozen_weight(ctx.base, dtype)
            if kept is None:
                to_x.addmm_(inner, down.to(dtype))
            else:
                to_x += (inner @ down.to(dtype)).masked_fill_(_rows(~kept), 0.0)
            to_x = to_x.view(x.shape).to(x.dtype)
        return to_x, None, None, to_down, to_up, None


def frozen_weight(base: Any, dtype: torch.dtype) -> torch.Tensor:
    kept = getattr(base, "unpacked", None)
    return kept if kept is not None and kept.dtype == dtype else numbers_of(base, dtype)


def numbers_of(base: Any, dtype: torch.dtype) -> torch.Tensor:
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
    if torch.compiler.is_compiling():
        return type(self).forward(self, x)
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
