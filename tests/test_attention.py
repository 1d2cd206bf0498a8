"""Attention that is computed otherwise on CPUs: against transformers' own, in more digits."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AttentionInterface
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.llama import modeling_llama

from fallback import attention
from fallback.patched import ATTEND, patched

ROWS, HEADS, LENGTH, WIDTH, CAP, SCALING = 3, 8, 21, 16, 5.0, 0.25
USUAL = modeling_gemma2.eager_attention_forward


def inputs(groups: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    # As a model lays them out: heads beside each other for each token.
    shapes = [(ROWS, LENGTH, heads, WIDTH) for heads in (HEADS, groups, groups)]
    made = [2 * torch.randn(shape, generator=generator).to(torch.bfloat16) for shape in shapes]
    return [x.to(dtype).transpose(1, 2).requires_grad_() for x in made]


def masked(kind: str, dtype: torch.dtype) -> torch.Tensor | None:
    if kind == "none":
        return None
    back = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    seen = (back >= 0) & ((back < 7) | (kind == "causal"))
    rows = seen[None, None].repeat(ROWS if kind == "of each row" else 1, 1, 1, 1)
    if kind == "of each row":
        # Padding on the left: whole lines of the mask let nothing be seen.
        rows[1, :, :, :4] = False
    # Softmax is taken in float32 at least and at most.
    least = torch.finfo(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32).min
    return torch.zeros(rows.shape, dtype=dtype).masked_fill_(~rows, least)


def computed(
    attend: Any, groups: int, mask: str, dtype: torch.dtype, training: bool = True, **how: Any
) -> list[torch.Tensor]:
    """What comes out, and the gradients."""
    given = inputs(groups, dtype)
    module = SimpleNamespace(num_key_value_groups=HEADS // groups, training=training, is_causal=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        made = attend(module, *given, masked(mask, dtype), scaling=SCALING, **how)[0]
    assert made.dtype == dtype
    assert made.is_contiguous()
    slopes = torch.linspace(-1, 2, made.numel()).view(made.shape).to(dtype)
    return [made, *torch.autograd.grad(made, given, slopes)]


def ours(*args: Any, **how: Any) -> Any:
    return attention.capped(USUAL, *args, **how)


def off(some: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    return [((a - b).square().mean() / b.square().mean()).sqrt().item() for a, b in zip(some, exact, strict=True)]


@pytest.mark.parametrize("mask", ["none", "causal", "sliding", "of each row"])
@pytest.mark.parametrize("groups", [8, 4, 1])
def test_capped_attention_is_that_of_gemma_2(groups: int, mask: str) -> None:
    exact = computed(USUAL, groups, mask, torch.float64, softcap=CAP)
    assert max(off(computed(ours, groups, mask, torch.float32, softcap=CAP), exact)) < 2e-6
    narrow = computed(ours, groups, mask, torch.bfloat16, softcap=CAP)
    theirs = computed(USUAL, groups, mask, torch.bfloat16, softcap=CAP)
    assert max(off(narrow, exact)) < 0.01
    assert max(off(narrow, exact)) < max(off(theirs, exact))


def test_without_a_cap_or_with_dropout_the_usual_one_is_asked() -> None:
    asked: list[dict[str, Any]] = []

    def usual(*_: Any, **how: Any) -> Any:
        asked.append(how)

    for how in ({"dropout": 0.1, "softcap": CAP}, {"softcap": None}):
        attention.capped(usual, None, *inputs(8, torch.float32), None, scaling=SCALING, sliding_window=3, **how)
        assert asked[-1]["sliding_window"] == 3
        assert how.items() <= asked[-1].items()


@pytest.mark.parametrize("mask", ["none", "causal"])
@pytest.mark.parametrize("groups", [8, 2])
def test_fused_attention_in_float32_is_the_more_exact(groups: int, mask: str) -> None:
    usual = AttentionInterface._global_mapping["sdpa"]

    def wide(*args: Any, **how: Any) -> Any:
        return attention.in_float32(usual, *args, **how)

    exact = computed(usual, groups, mask, torch.float64)
    narrow, theirs = computed(wide, groups, mask, torch.bfloat16), computed(usual, groups, mask, torch.bfloat16)
    assert max(off(narrow, exact)) < 0.005
    assert max(off(narrow, exact)) < max(off(theirs, exact))
    answered = computed(wide, groups, mask, torch.bfloat16, training=False)
    assert all(a.equal(b) for a, b in zip(answered, theirs, strict=True))


def network(kind: str, dtype: torch.dtype, how: str = "sdpa") -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = dict(hidden_size=32, intermediate_size=16, num_hidden_layers=2, vocab_size=8, num_attention_heads=4)
    heads = {} if kind == "gpt_neox" else dict(num_key_value_heads=2, head_dim=8)
    shape = AutoConfig.for_model(kind, **sizes, **heads)
    return AutoModelForCausalLM.from_config(shape, dtype=dtype, attn_implementation=how).train()


@pytest.mark.parametrize(
    ("kind", "how", "dtype", "taught"),
    [
        ("gemma2", "eager", torch.float32, "Gemma2Attention: fallback.attention.capped"),
        ("gemma2", "eager", torch.bfloat16, "Gemma2Attention: fallback.attention.capped"),
        ("llama", "sdpa", torch.bfloat16, "LlamaAttention: fallback.attention.in_float32"),
        ("gemma3_text", "sdpa", torch.bfloat16, "Gemma3Attention: fallback.attention.in_float32"),
        ("gpt_neox", "sdpa", torch.bfloat16, "GPTNeoXAttention: fallback.attention.in_float32"),
        ("llama", "eager", torch.bfloat16, None),
        ("llama", "sdpa", torch.float32, None),
        ("llama", "sdpa", torch.float64, None),
    ],
)
def test_only_who_was_taught_attends_otherwise(
    kind: str, how: str, dtype: torch.dtype, taught: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, other = network(kind, dtype, how), network(kind, dtype, how)
    other.load_state_dict(made.state_dict())
    attention.teach(made)
    attention.teach(made)
    assert {name: n for name, n in patched(made).items() if "attention" in name} == ({taught: 2} if taught else {})
    assert not patched(other)
    calls: list[Any] = []
    for name in ("capped", "in_float32"):
        own = getattr(attention, name)
        for module in made.modules():
            if vars(module).get(ATTEND) is own:
                noted = lambda *args, own=own, **how: calls.append(args[1]) or own(*args, **how)  # noqa: E731
                monkeypatch.setattr(module, ATTEND, noted)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        answered = made(ids).logits
        assert len(calls) == (2 if taught else 0)
        usual = other(ids).logits
    assert len(calls) == (2 if taught else 0)
    torch.testing.assert_close(answered, usual, rtol=0.02, atol=0.02 if dtype == torch.bfloat16 else 1e-5)


def test_what_stands_in_the_way_is_put_there_once() -> None:
    made = network("gemma2", torch.bfloat16, "eager")
    attention.teach(made)
    before = modeling_gemma2.eager_attention_forward, modeling_llama.eager_attention_forward
    attention.teach(made)
    assert before == (modeling_gemma2.eager_attention_forward, modeling_llama.eager_attention_forward)
    assert not hasattr(before[1], "asks_module")
