"""Classify bank payments: a payment comment in, one of 86 operation codes out. Gemma 3 12B, QLoRA.

    python -m recipes.gemma3_12b_opercode                         everything, on the recipe's own sample
    python -m recipes.gemma3_12b_opercode train --source pay.csv  on your file
    python -m recipes.gemma3_12b_opercode predict "Оплата по договору 17 за зерно, НДС 10%"

The file: CSV with the columns PaymentComment and OperCode, separated by commas, semicolons or tabs.
Base model: google/gemma-3-12b-it, under Gemma's terms of use (https://ai.google.dev/gemma/terms).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.samples import payments
from recipes.stages.cli import main
from recipes.stages.read import fold, read_csv
from recipes.stages.recipe import (
    BaseModel,
    Example,
    Message,
    Prediction,
    Reading,
    Recipe,
    Row,
    Sampling,
    Settings,
    Split,
    UserError,
)

# Everything that is the same for every payment comes before the payment.
INSTRUCTION = "Answer with the operation code of this bank payment.\n\nPayment: "


@dataclass(frozen=True)
class Columns:
    """What the reader can be told about a bank's export."""

    text_column: str = "PaymentComment"
    """Column with the payment's comment."""
    label_column: str = "OperCode"
    """Column with the operation code; codes are text, leading zeros stay."""
    min_samples_per_class: int = 10
    """Classes with fewer rows are dropped: nothing can be learned or measured on them."""


def read(source: Path, columns: Columns, reading: Reading) -> Iterator[Row]:
    kept: list[tuple[int, Row]] = []
    for line, cells in read_csv(source, (columns.text_column, columns.label_column), reading, older=("cp1251",)):
        text, label = fold(cells[columns.text_column]), cells[columns.label_column].strip()
        if not text or not label:
            reading.drop("empty text" if not text else "empty code", line)
        else:
            kept.append((line, {"text": text, "label": label}))
    sizes = Counter(row["label"] for _, row in kept)
    rare = {code: n for code, n in sizes.items() if n < columns.min_samples_per_class}
    if len(sizes) - len(rare) < 2:
        raise UserError(
            f"{source}: {len(sizes) - len(rare)} codes have {columns.min_samples_per_class} rows or more, and two are "
            "needed to tell apart; add rows or lower --min-samples-per-class"
        )
    reading.notes["dropped_classes"] = dict(sorted(rare.items(), key=lambda item: (-item[1], item[0])))
    for line, row in kept:
        if row["label"] in rare:
            reading.drop(f"code with fewer than {columns.min_samples_per_class} rows", line)
        else:
            yield row


def ask(text: str) -> tuple[Message, ...]:
    return (Message("user", INSTRUCTION + fold(text)),)


def to_example(row: Row) -> Example:
    return Example((*ask(row["text"]), Message("assistant", row["label"])), label=row["label"])


def score(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Per code, never per token: a rare code counts as much as a common one in the macro average."""
    from sklearn.metrics import f1_score

    true = [p.example.answer for p in predictions]
    predicted = [p.answer for p in predictions]
    codes = sorted(set(true))
    return {
        "accuracy": sum(t == p for t, p in zip(true, predicted, strict=True)) / len(true),
        "f1_macro": float(f1_score(true, predicted, labels=codes, average="macro", zero_division=0)),
        "f1_micro": float(f1_score(true, predicted, labels=codes, average="micro", zero_division=0)),
    }


RECIPE = Recipe(
    name="gemma3_12b_opercode",
    title="bank payments -> operation codes",
    base=BaseModel("google/gemma-3-12b-it", "gemma-3-12b-it", chat_template="gemma3"),
    settings=Settings(
        epochs=3,
        learning_rate=2e-4,
        batch_size=2,
        accumulation=8,
        max_length=512,
        warmup_ratio=0.03,
        weight_decay=0.001,
        optimizer="paged_adamw_8bit",
        checkpointing=True,
        quantization="4bit",
        lora_rank=16,
        lora_alpha=32,
        lora_dropout=0.05,
    ),
    miniature={
        "epochs": 5,
        "learning_rate": 2.5e-3,
        "scheduler": "linear",
        "lora_alpha": 64,
        "batch_size": 16,
        "accumulation": 1,
        "lora_dropout": 0.0,
        "checkpointing": False,
        "log_every": 50,
    },
    split=Split(validation=0.15, test=0.15, by="label"),
    sample=lambda path: payments.write_csv(path, rows=2600, classes=12),
    read=read,
    options=Columns(),
    to_example=to_example,
    ask=ask,
    score=score,
    sampling=Sampling(max_new_tokens=10, batch_size=64),
)

if __name__ == "__main__":
    main(RECIPE)
