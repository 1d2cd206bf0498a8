"""Classify bank payments: a payment comment in, one of 86 operation codes out. Gemma 3 12B, QLoRA.

    python -m recipes.gemma3_12b_opercode                         everything, on the recipe's own sample
    python -m recipes.gemma3_12b_opercode train --source pay.csv  on your file
    python -m recipes.gemma3_12b_opercode predict "Оплата по договору 17 за зерно, НДС 10%"

The file: CSV with the columns PaymentComment and OperCode, separated by commas, semicolons or tabs.
Base model: google/gemma-3-12b-it, under Gemma's terms of use (https://ai.google.dev/gemma/terms).
"""

from functools import partial
from pathlib import Path

from recipes.samples import payments
from recipes.stages.classifier import Classifier
from recipes.stages.cli import main
from recipes.stages.read import Columns, fold, read_labelled
from recipes.stages.recipe import Balance, BaseModel, Example, Message, Recipe, Row, Sampling, Settings, Split

# Everything that is the same for every payment comes before the payment.
INSTRUCTION = "Answer with the operation code of this bank payment.\n\nPayment: "


def ask(text: str) -> tuple[Message, ...]:
    return (Message("user", INSTRUCTION + fold(text)),)


def to_example(row: Row) -> Example:
    return Example((*ask(row["text"]), Message("assistant", row["label"])), row["label"], row["text"])


def sample(path: Path, rows: int = 2600, classes: int = 12, seed: int = 0) -> None:
    payments.write_csv(path, rows, classes, seed)


RECIPE = Recipe(
    name="gemma3_12b_opercode",
    title="bank payments -> operation codes",
    base=BaseModel(
        "google/gemma-3-12b-it", "gemma-3-12b-it", "gemma3", licence="gemma", terms="https://ai.google.dev/gemma/terms"
    ),
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
    presets={
        "12gb": {"batch_size": 1, "accumulation": 16, "max_length": 384},
        "16gb": {"batch_size": 2, "accumulation": 8, "max_length": 512},
        "24gb": {"batch_size": 4, "accumulation": 4, "max_length": 512, "lora_rank": 32, "lora_alpha": 64},
    },
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
    sample=sample,
    read=read_labelled,
    options=Columns("PaymentComment", "OperCode"),
    to_example=to_example,
    ask=ask,
    text_column="PaymentComment",
    balance=Balance(sampler="sqrt"),
    sampling=Sampling(max_new_tokens=10, batch_size=64),
)

OperCodeClassifier = partial(Classifier, RECIPE)
"""OperCodeClassifier("runs/…").predict("Оплата по договору 17")"""

if __name__ == "__main__":
    main(RECIPE)
