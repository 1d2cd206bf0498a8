"""How much memory a training step takes, found by taking it on the meta device: the model's real forward and backward,
its real checkpointing, PEFT's real LoRA, where tensors have shapes and no contents. What is alive is counted storage by
storage; see standins for what takes the place of kernels.
"""

import json
import math
import weakref
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import astuple, dataclass, replace
from functools import cache, partial
from typing import Any, Literal
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from fallback import leave_out
from fallback.choose import BackendName
from recipes.stages import last_layer, standins
from recipes.stages.recipe import Settings

# Enough for the ends of a model, and for both kinds of attention where there are two.
_FEW = 2
Loss = Literal["none", "fused", "chunked", "full logits", "unsloth", "unsloth on a CPU", "unsloth on a CPU, summed"]


_MADE: dict[Any, Any] = {}
"""What an operation makes of such shapes. On the meta device torch finds it out in Python, and a step asks the same
thing for every layer, forward, again, and backward: remembered, a step takes a third of the time."""


class Live(TorchDispatchMode):
    """Bytes of the storages that operations made and that are still there."""

    def __init__(self, block: int = 512) -> None:
        super().__init__()
        self.block = block
        """A GPU's allocator hands out blocks of 512 bytes."""
        self.now = self.peak = 0
        self._known: set[int] = set()

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Tensors that were there before."""
        self._known |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = _made(func, args, kwargs or {})
        for value in (made,) if isinstance(made, torch.Tensor) else tree_iter(made):
            if isinstance(value, torch.Tensor):
                self._note(value.untyped_storage())
        return made

    def _note(self, storage: Any) -> None:
        if storage._cdata in self._known:
            return
        size = -(-storage.nbytes() // self.block) * self.block
        self._known.add(storage._cdata)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, storage._cdata, size)

    def _gone(self, which: int, size: int) -> None:
        self._known.discard(which)
        self.now -= size


def _made(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operation's outcome; from memory, if it is of tensors alone that are nobody else's."""
    key = func, _described(args), _described(kwargs)
    how = _MADE.get(key)
    if how is None:
        made = func(*args, **kwargs)
        _MADE[key] = _how(func, made, (args, kwargs))
        return made
    if not how:
        return func(*args, **kwargs)
    many, shapes = how
    new = tuple(torch.empty_strided(*shape, dtype=dtype, device="meta") for *shape, dtype in shapes)
    return new if many else new[0]


def _described(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, (tuple, list)):
        return tuple(_described(one) for one in value)
    if isinstance(value, dict):
        return tuple((name, _described(one)) for name, one in value.items())
    return type(value), value


def _how(func: Any, made: Any, given: Any) -> Any:
    """How to make the same again; nothing where shapes do not tell: where arguments are changed or shared. Not every
    operation that shares says so in its schema."""
    many = isinstance(made, tuple)
    taken = {one.untyped_storage()._cdata for one in tree_iter(given) if isinstance(one, torch.Tensor)}
    if func._schema.is_mutable or any(one.alias_info is not None for one in func._schema.returns):
        return ()
    shapes = []
    for one in made if many else (made,):
        if not isinstance(one, torch.Tensor) or one.device.type != "meta" or one.untyped_storage()._cdata in taken:
            return ()
        shape = one.shape, one.stride()
        again = torch.empty_strided(*shape, dtype=one.dtype, device="meta")
        if again.untyped_storage().nbytes() != one.untyped_storage().nbytes():
            return ()
        shapes.append((*shape, one.dtype))
    return many, shapes


@dataclass(frozen=True)
class Conditions:
    """What a step is computed with."""

    backend: BackendName = "peft"
    cuda: bool = True
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    attention: str = "sdpa"
    quantization: Literal["4bit", "8bit", "none"] = "4bit"
    checkpointing: bool = True
    loss: Loss = "fused"

    @property
    def width(self) -> int:
        """Bytes of a number."""
        return 4 if self.dtype == "float32" else 2


@dataclass(frozen=True)
class Batch:
    rows: int
    length: int
    supervised: int
    """Tokens that carry loss, in all rows together."""
    padded: bool = True
    """Not all rows have this length. Where they do, fused attention is given no mask."""
    first: bool = False
    """The first of an optimiser step: no gradients are there yet."""


def with_layers(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """The same model with fewer layers, both kinds of attention among them."""
    made = dict(config, num_hidden_layers=layers)
    kinds = config.get("layer_types")
    if kinds:
        period = kinds.index("full_attention") + 1 if "full_attention" in kinds else 1
        start = max(0, period - layers)
        made["layer_types"] = kinds[start : start + layers]
    return made


def meta_network(config: dict[str, Any], settings: Settings, on: Conditions) -> Any:
    """The base model with its LoRA matrices, as shapes only: by the PEFT code that trains."""
    leave_out.the_compiler()
    with leave_out.without(*leave_out.BY_TRANSFORMERS):
        from peft import LoraConfig, get_peft_model
        from transformers import AutoConfig, AutoModelForCausalLM

    from fallback import passes
    from recipes.stages.loading import lora_targets

    dtype = getattr(torch, on.dtype)
    with torch.device("meta"):
        shape = AutoConfig.for_model(**config)
        network = AutoModelForCausalLM.from_config(shape, dtype=dtype, attn_implementation=on.attention)
        head = network.get_output_embeddings()
        if on.quantization == "4bit":
            network.is_loaded_in_4bit = True
            made = standins.nf4_linear()
            for module in network.modules():
                if isinstance(module, torch.nn.Linear) and module is not head:
                    module.__class__, module.compute_dtype = made, dtype
                    module.weight.requires_grad_(False)
                    module.weight.compress_statistics, module.weight.quant_type = True, "nf4"
        lora = LoraConfig(
            r=settings.lora_rank, lora_alpha=settings.lora_alpha, lora_dropout=settings.lora_dropout,
            target_modules=lora_targets(network, settings), task_type="CAUSAL_LM", bias="none",
        )  # fmt: skip
        network = get_peft_model(network, lora)
    for parameter in network.parameters():
        if parameter.requires_grad:
            # As RecipeTrainer keeps them, quantised base or not.
            parameter.data = parameter.data.float()
    if on.cuda and on.backend != "peft":
        # Unsloth has its way through LoRA for these families alone; for the others torch compiles what it can.
        own = on.backend == "unsloth" and network.config.model_type in ("llama", "gemma2")
        standins.install_layer_kernels(network.get_base_model(), own)
    elif on.backend == "peft" and passes.fitting("cuda" if on.cuda else "cpu"):
        passes.teach(network)
        with mock.patch.object(passes, "numbers_of", standins.numbers_of):
            passes.unpack(network, on.dtype)
    return network


def weight_bytes(network: Any, on: Conditions) -> dict[str, int]:
    """The frozen weights: what is quantised, what is not, and of that the embeddings (and a head of its own)."""
    base, head = network.get_base_model(), network.get_output_embeddings()
    embedding = {id(p): p for p in (*base.get_input_embeddings().parameters(), *head.parameters())}
    frozen = [p for p in network.parameters() if not p.requires_grad and id(p) not in embedding]
    quantized: list[int] = []
    if on.quantization != "none":
        linear = [m for m in base.modules() if isinstance(m, torch.nn.Linear) and m is not head]
        quantized = [m.weight.numel() for m in linear if not m.weight.requires_grad]
    packed = sum(packed_bytes(n) if on.quantization == "4bit" else n for n in quantized)
    held = {id(b): b for b in base.buffers()}
    return {
        "quantized_weights": packed,
        "unquantized_weights": on.width * (sum(p.numel() for p in frozen) - sum(quantized))
        + sum(b.numel() * b.element_size() for b in held.values())
        # On CPUs 4-bit weights are kept unpacked beside themselves (passes.unpack).
        + sum(m.unpacked.nbytes for m in base.modules() if hasattr(m, "unpacked")),
        "embedding": on.width * sum(p.numel() for p in embedding.values()),
    }


def is_linear(module: Any) -> bool:
    return isinstance(module, torch.nn.Linear)


def packed_bytes(weights: int) -> int:
    """NF4 with double quantisation: half a byte, a byte of scale per 64, and its float32 per 256 of those; beside them
    two tables, of 16 and of 256 numbers, and a mean."""
    blocks = math.ceil(weights / 64)
    return math.ceil(weights / 2) + blocks + 4 * math.ceil(blocks / 256) + 4 * (16 + 256 + 1)


def peak_bytes(config: dict[str, Any], settings: Settings, on: Conditions, batches: Sequence[Batch]) -> int:
    """The most that the parts of an optimiser step hold at one time, beside weights, gradients and optimiser."""
    return max(_peak(config, settings, on, batch) for batch in batches)


def _peak(config: dict[str, Any], settings: Settings, on: Conditions, batch: Batch) -> int:
    """Of the whole model, by models of two and three layers: at every moment each further layer adds the same."""
    layers = config["num_hidden_layers"]
    few = [Shape.of(config, n, settings, on) for n in (_FEW, min(_FEW + 1, layers))]
    trained = [4 * sum(p.numel() for p in _network(shape).parameters() if p.requires_grad) for shape in few]
    gradients = trained[0] + (layers - _FEW) * (trained[1] - trained[0])
    head = head_moments(few[0], on.loss, batch)
    if layers == _FEW:
        return moments(few[0], batch).with_head(head) - batch.first * gradients
    later = replace(batch, first=False)
    # What is kept of each layer goes to the host's memory and comes back when it is needed.
    offloaded = on.backend == "unsloth" and on.cuda and on.checkpointing
    kept = batch.rows * batch.length * config["hidden_size"] * on.width if offloaded else 0
    two, three = (moments(shape, later) for shape in few)
    whole = Moments(
        *(a + (layers - _FEW) * max(0, b - a - kept) for a, b in zip(astuple(two), astuple(three), strict=True))
    )
    # The first part's gradients come into being from the last layer to the first, as its activations go: at the end all
    # are there, and of the activations a few layers' at most.
    return max(whole.with_head(head) - gradients, two.backward) if batch.first else whole.with_head(head)


@dataclass(frozen=True)
class Shape:
    """A network by all that its layers depend on. Which loss is computed and how large a batch is are none of it: one
    network serves them all, and one pass through its layers every loss."""

    config: str
    settings: Settings
    on: Conditions

    @classmethod
    def of(cls, config: dict[str, Any], layers: int, settings: Settings, on: Conditions) -> "Shape":
        lora = {name: getattr(settings, name) for name in ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets")}
        return cls(json.dumps(with_layers(config, layers)), Settings(**lora), replace(on, loss="none"))


@dataclass(frozen=True)
class Moments:
    """Bytes that the layers hold: at most in the forward pass; at its end, with its outcome and without; and at most in
    the backward pass."""

    forward: int
    outcome: int
    kept: int
    backward: int

    def with_head(self, head: tuple[int, int]) -> int:
        """The most, with a loss head that takes so much on top at the end of the forward pass, and at the beginning of
        the backward pass."""
        return max(self.forward, self.outcome + head[0], self.kept + head[1], self.backward)


@cache
def _network(shape: Shape) -> Any:
    on = shape.on
    network = meta_network(json.loads(shape.config), shape.settings, on)
    base = network.get_base_model()
    network.train()
    if on.checkpointing:
        again = partial(_again, on)
        how = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": again}
        base.gradient_checkpointing_enable(how)
        base.enable_input_require_grads()
    return network


def _computing(on: Conditions) -> Any:
    return standins.autocast(getattr(torch, on.dtype))


def _again(on: Conditions) -> tuple[Any, Any]:
    """Checkpointing computes again what it threw away, under the same rules of precision."""
    return nullcontext(), _computing(on)


@cache
def moments(shape: Shape, batch: Batch) -> Moments:
    """A forward and a backward pass of everything but the loss."""
    network, on = _network(shape), shape.on
    base = network.get_base_model()
    config = base.config.get_text_config()
    trained = [p for p in network.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = None if batch.first else torch.zeros_like(parameter)
    live = Live(512 if on.cuda else 1)
    live.ignore([*network.parameters(), *network.buffers(), *(p.grad for p in trained if p.grad is not None)])
    live.ignore([module.unpacked for module in network.modules() if hasattr(module, "unpacked")])
    asked = torch.empty(batch.supervised if on.backend != "unsloth" else 0, dtype=torch.long, device="meta")
    kernels = standins.kernels(on.cuda, type(base.base_model).__module__, on.backend)
    served = last_layer.cut(last_layer.parts_of(network), asked, batch.rows * batch.length)
    with kernels, served, live:
        with _computing(on):
            mask = _masks(config, on, batch)
            ids = torch.empty((batch.rows, batch.length), dtype=torch.long, device="meta")
            hidden = base.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            del mask
            outcome = live.now
            loss = _counted(hidden, batch).sum()
            del hidden
        forward, kept, live.peak = live.peak, live.now, live.now
        loss.backward()
    return Moments(forward, outcome, kept, live.peak)


def _counted(hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The head is given a copy of the positions that carry loss."""
    return hidden[:, :-1].reshape(-1, hidden.shape[-1])[: batch.supervised].clone()


def head_moments(shape: Shape, loss: Loss, batch: Batch) -> tuple[int, int]:
    """The most that the loss alone takes in the forward pass, and in its own part of the backward pass."""
    base, on = _network(shape).get_base_model(), shape.on
    size = batch.rows, batch.length, base.config.get_text_config().hidden_size
    hidden = torch.empty(size, dtype=getattr(torch, on.dtype), device="meta", requires_grad=True)
    live = Live(512 if on.cuda else 1)
    live.ignore([hidden, *base.parameters()])
    with live:
        with _computing(on):
            value = standins.loss_of(loss, base, _counted(hidden, batch))
        forward, live.peak = live.peak, live.now
        value.backward()
    return forward, live.peak


def _masks(config: Any, on: Conditions, batch: Batch) -> Any:
    """As transformers makes them: one for each kind of attention, where one is needed."""

    def made(window: int | None) -> torch.Tensor | None:
        spare = not batch.padded and on.attention != "eager" and (window is None or batch.length < window)
        shape = batch.rows, 1, batch.length, batch.length
        return None if spare else torch.empty(shape, dtype=torch.bool, device="meta")

    if "sliding_attention" not in (getattr(config, "layer_types", None) or ()):
        return made(None)
    return {"full_attention": made(None), "sliding_attention": made(config.sliding_window)}


def optimizer_bytes(network: Any, optimizer: str, cuda: bool) -> int:
    """Two numbers for each trained one, in float32 or in 8 bits with a scale per 256; small matrices stay whole. What
    is paged counts too: it is there until something else needs its place."""
    total = 0
    for parameter in (p for p in network.parameters() if p.requires_grad):
        count = parameter.numel()
        if "8bit" in optimizer and count >= 4096:
            total += 2 * (count + 4 * math.ceil(count / 256))
        else:
            # torch's AdamW counts its steps in a tensor for each matrix, which a GPU's lies in the host's memory.
            total += 8 * count + (0 if cuda else 4)
    return total


def held_bytes(network: Any, on: Conditions, optimizer: str) -> dict[str, int]:
    """What is there whatever the batch: weights, and at a step's end gradients and the optimiser's state."""
    trained = 4 * sum(p.numel() for p in network.parameters() if p.requires_grad)
    return {
        **weight_bytes(network, on),
        "lora_weights": trained,
        "gradients": trained,
        "optimizer": optimizer_bytes(network, optimizer, on.cuda),
    }
