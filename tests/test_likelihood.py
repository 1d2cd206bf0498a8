"""Loss on answer tokens against materialised logits."""

import math

import pytest
import torch
from conftest import recipe

from fallback.choose import choose
from recipes.stages.base_model import model_type, settle
from recipes.stages.likelihood import answer_loss
from recipes.stages.loading import load_for_training
from recipes.stages.prepare import sample_examples


@pytest.mark.parametrize("name", ["gemma2_2b_ohlora", "polyglot_1_3b_ohlora", "gemma3_1b_counsel"])
def test_answer_loss(name: str) -> None:
    chosen = settle(recipe(name), "tiny")
    choice = choose(model_type(recipe(name), chosen), "peft", "none", dtype="float32")
    model = load_for_training(recipe(name), chosen, recipe(name).settings, choice)
    model.network.eval()
    items = sample_examples(recipe(name))[:7]
    total, count = 0.0, 0
    for item in items:
        rendered = model.renderer.example(item, 512)
        assert rendered is not None
        with torch.no_grad():
            ids = torch.tensor([rendered.input_ids], device=model.network.device)
            logits = model.network(input_ids=ids).logits[0].double().log_softmax(-1)
        for place, label in enumerate(rendered.labels[1:]):
            if label != -100:
                total -= logits[place, label].item()
                count += 1
    for batch_tokens in (8192, 1):
        found = answer_loss(model, items, 512, batch_tokens)
        assert found["answer_tokens"] == count
        assert found["loss"] == pytest.approx(total / count, rel=1e-4)
        assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-3)
