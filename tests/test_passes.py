"""Fewer passes over memory, and a last layer that serves only who is asked: against PEFT and transformers as they are.

Run as a program it compares in a process of its own, and prints what it found.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
import torch
from conftest import found_under, ready_to_compare, recipe

from fallback import passes
from fallback.patched import ATTEND

FAMILIES = ["gemma3_12b_opercode", "llama_1b_civil", "polyglot_1_3b_ohlora", "gemma2_2b_ohlora"]


@cache
def compared_apart() -> dict[str, Any]:
    return found_under("peft", __file__)


@pytest.fixture(scope="module", params=FAMILIES)
def found(request: pytest.FixtureRequest) -> dict[str, Any]:
    return compared_apart()[request.param]


@pytest.mark.parametrize("quantization", ["none", "4bit"])
@pytest.mark.parametrize("way", ["plain", "checkpointing"])
@pytest.mark.parametrize("what", ["passes", "last layer"])
def test_losses_and_gradients_are_those_of_the_original_code(
    found: dict[str, Any], quantization: str, way: str, what: str
) -> None:
    here = found[f"{quantization} float32 {way}"][what]
    assert here["matrices"] > 0
    assert here["loss"] < 2e-6
    assert here["gradient"] < 2e-5


def test_unpacked_weights_move_no_digit(found: dict[str, Any]) -> None:
    assert found["unpacked"]["layers"] >= 8
    assert found["unpacked"]["same"]


def test_weights_are_kept_unpacked_where_they_take_no_more_than_a_quarter_of_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32).to("cpu")
    x, towards = torch.randn(3, 64, requires_grad=True), torch.randn(3, 64)
    usual = layer(x)
    (gradient,) = torch.autograd.grad(usual, x, towards)
    needed = 4 * 64 * 64 * 4
    monkeypatch.setattr(passes, "memory_bytes", lambda: needed - 1)
    assert "more than a quarter of" in str(passes.unpack(layer, "float32"))
    assert "forward" not in vars(layer)
    monkeypatch.setattr(passes, "memory_bytes", lambda: needed)
    assert passes.unpack(layer, "float32") is None
    assert unpacked_layers(layer) == [layer]
    # A layer without LoRA goes through torch's own backward pass.
    assert layer(x).equal(usual)
    assert torch.autograd.grad(layer(x), x, towards)[0].equal(gradient)
    assert passes.frozen_weight(layer, torch.float32) is layer.unpacked
    assert passes.frozen_weight(layer, torch.bfloat16).dtype == torch.bfloat16


def test_weights_are_not_kept_unpacked_for_too_many_processes_nor_for_another_precision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from bitsandbytes.nn import Linear4bit

    monkeypatch.setattr(passes, "memory_bytes", lambda: 4 * 64 * 64 * 4)
    layer = Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32).to("cpu")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert "more than a quarter of" in str(passes.unpack(layer, "float32"))
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    narrow = Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.bfloat16).to("cpu", torch.bfloat16)
    assert passes.unpack(narrow, "float32") is None
    assert unpacked_layers(narrow) == []
    assert passes.unpack(layer, "float32") is None
    assert unpacked_layers(layer) == [layer]


@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32])
def test_weights_are_kept_unpacked_in_bfloat16_too(monkeypatch: pytest.MonkeyPatch, given: torch.dtype) -> None:
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(4)
    layer = Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.bfloat16)
    layer = layer.to(torch.bfloat16).to("cpu")
    monkeypatch.setattr(passes, "memory_bytes", lambda: 2 * 64 * 64 * 4)
    x = torch.randn(3, 64, dtype=given)
    with torch.autocast("cpu", torch.bfloat16):
        usual = layer(x)
        assert passes.unpack(layer, "bfloat16") is None
        assert unpacked_layers(layer) == [layer]
        assert layer.unpacked.dtype == torch.bfloat16
        assert layer(x).dtype == usual.dtype
        assert layer(x).equal(usual)


@pytest.mark.parametrize("way", ["plain", "checkpointing"])
def test_what_falls_to_dropout_falls_as_in_peft(found: dict[str, Any], way: str) -> None:
    """Its own dropout, given the same numbers to leave out."""
    here = found[f"dropout {way}"]
    assert here["changed"] > 2e-5
    assert here["loss"] < 2e-6
    assert here["gradient"] < 2e-5


@pytest.mark.parametrize("share", [0.05, 0.1, 0.5])
def test_dropout_leaves_its_share_wherever_one_looks(share: float) -> None:
    torch.manual_seed(3)
    x = torch.empty(2, 301, 511)
    kept = passes.kept_by_dropout(x, share).double()
    off = (share * (1 - share)) ** 0.5
    assert abs(kept.mean() - (1 - share)) < 5 * off / x.numel() ** 0.5
    for means in (kept.mean((0, 1)), kept.mean((0, 2)), (kept[:, 1:] * kept[:, :-1]).mean((0, 2)) ** 0.5):
        assert 0.5 * off < (means - (1 - share)).abs().max() * (x.numel() / len(means)) ** 0.5 < 6 * off


def test_dropout_is_drawn_by_torchs_seed_and_anew_every_time() -> None:
    x = torch.empty(64, 64)
    torch.manual_seed(1)
    first, second = passes.kept_by_dropout(x, 0.5), passes.kept_by_dropout(x, 0.5)
    torch.manual_seed(1)
    assert passes.kept_by_dropout(x, 0.5).equal(first)
    assert 0.4 < (first == second).double().mean() < 0.6


def test_in_bfloat16_it_is_no_less_exact(found: dict[str, Any]) -> None:
    """Distances to the float32 gradients of the same weights, of what is computed in either way."""
    assert 0 < found["bfloat16"]["passes"] < 1.2 * found["bfloat16"]["original"]


def test_every_layer_is_taught(found: dict[str, Any]) -> None:
    told = found["patched"]
    assert found["lora_layers"] == sum(n for name, n in told.items() if name.endswith("passes.lora_forward"))
    # What is left of several networks, the last of them in float32: only capped attention is another there.
    capped = "Gemma2" in found["class"]
    assert sum(n for name, n in told.items() if "fallback.attention" in name) == capped * found["layers"]
    if "NeoX" not in found["class"]:
        assert found["norms"] == sum(n for name, n in told.items() if name.endswith("passes.norm_forward"))


@pytest.mark.parametrize("quantization", ["none", "4bit"])
def test_whole_matrices_answer_as_layers_and_lora_do(found: dict[str, Any], quantization: str) -> None:
    here = found[f"whole {quantization}"]
    assert here["why_not"] is None
    assert here["layers"] == found["lora_layers"]
    # What LoRA adds is rounded too: more of it on one processor than on another.
    assert 0 < here["apart"] < 1e-5 * max(1, here["of_training"])
    assert here["of_training"] > 0.05
    # Where the adapter is turned off, nothing of it is left.
    assert here["base_apart"] == 0


def test_whole_matrices_of_bfloat16_are_no_less_exact_than_layers_and_lora(found: dict[str, Any]) -> None:
    """Distances of logits to the float32 ones of the same weights."""
    here = found["whole bfloat16"]
    assert here["whole_layers"] == found["lora_layers"]
    assert here["together"] != here["apart"]
    assert 0 < here["together"] < 1.2 * here["apart"]
    assert here["together"] < 0.5 * here["of_training"]


def test_whole_matrices_of_bfloat16_lose_no_more_of_a_small_change_than_peft() -> None:
    """What LoRA adds is two thousandths of the weights: in bfloat16 a fifth of it is lost, wherever it is added."""
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    torch.manual_seed(0)
    base = torch.nn.Linear(512, 512, bias=False, dtype=torch.bfloat16)
    torch.nn.init.normal_(base.weight, std=0.02)
    layer = Linear(base, "default", LoraConfig(r=16), r=16, lora_alpha=16)
    down, up = layer.lora_A["default"].float().weight, layer.lora_B["default"].float().weight
    torch.nn.init.normal_(down, std=16**-0.5)
    torch.nn.init.normal_(up, std=0.02 / 500)
    x = torch.randn(512, 512).bfloat16()
    added = (x.float() @ (up @ down).t()).detach()

    def kept() -> float:
        with torch.inference_mode():
            changed = layer(x).float() - x.float() @ base.weight.float().t()
        return ((changed * added).sum() / added.square().sum()).item()

    apart = kept()
    passes.teach(layer)
    assert passes.put_together(layer, "bfloat16") is None
    assert 0.7 < apart < 0.9
    assert abs(kept() - apart) < 0.03


@pytest.mark.parametrize(
    ("limit", "dtype"),
    [
        ("machine", "float32"),
        ("machine", "bfloat16"),
        ("container", "float32"),
        ("batch system", "float32"),
        ("old container", "bfloat16"),
    ],
)
def test_no_whole_matrices_without_memory_for_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: str, dtype: str
) -> None:
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    layer = Linear(torch.nn.Linear(64, 64), "default", LoraConfig(r=2), r=2, lora_alpha=2)
    passes.teach(layer)
    needed = 4 * 64 * 64 * getattr(torch, dtype).itemsize
    total, place, file = {
        "machine": (needed - 1, "0::/", "memory.max"),
        "container": (2**40, "0::/docker/on/the/host", "memory.max"),
        "batch system": (2**40, "0::/slurm/job_1", "slurm/job_1/memory.max"),
        "old container": (2**40, "4:memory:/docker/on/the/host", "memory/memory.limit_in_bytes"),
    }[limit]
    machine = psutil.virtual_memory()._replace(total=total)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    monkeypatch.setattr(passes, "PROC", tmp_path / "proc")
    monkeypatch.setattr(passes, "CGROUPS", tmp_path / "groups")
    told, at = tmp_path / "proc/self/cgroup", tmp_path / "groups" / file
    for path in (told, at):
        path.parent.mkdir(parents=True, exist_ok=True)
    told.write_text(f"7:cpu,cpuacct:/elsewhere\n{place}\n", encoding="utf-8")
    at.write_text("max\n" if limit == "machine" else f"{needed - 1}\n", encoding="utf-8")
    why_not = passes.put_together(layer, dtype)
    assert why_not
    assert "more than a quarter of" in why_not
    assert layer.forward.__func__ is passes.lora_forward
    at.write_text(f"{needed}\n", encoding="utf-8")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine._replace(total=2**40))
    assert passes.put_together(layer, dtype) is None
    assert layer.forward.__func__ is passes.whole_forward
    assert layer.whole.dtype == getattr(torch, dtype)


def test_the_last_layer_is_left_as_it_was(found: dict[str, Any]) -> None:
    assert found["parts"] >= 2
    assert found["parts_after"] == found["parts_before"]
    # Who is not asked is not computed: zeros come out.
    assert found["rows_computed"] < found["rows_given"]


@pytest.mark.parametrize("library", ["FSDP", "DEEPSPEED"])
def test_not_where_parameters_are_divided_nor_on_a_gpu(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    assert passes.fitting("cpu")
    assert not passes.fitting("cuda")
    monkeypatch.setenv(f"ACCELERATE_USE_{library}", "true")
    assert not passes.fitting("cpu")


def test_a_variant_of_lora_is_left_alone() -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = AutoConfig.for_model(
        "llama", hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8
    )
    network = get_peft_model(
        AutoModelForCausalLM.from_config(shape),
        LoraConfig(task_type="CAUSAL_LM", use_dora=True, target_modules=["q_proj"]),
    )
    passes.teach(network)
    layer = next(m for n, m in network.named_modules() if n.endswith("q_proj"))
    assert "forward" not in vars(layer)


def test_where_dropout_leaves_nothing_peft_is_asked() -> None:
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    base = torch.nn.Linear(4, 3)
    how = LoraConfig(r=2, lora_dropout=1.0, init_lora_weights=False)
    layer = Linear(base, "default", how, r=2, lora_alpha=2)
    passes.teach(layer)
    assert "forward" in vars(layer)
    x = torch.randn(5, 4)
    assert layer.train()(x).equal(base(x))
    assert not layer.eval()(x).equal(base(x))


def test_no_last_layer_is_cut_under_unsloth_nor_of_a_family_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaConfig, LlamaModel

    from recipes.stages import last_layer

    unknown = torch.nn.Module()
    unknown.layers = torch.nn.ModuleList([torch.nn.ModuleDict({"mlp": torch.nn.Linear(2, 2)})])
    monkeypatch.delitem(sys.modules, "unsloth", raising=False)
    assert last_layer.parts(unknown) == []
    known = LlamaModel(
        LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
    )
    assert last_layer.parts(known)
    monkeypatch.setitem(sys.modules, "unsloth", torch)
    assert last_layer.parts(known) == []


@pytest.mark.parametrize(("few_lengths", "served"), [(False, 10), (True, 16)])
def test_the_last_layer_serves_a_number_of_tokens_that_comes_again(
    few_lengths: bool, served: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaConfig, LlamaModel

    from recipes.stages.last_layer import only_asked_for

    monkeypatch.delitem(sys.modules, "unsloth", raising=False)
    network = LlamaModel(
        LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, vocab_size=8)
    )
    labels = torch.full((2, 40), -100)
    labels[:, 30:35] = 1
    ids = torch.arange(80).view(2, 40) % 8
    seen: list[int] = []
    network.layers[-1].mlp.gate_proj.register_forward_pre_hook(lambda _, x: seen.append(x[0].shape[:-1].numel()))
    with torch.no_grad():
        whole = network(ids).last_hidden_state
        with only_asked_for(network, labels, few_lengths):
            some = network(ids).last_hidden_state
    assert seen == [80, served]
    torch.testing.assert_close(some[:, 29:34], whole[:, 29:34])


@contextmanager
def original(network: Any) -> Iterator[None]:
    """The network as PEFT and transformers made it, with our numbers in the place of dropout's."""
    taught = [(m, vars(m).pop("forward")) for m in network.modules() if _is_ours(vars(m).get("forward"))]
    attending = [(m, vars(m).pop(ATTEND)) for m in network.modules() if ATTEND in vars(m)]
    try:
        with mock.patch.object(torch.nn.Dropout, "forward", dropped):
            yield
    finally:
        for module, attend in attending:
            setattr(module, ATTEND, attend)
        for module, forward in taught:
            module.forward = forward


@contextmanager
def packed(network: Any) -> Iterator[int]:
    """With weights that are unpacked in every pass."""
    kept = [(layer, vars(layer).pop("unpacked"), vars(layer).pop("forward")) for layer in unpacked_layers(network)]
    try:
        yield len(kept)
    finally:
        for layer, numbers, forward in kept:
            layer.unpacked, layer.forward = numbers, forward


def unpacked_layers(network: Any) -> list[Any]:
    ours = passes.unpacked_forward
    return [m for m in network.modules() if getattr(vars(m).get("forward"), "__func__", None) is ours]


def dropped(self: torch.nn.Dropout, x: torch.Tensor) -> torch.Tensor:
    return x * passes.kept_by_dropout(x, self.p) / (1 - self.p) if self.training and self.p else x


def _is_ours(forward: Any) -> bool:
    return getattr(forward, "__module__", "") == passes.__name__


def compared(name: str) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for quantization in ("none", "4bit"):
        network, batch = ready(name, quantization, "float32")
        for way in ("plain", "checkpointing"):
            if way == "checkpointing":
                checkpointed(network)
            ours, (cut, _) = taken(network, batch), taken(network, batch, cut=True)
            with original(network):
                theirs = taken(network, batch)
            result[f"{quantization} float32 {way}"] = {
                "passes": apart(ours, theirs), "last layer": apart((cut, _), theirs)
            }  # fmt: skip
        if quantization == "4bit":
            ours = taken(network, batch)
            with packed(network) as layers:
                theirs = taken(network, batch)
            result["unpacked"] = {
                "layers": layers,
                "same": ours[0].equal(theirs[0]) and all(g.equal(theirs[1][n]) for n, g in ours[1].items()),
            }
        result[f"whole {quantization}"] = whole(network, batch)
        network, batch = ready(name, quantization, "float32")
    result |= told(network, batch)
    network, batch = ready(name, "none", "float32", dropout=0.2)
    still = taken(network.eval(), batch)
    network.train()
    for way in ("plain", "checkpointing"):
        if way == "checkpointing":
            checkpointed(network)
        ours = taken(network, batch)
        with original(network):
            theirs = taken(network, batch)
        result[f"dropout {way}"] = {**apart(ours, theirs), "changed": apart(ours, still)["loss"]}
    exact, batch = ready(name, "none", "bfloat16")
    ours = taken(exact, batch, narrow=True)
    with original(exact):
        theirs = taken(exact, batch, narrow=True)
        exact.float()
        best = taken(exact, batch)
    result["bfloat16"] = {"passes": distance(ours, best), "original": distance(theirs, best)}
    result["whole bfloat16"] = narrow_whole(*ready(name, "none", "bfloat16"))
    return result


def answers(network: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    given = {name: value for name, value in batch.items() if name != "labels"}
    network.eval()
    with torch.inference_mode():
        return network(**given, use_cache=False).logits.float()


def narrow_whole(network: Any, batch: dict[str, torch.Tensor]) -> dict[str, float]:
    found = {"apart": answers(network, batch)}
    assert passes.put_together(network, "bfloat16") is None
    found["together"] = answers(network, batch)
    layers = sum(getattr(m.forward, "__func__", None) is passes.whole_forward for m in network.modules())
    passes.teach(network.float())
    best = answers(network, batch)
    with network.disable_adapter():
        found["of_training"] = answers(network, batch)
    told = {name: (logits - best).square().mean().sqrt().item() for name, logits in found.items()}
    return {**told, "whole_layers": layers}


def whole(network: Any, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    def base() -> torch.Tensor:
        with network.disable_adapter():
            return answers(network, batch)

    usual, untrained = answers(network, batch), base()
    why_not = passes.put_together(network, "float32")
    size = usual.std()
    return {
        "why_not": why_not,
        "layers": sum(getattr(m.forward, "__func__", None) is passes.whole_forward for m in network.modules()),
        "apart": ((answers(network, batch) - usual).abs().max() / size).item(),
        "of_training": ((usual - untrained).abs().max() / size).item(),
        "base_apart": (base() - untrained).abs().max().item(),
    }


def checkpointed(network: Any) -> None:
    network.gradient_checkpointing_enable({"use_reentrant": False})
    network.enable_input_require_grads()


def ready(name: str, quantization: Any, dtype: Any, dropout: float = 0.0) -> tuple[Any, dict[str, torch.Tensor]]:
    from recipes.stages.prepare import sample_examples

    model = ready_to_compare(name, "peft", quantization, dtype, dropout)
    from recipes.stages.batches import Batches

    network = model.network
    rendered = [r for r in (model.renderer.example(e, 512) for e in sample_examples(recipe(name))) if r]
    rows = sorted(rendered, key=lambda r: len(r.input_ids))
    items = [{"input_ids": r.input_ids, "labels": r.labels} for r in (rows[0], rows[1], rows[-1])]
    return network, Batches(model.tokenizer.pad_token_id, network.config.model_type == "gemma3")(items)


def taken(
    network: Any, batch: dict[str, torch.Tensor], cut: bool = False, narrow: bool = False
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    from recipes.stages.last_layer import only_asked_for

    network.zero_grad()
    torch.manual_seed(1)
    with only_asked_for(network, batch["labels"]) if cut else nullcontext():
        with torch.autocast("cpu", torch.bfloat16) if narrow else nullcontext():
            losses = network(**batch, fused_lm_head=True, use_cache=False).log_probs.sum(-1)
        losses.sum().backward()
    gradients = {n: p.grad.clone() for n, p in network.named_parameters() if p.requires_grad}
    return losses.detach(), gradients


def apart(some: Any, others: Any) -> dict[str, float]:
    (losses, gradients), (other_losses, other_gradients) = some, others
    return {
        "loss": ((losses - other_losses).abs() / other_losses.abs()).max().item(),
        "gradient": max(((g - other_gradients[n]).abs().max() / g.abs().max()).item() for n, g in gradients.items()),
        "matrices": len(gradients),
    }


def distance(some: Any, best: Any) -> float:
    away = sum((g - best[1][n]).square().sum().item() for n, g in some[1].items())
    return (away / sum(g.square().sum().item() for g in best[1].values())) ** 0.5


def told(network: Any, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    from fallback.patched import patched
    from recipes.stages import last_layer

    parts = last_layer.parts(network)
    before = [str(part.forward) for part in parts]
    seen: list[int] = []
    inside = next(m for m in parts[-1].modules() if isinstance(m, torch.nn.Linear))
    hook = inside.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:-1].numel()))
    taken(network, batch, cut=True)
    hook.remove()
    return {
        "class": type(network.get_base_model()).__name__,
        "patched": patched(network),
        "lora_layers": sum(isinstance(m, LoraLayer) for m in network.modules()),
        "layers": network.config.num_hidden_layers,
        "norms": sum(type(m).__name__.endswith("RMSNorm") for m in network.modules()),
        "parts": len(parts),
        "parts_before": before,
        "parts_after": [str(part.forward) for part in parts],
        "rows_computed": max(seen),
        "rows_given": batch["input_ids"].numel(),
    }


if __name__ == "__main__":
    print(json.dumps({name: compared(name) for name in FAMILIES}))
