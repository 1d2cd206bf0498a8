"""How much memory a training step takes, found by taking it on the meta device: the model's real forward and backward,
its real checkpointing, where tensors have shapes and no contents. What is alive is counted storage by storage.

Stand-ins take the place of what a GPU computes with kernels of its own: the NF4 product, fused attention, the fused
loss. They keep alive for the backward pass what those keep.
"""

import math
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from recipes.stages.base_model import architecture
from recipes.stages.recipe import Recipe, Settings


class Live(TorchDispatchMode):
    """Bytes of the storages that operations made and that are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Tensors that were there before."""
        self._known |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for value in tree_iter(made):
            if isinstance(value, torch.Tensor):
                self._note(value.untyped_storage())
        return made

    def _note(self, storage: Any) -> None:
        if storage._cdata in self._known:
            return
        # A GPU's allocator hands out blocks of 512 bytes.
        size = -(-storage.nbytes() // 512) * 512
        self._known.add(storage._cdata)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, storage._cdata, size)

    def _gone(self, which: int, size: int) -> None:
        self._known.discard(which)
        self.now -= size


class _Nf4Product(torch.autograd.Function):
    """bitsandbytes' 4-bit product: the weight is unpacked for the moment, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        ctx.shape, ctx.dtype = shape, x.dtype
        return x @ torch.empty(shape, dtype=x.dtype, device=x.device).t()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad @ torch.empty(ctx.shape, dtype=ctx.dtype, device=grad.device), None


class Nf4Linear(torch.nn.Linear):
    """Where a base weight is held in 4 bits; the weight itself stays a shape for PEFT to read."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = _Nf4Product.apply(x, (self.out_features, self.in_features))
        return made if self.bias is None else made + self.bias


class _FusedAttention(torch.autograd.Function):
    """Flash attention keeps its inputs, its output and a float32 per row and head."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(query)
        rows = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key, value, out, rows)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


class _FusedLoss(torch.autograd.Function):
    """A head that keeps its input, and computes `block` logits of each token at a time, forward and backward."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, block: int) -> torch.Tensor:
        ctx.save_for_backward(hidden)
        ctx.block = block
        _FusedLoss.logits(hidden, block)
        return torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (hidden,) = ctx.saved_tensors
        logits = _FusedLoss.logits(hidden, ctx.block)
        made = torch.empty(hidden.shape, dtype=torch.float32 if ctx.block else hidden.dtype, device=hidden.device)
        del logits
        return made.to(hidden.dtype), None, None

    @staticmethod
    def logits(hidden: torch.Tensor, block: int) -> torch.Tensor:
        return torch.empty((min(len(hidden), 4096), block), dtype=hidden.dtype, device=hidden.device)


def _fused_attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    return _FusedAttention.apply(query, key, value)


@contextmanager
def _kernels() -> Iterator[None]:
    real = torch.nn.functional.scaled_dot_product_attention
    torch.nn.functional.scaled_dot_product_attention = _fused_attention
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = real


@dataclass(frozen=True)
class Step:
    """What a training step holds at its peak, beside weights, gradients and optimiser."""

    activations: int
    loss_head: int
    """What the loss adds to the peak: nothing where the activations' own peak is elsewhere."""


def meta_network(recipe: Recipe, settings: Settings, quantization: str, attention: str) -> Any:
    """The recipe's full-size base model with its LoRA matrices, as shapes only: by the PEFT code that trains."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from recipes.stages.train import lora_targets

    with torch.device("meta"):
        config = AutoConfig.for_model(**architecture(recipe))
        network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
        head = network.get_output_embeddings()
        for module in network.modules():
            if quantization == "4bit" and isinstance(module, torch.nn.Linear) and module is not head:
                module.__class__ = Nf4Linear
        lora = LoraConfig(
            r=settings.lora_rank, lora_alpha=settings.lora_alpha, lora_dropout=settings.lora_dropout,
            target_modules=lora_targets(network, settings), task_type="CAUSAL_LM", bias="none",
        )  # fmt: skip
        return get_peft_model(network, lora)


def weight_bytes(network: Any, quantization: str) -> dict[str, int]:
    """The frozen weights: what is quantised, and what stays at 16 bits."""
    frozen = [p for p in network.parameters() if not p.requires_grad]
    if quantization == "none":
        return {"quantized": 0, "unquantized": sum(2 * p.numel() for p in frozen)}
    base, head = network.get_base_model(), network.get_output_embeddings()
    linear = [m for m in base.modules() if isinstance(m, torch.nn.Linear) and m is not head and _frozen(m)]
    count = sum(m.weight.numel() for m in linear)
    packed = sum(packed_bytes(m.weight.numel()) if quantization == "4bit" else m.weight.numel() for m in linear)
    return {"quantized": packed, "unquantized": 2 * (sum(p.numel() for p in frozen) - count)}


def _frozen(module: Any) -> bool:
    return not module.weight.requires_grad


def step_bytes(network: Any, rows: int, length: int, supervised: int, checkpointing: bool) -> Step:
    """Take a step with `rows` examples of `length` tokens, of which `supervised` in all carry loss."""
    without = _peak(network, rows, length, supervised, checkpointing, block=0)
    whole = _peak(network, rows, length, supervised, checkpointing, block=32768)
    return Step(without, whole - without)


def _peak(network: Any, rows: int, length: int, supervised: int, checkpointing: bool, block: int) -> int:
    base = network.get_base_model()
    network.train()
    for parameter in network.parameters():
        if parameter.requires_grad:
            # As autocast has it: computed with at 16 bits, whatever the optimiser keeps.
            parameter.data = parameter.data.to(torch.bfloat16)
            # There from the first part of an optimiser step on, and counted beside the activations.
            parameter.grad = torch.zeros_like(parameter)
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        base.enable_input_require_grads()
    else:
        base.gradient_checkpointing_disable()
    config = base.config.get_text_config()
    live = Live()
    live.ignore(
        [*network.parameters(), *network.buffers(), *(p.grad for p in network.parameters() if p.grad is not None)]
    )
    with torch.device("meta"), _kernels(), live:
        allowed = torch.empty((rows, 1, length, length), dtype=torch.bool)
        mixed = "sliding_attention" in (getattr(config, "layer_types", None) or ())
        mask = {"full_attention": allowed, "sliding_attention": allowed.clone()} if mixed else allowed
        ids = torch.empty((rows, length), dtype=torch.long)
        hidden = base.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        counted = hidden.reshape(-1, hidden.shape[-1])[:supervised]
        loss = _FusedLoss.apply(counted, base.get_output_embeddings().weight, block).sum()
        del hidden, counted
        loss.backward()
    return live.peak


def packed_bytes(weights: int) -> int:
    """NF4 with double quantisation: half a byte, a byte of scale per 64, and its float32 per 256 of those."""
    blocks = math.ceil(weights / 64)
    return math.ceil(weights / 2) + blocks + 4 * math.ceil(blocks / 256)
