"""What kernels keep and borrow, as shapes on the meta device: stand-ins for what a GPU or a library computes with code
that no shape can be sent through. Read from the installed sources of torch 2.13, bitsandbytes 0.50, TRL 1.15,
liger-kernel 0.8 and unsloth 2026.10.

This module imports torch: it is loaded by footprint alone.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class _Nf4Product(torch.autograd.Function):
    """bitsandbytes' 4-bit product: the weight and its scales are unpacked for the moment, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        ctx.shape = shape
        return x @ _Nf4Product.unpacked(x, shape).t()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad @ _Nf4Product.unpacked(grad, ctx.shape), None

    @staticmethod
    def unpacked(like: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        scales = torch.empty(-(-shape[0] * shape[1] // 64), dtype=torch.float32, device=like.device)
        weight = torch.empty(shape, dtype=like.dtype, device=like.device)
        del scales
        return weight


def nf4_linear() -> type:
    """A 4-bit layer in which PEFT sees bitsandbytes' own, and puts its LoRA for such layers around it."""
    import bitsandbytes

    class Nf4Linear(bitsandbytes.nn.Linear4bit):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            made = _Nf4Product.apply(x.to(self.compute_dtype), (self.out_features, self.in_features))
            return (made if self.bias is None else made + self.bias).to(x.dtype)

    return Nf4Linear


class _FusedAttention(torch.autograd.Function):
    """Torch's fused attention keeps its inputs, its output and a float32 per row and head; a mask of booleans is
    turned into numbers at every call, and those are kept too."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        out = torch.empty_like(query)
        rows = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
        bias = None if mask is None else torch.empty(mask.shape, dtype=query.dtype, device=query.device)
        ctx.save_for_backward(query, key, value, out, rows, bias)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def _attention(query: Any, key: Any, value: Any, attn_mask: Any = None, *_: Any, **__: Any) -> torch.Tensor:
    return _FusedAttention.apply(query, key, value, attn_mask)


def _dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    # A GPU keeps a mask of bytes; elsewhere, meta included, torch keeps a mask of x's own precision.
    return torch.native_dropout(x, p, True)[0] if training and p else x


class _Norm(torch.autograd.Function):
    """Liger's and Unsloth's RMSNorm keep their input and a float32 per row."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        rows = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
        ctx.save_for_backward(x, rows)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(grad)


class _Gated(torch.autograd.Function):
    """Their GeGLU and SwiGLU keep both inputs, and write the gradients over them."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        return gate, up


class _Rotary(torch.autograd.Function):
    """Their rotation of queries and keys keeps nothing but the angles, which are there anyway."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.empty_like(query), torch.empty_like(key)

    @staticmethod
    def backward(ctx: Any, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return query, key


def _rotary(query: Any, key: Any, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _Rotary.apply(query, key)


class _LoraGated(torch.autograd.Function):
    """Unsloth's MLP with LoRA in one piece: its input and both halves, and a byte per dropped element."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, module: Any, *matrices: torch.Tensor) -> torch.Tensor:
        rows = x.shape[:-1]
        gate, up = (
            _base(part, x) for part in (module.gate_proj, module.up_proj)
        )  # fmt: skip
        masks = [
            torch.empty((*rows, part.in_features), dtype=torch.uint8, device=x.device)
            for part in (module.gate_proj, module.up_proj, module.down_proj)
            if _dropping(part)
        ]
        ctx.save_for_backward(x, gate, up, *masks)
        ctx.module, ctx.shapes = module, [(m.shape, m.dtype) for m in matrices]
        return _base(module.down_proj, torch.empty_like(gate))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        x, gate, *_ = ctx.saved_tensors
        inner = torch.empty_like(gate)
        return torch.empty_like(x), None, *(torch.empty(s, dtype=d, device=inner.device) for s, d in ctx.shapes)


class _LoraProduct(torch.autograd.Function):
    """Unsloth's projections with LoRA keep their input, which is one for query, key and value."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Any, *matrices: torch.Tensor) -> torch.Tensor:
        masks = [torch.empty(x.shape, dtype=torch.uint8, device=x.device)] if _dropping(layer) else []
        ctx.save_for_backward(x, *masks)
        ctx.shapes = [(m.shape, m.dtype) for m in matrices]
        return _base(layer, x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        x, *_ = ctx.saved_tensors
        return torch.empty_like(x), None, *(torch.empty(s, dtype=d, device=x.device) for s, d in ctx.shapes)


def _dropping(layer: Any) -> bool:
    return any(isinstance(drop, torch.nn.Dropout) for drop in layer.lora_dropout.values())


def _base(layer: Any, x: torch.Tensor) -> torch.Tensor:
    weight = torch.empty((layer.out_features, layer.in_features), dtype=x.dtype, device=x.device)
    made = x.new_empty((*x.shape[:-1], layer.out_features))
    del weight
    return made


def _matrices(layer: Any) -> list[torch.Tensor]:
    return [*(a.weight for a in layer.lora_A.values()), *(b.weight for b in layer.lora_B.values())]


def install_layer_kernels(base: Any, fused_lora: bool) -> None:
    """Liger's norms, rotation and MLP in a model's modules; with `fused_lora` Unsloth's way through LoRA as well."""
    for module in base.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = _Norm.apply
        elif hasattr(module, "gate_proj") and hasattr(module, "down_proj"):
            module.forward = _mlp(module, fused_lora)
        elif fused_lora and hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            module.forward = _projection(module)


def _mlp(module: Any, fused_lora: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    if fused_lora and hasattr(module.gate_proj, "lora_A"):
        parts = module.gate_proj, module.up_proj, module.down_proj
        return lambda x: _LoraGated.apply(x, module, *(m for part in parts for m in _matrices(part)))
    return lambda x: module.down_proj(_Gated.apply(module.gate_proj(x), module.up_proj(x)))


def _projection(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: _LoraProduct.apply(x, module, *_matrices(module))


class _BlockLoss(torch.autograd.Function):
    """TRL's head in Triton: keeps its input, and computes a block of logits at a time, forward and backward."""

    ROWS, COLUMNS = 4096, 32768

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden)
        _BlockLoss.logits(hidden)
        return torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (hidden,) = ctx.saved_tensors
        made = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device)
        logits = _BlockLoss.logits(hidden)
        del logits
        return made.to(hidden.dtype), None

    @staticmethod
    def logits(hidden: torch.Tensor) -> torch.Tensor:
        rows = min(len(hidden), _BlockLoss.ROWS)
        return torch.empty((rows, _BlockLoss.COLUMNS), dtype=hidden.dtype, device=hidden.device)


class _GradientLoss(torch.autograd.Function):
    """Unsloth's heads: some rows of logits in float32 at a time, and the gradient in the forward pass already."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, rows: int, copies: int) -> torch.Tensor:
        made = torch.empty_like(hidden)
        shape = min(rows, len(hidden)), len(weight)
        logits = [torch.empty(shape, dtype=torch.float32, device=hidden.device) for _ in range(copies)]
        if hidden.dtype != torch.float32:
            logits.append(torch.empty(shape, dtype=hidden.dtype, device=hidden.device))
        del logits
        ctx.save_for_backward(hidden, made)
        return torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        _, made = ctx.saved_tensors
        return made * grad.to(made.dtype).unsqueeze(-1), None, None, None


def unsloth_rows(tokens: int, width: int, vocabulary: int) -> int:
    """As its fused head counts them: a power of two about tokens x width / vocabulary, within bounds, at most 2 GiB."""
    least = min(max(_power(512 * 151936 / vocabulary), 512), 4096)
    rows = min(max(_power(tokens * width / vocabulary), least), 4096)
    return max(1, min(rows, 2**31 // (4 * vocabulary), tokens))


def _power(value: float) -> int:
    return 1 << max(0, int(value).bit_length() - 1)


def loss_of(kind: str, base: Any, hidden: torch.Tensor) -> torch.Tensor:
    """The loss of some positions' hidden states, as one of the heads computes it."""
    weight = base.get_output_embeddings().weight
    if kind == "none":
        return hidden.sum()
    if kind == "fused":
        return _BlockLoss.apply(hidden, weight).sum()
    if kind == "unsloth":
        return _GradientLoss.apply(hidden, weight, unsloth_rows(len(hidden), hidden.shape[-1], len(weight)), 1).sum()
    cap = getattr(base.config.get_text_config(), "final_logit_softcapping", None)
    if kind == "unsloth on a CPU, summed":
        return _GradientLoss.apply(hidden, weight, max(1, 2**24 // len(weight)), 1).sum()
    if kind == "unsloth on a CPU":
        return _GradientLoss.apply(hidden, weight, max(1, 2**24 // len(weight)), 4 if cap else 2).sum()
    targets = torch.empty(len(hidden), dtype=torch.long, device=hidden.device)
    if kind == "chunked":
        from fallback.portable_loss import PortableLogProb

        wanted = ("log_probs", "entropy", "is_top1")
        return PortableLogProb.apply(hidden, weight, None, targets, 1.0, 0, cap, 1.0, wanted)[0].sum()
    assert kind == "full logits", kind
    logits = functional.linear(hidden, weight)
    if cap:
        logits = torch.tanh(logits / cap) * cap
    return functional.cross_entropy(logits.float(), targets, reduction="sum")


class Autocast(TorchFunctionMode):
    """torch.autocast's rules for CUDA, as far as these models meet them; torch itself has none for meta."""

    NARROW = frozenset({"linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm"})
    WIDE = frozenset(
        {"layer_norm", "softmax", "log_softmax", "pow", "__pow__", "rsqrt", "exp", "log", "sum", "norm", "cumsum",
         "cross_entropy", "nll_loss", "logsumexp"}
    )  # fmt: skip

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.copies: dict[int, torch.Tensor] = {}
        """Of trained parameters: made once in a forward pass, and shared."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in self.NARROW:
            args = [self._narrow(value) for value in args]
        elif name in self.WIDE and not (name in ("softmax", "sum") and kwargs.get("dtype")):
            args = [v.float() if isinstance(v, torch.Tensor) and v.dtype == self.dtype else v for v in args]
            kwargs = {k: v.float() if isinstance(v, torch.Tensor) and v.dtype == self.dtype else v
                      for k, v in kwargs.items()}  # fmt: skip
        return func(*args, **kwargs)

    def _narrow(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(self.dtype)
        if id(value) not in self.copies:
            self.copies[id(value)] = value.to(self.dtype)
        return self.copies[id(value)]


@contextmanager
def autocast(dtype: torch.dtype) -> Iterator[None]:
    """Computing at 16 bits; nothing but an answer to who asks whether it is on, where dtype is float32."""
    narrow = dtype != torch.float32
    with (
        Autocast(dtype) if narrow else nullcontext(),
        mock.patch.object(torch, "is_autocast_enabled", return_value=narrow),
        mock.patch.object(torch, "get_autocast_dtype", return_value=dtype),
    ):
        yield


@contextmanager
def kernels(cuda: bool, model_module: str, backend: str) -> Iterator[None]:
    """Fused attention, a GPU's dropout, a backend's rotation; and masks as they are given, None for none."""
    import sys

    from fallback import passes

    module = sys.modules[model_module]
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(functional, "scaled_dot_product_attention", _attention))
        stack.enter_context(
            mock.patch.object(module, "create_causal_mask", lambda *_, attention_mask=None, **__: attention_mask)
        )
        if cuda:
            stack.enter_context(mock.patch.object(functional, "dropout", _dropout))
        if cuda and backend != "peft" and not model_module.endswith("modeling_gpt_neox"):
            stack.enter_context(mock.patch.object(module, "apply_rotary_pos_emb", _rotary))
        stack.enter_context(mock.patch.object(passes, "numbers_of", numbers_of))
        stack.enter_context(mock.patch.object(passes, "kept_by_dropout", _kept))
        yield


def _kept(x: torch.Tensor, _: float) -> torch.Tensor:
    return torch.empty_like(x, dtype=torch.bool)


def numbers_of(base: Any, dtype: torch.dtype) -> torch.Tensor:
    if not hasattr(base, "compute_dtype"):
        return base.weight.to(dtype)
    like = torch.empty(0, dtype=dtype, device=base.weight.device)
    return _Nf4Product.unpacked(like, (base.out_features, base.in_features))
