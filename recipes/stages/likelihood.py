"""How probable the model finds the reference answers: loss and perplexity on answer tokens.

Only the hidden states of answer tokens meet the output head, a few at a time: a vocabulary of 262,144 words times
every token of a long dialogue would not fit beside the model.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from fallback.patched import uncompiled
from fallback.portable_loss import PortableLogProb
from recipes.stages.loading import Model
from recipes.stages.processes import ALONE, Team, sharded
from recipes.stages.recipe import Example
from recipes.stages.render import IGNORED


def answer_loss(
    model: Model, items: Sequence[Example], max_length: int, batch_tokens: int = 8192, team: Team = ALONE
) -> dict[str, Any]:
    """Mean negative log-likelihood per answer token, in nats, and its exponential."""
    from recipes.stages.batches import Batches, supervised

    rendered = [tokens for tokens in model.renderer.examples(items, max_length) if tokens is not None]
    rendered.sort(key=lambda tokens: len(tokens.input_ids), reverse=True)
    collate = Batches(model.tokenizer.pad_token_id, model.network.config.model_type == "gemma3")
    batches, at = [], 0
    while at < len(rendered):
        rows = max(1, batch_tokens // len(rendered[at].input_ids))
        batches.append(rendered[at : at + rows])
        at += rows
    found = []
    for place, some in team.mine(batches):
        batch = collate([{"input_ids": r.input_ids, "labels": r.labels} for r in some])
        batch = {name: tensor.to(model.network.device) for name, tensor in batch.items()}
        found.append((place, (-float(_log_probs(model.network, batch).sum()), int(supervised(batch).sum()))))
    # Summed in one order, however many processes there are.
    total, count = 0.0, 0
    for surprise, supervised_tokens in team.together(found):
        total, count = total + surprise, count + supervised_tokens
    loss = total / max(1, count)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700)), "answer_tokens": count}


def _log_probs(network: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of every supervised token."""
    if sharded():
        # The head's weights come together for the whole model's forward pass alone; the trainer taught it this one.
        with torch.no_grad(), uncompiled(network):
            return network(**batch, use_cache=False, fused_lm_head=True).log_probs
    labels = batch["labels"][:, 1:]
    causal = network.get_base_model()
    head = causal.get_output_embeddings()
    text = causal.config.get_text_config()
    with torch.inference_mode(), uncompiled(network):
        given = {name: tensor for name, tensor in batch.items() if name != "labels"}
        hidden = causal.base_model(**given, use_cache=False).last_hidden_state[:, :-1]
        mask = labels != IGNORED
        softcap = getattr(text, "final_logit_softcapping", None)
        return PortableLogProb.apply(hidden[mask], head.weight, head.bias, labels[mask], 1.0, 0, softcap)[0]
