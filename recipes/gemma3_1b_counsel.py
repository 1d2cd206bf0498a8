"""A Korean career counsellor. Gemma 3 1B, QLoRA on dialogues.

    python -m recipes.gemma3_1b_counsel                               everything, on the recipe's own sample
    python -m recipes.gemma3_1b_counsel train --source dialogues.jsonl
    python -m recipes.gemma3_1b_counsel chat

The file: JSONL, a dialogue a line, {"messages": [{"role": "system", "content": …}, {"role": "user", …},
{"role": "assistant", …}]}, the system turn optional, user and assistant in turn.
Base model: google/gemma-3-1b-it, under Gemma's terms of use (https://ai.google.dev/gemma/terms).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from recipes.stages.answers import score_answers
from recipes.stages.cli import main
from recipes.stages.read import clean, read_jsonl
from recipes.stages.recipe import (
    BaseModel,
    Example,
    Message,
    Reading,
    Recipe,
    Row,
    Sampling,
    Settings,
    Split,
    UserError,
)

SYSTEM = "당신은 경험이 많은 진로 상담사입니다. 공감하며 듣고, 바로 해 볼 수 있는 걸음을 존댓말로 알려 주세요."


@dataclass(frozen=True)
class Dialogues:
    """What the reader can be told."""

    strict: bool = False
    """Stop at the first bad line instead of dropping and counting it."""


def read(source: Path, options: Dialogues, reading: Reading) -> Iterator[Row]:
    for line, value in read_jsonl(source, reading, strict=options.strict):
        messages, fault = checked(value.get("messages"))
        if not fault:
            yield {"messages": messages}
        elif options.strict:
            raise UserError(f"{source}: line {line}: {fault}; mend it, or leave --strict away to drop such lines")
        else:
            reading.drop(fault, line)


def checked(messages: object) -> tuple[list[dict[str, str]], str | None]:
    """The turns, cleaned, or what is wrong with them."""
    if not isinstance(messages, list) or not messages:
        return [], "no list under messages"
    turns: list[dict[str, str]] = []
    for turn in messages:
        if not isinstance(turn, dict) or not isinstance(turn.get("content"), str):
            return [], "a turn without text"
        text = clean(turn["content"])
        if not text:
            return [], "empty text"
        turns.append({"role": turn.get("role", ""), "content": text})
    roles = [turn["role"] for turn in turns]
    unknown = [role for role in roles if role not in ("system", "user", "assistant")]
    if unknown:
        return [], f"unknown role {unknown[0][:20]!r}" if isinstance(unknown[0], str) else "a role that is no text"
    spoken = roles[1:] if roles[0] == "system" else roles
    if not spoken or len(spoken) % 2 or spoken != ["user", "assistant"] * (len(spoken) // 2):
        return [], "roles are not (system,) user, assistant, user, assistant …"
    return turns, None


def to_example(row: Row) -> Example:
    return Example(tuple(Message(turn["role"], turn["content"]) for turn in row["messages"]))


def ask(text: str) -> tuple[Message, ...]:
    return (Message("system", SYSTEM), Message("user", text))


RECIPE = Recipe(
    name="gemma3_1b_counsel",
    title="Korean career counsellor",
    base=BaseModel(
        "google/gemma-3-1b-it", "gemma-3-1b-it", "gemma3", licence="gemma", terms="https://ai.google.dev/gemma/terms"
    ),
    settings=Settings(
        epochs=10,
        learning_rate=2e-4,
        batch_size=2,
        accumulation=4,
        max_length=2048,
        optimizer="paged_adamw_32bit",
        quantization="4bit",
        lora_rank=32,
        lora_alpha=32,
        lora_dropout=0.05,
        early_stopping="patience=10,min_delta=0.001,watch=train",
    ),
    miniature={"learning_rate": 3e-3, "batch_size": 8, "accumulation": 1, "epochs": 20, "checkpointing": False},
    split=Split(validation=0.1, test=0.1),
    sample="counsel.jsonl",
    read=read,
    options=Dialogues(),
    to_example=to_example,
    ask=ask,
    score=score_answers,
    sampling=Sampling(temperature=0.7, top_p=0.9, max_new_tokens=256),
)

if __name__ == "__main__":
    main(RECIPE)
