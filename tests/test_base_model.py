"""Architectures without a download: exact at full size, of the same family when shrunk."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from conftest import RECIPES, recipe

from recipes.stages.base_model import architecture, auto_size, settle, shrink
from recipes.stages.prepare import sample_texts
from recipes.stages.recipe import UserError
from recipes.stages.tokenizers import FAMILIES, make_tokenizer

# Published or computed counts: parameters of the base model, trainable parameters with the recipe's LoRA.
COUNTS = {
    "gemma3_12b_opercode": (11_766_034_176, 65_470_464),
    "gemma3_1b_counsel": (999_885_952, 26_091_520),
    "llama_1b_civil": (1_235_814_400, 22_544_384),
    "polyglot_1_3b_ohlora": (1_331_810_304, 12_582_912),
    "gemma2_2b_ohlora": (2_614_341_888, 83_066_880),
}


@pytest.mark.parametrize("name", RECIPES)
def test_full_size_counts(name: str) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = recipe(name).settings
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**architecture(recipe(name))))
        total = model.num_parameters()
        lora = LoraConfig(r=settings.lora_rank, target_modules=list(settings.lora_targets))
        trainable, _ = get_peft_model(model, lora).get_nb_trainable_parameters()
    assert (total, trainable) == COUNTS[name]


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("size", ["tiny", "small"])
def test_a_shrunken_model_is_of_the_same_family(name: str, size: Any) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    full = architecture(recipe(name))
    small = shrink(full, size, 8192)
    assert small["model_type"] == full["model_type"]
    if "layer_types" in full:
        assert set(small["layer_types"]) == set(full["layer_types"])
        assert len(small["layer_types"]) == small["num_hidden_layers"]
        if size == "small":
            assert small["layer_types"] == full["layer_types"][: small["num_hidden_layers"]]
    if "num_key_value_heads" in full:
        ratio = full["num_attention_heads"] // full["num_key_value_heads"]
        assert small["num_attention_heads"] // small["num_key_value_heads"] == ratio
    for key in ("use_parallel_residual", "rope_parameters", "final_logit_softcapping", "attn_logit_softcapping"):
        assert small.get(key) == full.get(key)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**small))
    if size == "small":
        assert 24e6 < model.num_parameters() < 37e6
    else:
        assert model.num_parameters() < 8e6


@pytest.mark.parametrize("name", RECIPES)
def test_full_size_tokenizer_has_control_tokens_at_their_true_ids(name: str) -> None:
    config = architecture(recipe(name))
    texts = sample_texts(recipe(name))[:50]
    tokenizer = make_tokenizer(config["model_type"], texts, 8192, config["vocab_size"], recipe(name).base.chat_template)
    assert len(tokenizer) == config["vocab_size"]
    if config["bos_token_id"] != 0:  # Polyglot's configuration names a token that its tokenizer never writes.
        assert tokenizer.bos_token_id == config["bos_token_id"]
    ends = tokenizer.convert_tokens_to_ids(list(FAMILIES[config["model_type"]].ends))
    true = config["eos_token_id"] if isinstance(config["eos_token_id"], list) else [config["eos_token_id"]]
    assert set(true) <= set(ends)


@pytest.mark.parametrize("name", RECIPES)
def test_tokenizer_spells_everything_back(name: str, tokenizers: Callable[[str], Any]) -> None:
    tokenizer = tokenizers(name)
    for text in [*sample_texts(recipe(name))[:50], "Оплата №17 — 한국어 ❄ 12,5 %\n\tx"]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text


def test_the_same_model_is_found_again_and_a_changed_one_is_not() -> None:
    one, two = settle(recipe("llama_1b_civil"), "tiny"), settle(recipe("llama_1b_civil"), "tiny")
    assert one == two
    assert settle(recipe("llama_1b_civil"), "small").source != one.source


def test_nobody_may_mistake_a_random_model_for_the_real_one() -> None:
    tiny = settle(recipe("gemma3_1b_counsel"), "tiny")
    assert tiny.description.startswith("NOT google/gemma-3-1b-it")
    real = settle(recipe("gemma3_1b_counsel"), "full", "pretrained")
    assert "NOT" not in real.description
    assert real.source == "google/gemma-3-1b-it"


def test_contradictory_wishes_are_refused() -> None:
    with pytest.raises(UserError, match="no published weights at size tiny"):
        settle(recipe("llama_1b_civil"), "tiny", "pretrained")
    with pytest.raises(UserError, match="own size"):
        settle(recipe("llama_1b_civil"), "tiny", model="someone/model")


def test_auto_is_tiny_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.stages.base_model.usable_gpu", lambda: None)
    assert auto_size("google/gemma-3-12b-it", None) == "tiny"


def test_auto_is_full_with_a_gpu_and_weights_at_hand(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    from fallback.gpu import Gpu

    monkeypatch.setattr("recipes.stages.base_model.usable_gpu", lambda: Gpu("RTX 3060", (8, 6), 12 * 2**30))
    assert auto_size("nobody/has-this-model", None) == "tiny"
    (tmp_path / "config.json").write_text(json.dumps({}))
    assert auto_size(str(tmp_path), None) == "full"


def test_a_card_that_torch_cannot_use_counts_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the torch that is installed: none that these recipes run with has kernels for this card."""
    from fallback.cards import card

    monkeypatch.setattr("fallback.torch_build.read_gpu", lambda: card("Tesla K40:3.5:12"))
    assert settle(recipe("llama_1b_civil"), "auto", "random").size == "tiny"
