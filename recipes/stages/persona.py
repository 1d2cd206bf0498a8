"""The Oh-LoRA data, which two rival base models are trained on."""

from collections.abc import Iterator
from pathlib import Path

from recipes.stages.read import fold, read_csv
from recipes.stages.recipe import Example, Message, NoOptions, Reading, Row

STOP = "(답변 종료)"
"""Every answer is trained to end with this: after fine-tuning Polyglot hardly ever writes its end token."""

COLUMNS = ("data_type", "input_data", "output_data", "output_message", "memory")


def read(source: Path, options: NoOptions, reading: Reading) -> Iterator[Row]:
    for line, cells in read_csv(source, COLUMNS, reading):
        row = {
            "data_type": cells["data_type"].strip(),
            "question": fold(cells["input_data"]),
            "answer": fold((cells["output_message"] or cells["output_data"]).replace(STOP, "")),
            "memory": fold(cells["memory"]),
        }
        if row["data_type"] not in ("train", "valid"):
            reading.drop("data_type is neither train nor valid", line)
        elif not row["question"] or not row["answer"]:
            reading.drop("empty text", line)
        else:
            yield row


def to_example(row: Row) -> Example:
    return Example((*ask(row["question"], row["memory"]), Message("assistant", row["answer"])))


def ask(question: str, memory: str = "") -> tuple[Message, ...]:
    return (Message("user", f"{memory} {question}".strip()),)
