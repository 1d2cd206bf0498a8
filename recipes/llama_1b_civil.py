"""Korean civil-law questions and answers. Llama 3.2 1B, QLoRA; not legal advice.

    python -m recipes.llama_1b_civil                              everything, on the recipe's own sample
    python -m recipes.llama_1b_civil train --source qa.csv --preset quality
    python -m recipes.llama_1b_civil train --size full --model meta-llama/Llama-3.2-1B-Instruct

The file: CSV with the columns question, answer, category and difficulty.
The base model gets a plain question and answer; an instruction model, whose tokenizer brings a chat template,
gets a conversation with a system text by category.
Base model: meta-llama/Llama-3.2-1B, under the Llama 3.2 Community License (https://www.llama.com/llama3_2/license).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from recipes.stages.answers import score_answers
from recipes.stages.cli import main
from recipes.stages.read import fold, read_csv
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

COLUMNS = ("question", "answer", "category", "difficulty")
SYSTEM = {
    "전세사기": "당신은 전세사기 예방과 피해 구제를 설명하는 한국 민법 도우미입니다. 정확하고 알기 쉽게 답하세요.",
    "부동산물권": "당신은 부동산 물권을 설명하는 한국 민법 도우미입니다. 정확하고 알기 쉽게 답하세요.",
}
GENERAL = "당신은 한국 민법을 설명하는 도우미입니다. 정확하고 알기 쉽게 답하세요."
# For the base model, which has no template of its own.
PLAIN = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ m.content }}\n\n"
    "{% elif m.role == 'user' %}### 질문:\n{{ m.content }}\n\n"
    "{% else %}### 답변:\n{{ m.content }}{{ eos_token }}{% if not loop.last %}\n\n{% endif %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}### 답변:\n{% endif %}"
)


# Questions that every model of this recipe should be looked at with.
CASES = {
    "전세사기: 보증금 반환": "전세 계약이 끝났는데 집주인이 보증금을 돌려주지 않습니다. 무엇부터 해야 하나요?",
    "전세사기: 계약서 검토": "전세 계약서에 서명하기 전에 등기부와 계약서에서 무엇을 확인해야 하나요?",
    "전세사기: 예방": "전세사기를 당하지 않으려면 계약 전후에 어떤 조치를 해야 하나요?",
    "부동산물권: 소유권": "매매 대금을 다 냈지만 등기를 하지 않았습니다. 제가 소유자인가요?",
    "부동산물권: 담보물권": "근저당권이 설정된 집을 사면 어떤 위험이 있나요?",
    "부동산물권: 취득시효": "20년 넘게 점유한 이웃 땅을 제 것으로 할 수 있나요?",
    "일반": "구두로 한 약속도 계약으로 효력이 있나요?",
}


@dataclass(frozen=True)
class Questions:
    """What the reader can be told."""

    categories: tuple[str, ...] = ()
    """Only rows of these categories; all if none is named."""
    difficulties: tuple[str, ...] = ()
    """Only rows of these difficulties; all if none is named."""
    min_characters: int = 5
    """Rows whose question or answer is shorter are dropped."""


def read(source: Path, options: Questions, reading: Reading) -> Iterator[Row]:
    seen: set[tuple[str, str]] = set()
    found: dict[str, set[str]] = {"category": set(), "difficulty": set()}
    for line, cells in read_csv(source, COLUMNS, reading, older=("cp949",)):
        row = {column: fold(cells[column]) for column in COLUMNS}
        for column, values in found.items():
            values.add(row[column])
        fault = _fault(row, options, seen)
        if fault:
            reading.drop(fault, line)
        else:
            seen.add((row["question"], row["answer"]))
            yield row
    for column, wanted in (("category", options.categories), ("difficulty", options.difficulties)):
        unknown = sorted(set(wanted) - found[column])
        if unknown:
            raise UserError(
                f"{source}: no row has the {column} {unknown[0]!r}; there are {', '.join(sorted(found[column]))}"
            )


def _fault(row: Row, options: Questions, seen: set[tuple[str, str]]) -> str | None:
    if not row["question"] or not row["answer"]:
        return "empty text"
    if min(len(row["question"]), len(row["answer"])) < options.min_characters:
        return f"shorter than {options.min_characters} characters"
    if (row["question"], row["answer"]) in seen:
        return "duplicate"
    if options.categories and row["category"] not in options.categories:
        return "other category"
    if options.difficulties and row["difficulty"] not in options.difficulties:
        return "other difficulty"
    return None


def to_example(row: Row) -> Example:
    return Example((*ask(row["question"], row["category"]), Message("assistant", row["answer"])))


def ask(question: str, category: str = "") -> tuple[Message, ...]:
    return (Message("system", SYSTEM.get(category, GENERAL)), Message("user", question))


RECIPE = Recipe(
    name="llama_1b_civil",
    title="Korean civil-law questions",
    base=BaseModel(
        "meta-llama/Llama-3.2-1B", "llama-3.2-1b", licence="llama3.2", terms="https://www.llama.com/llama3_2/license"
    ),
    plain_template=PLAIN,
    settings=Settings(
        epochs=4,
        learning_rate=1e-4,
        batch_size=2,
        accumulation=4,
        max_length=2048,
        optimizer="paged_adamw_8bit",
        quantization="4bit",
        lora_rank=32,
        lora_alpha=64,
        lora_dropout=0.1,
        neftune_alpha=5,
    ),
    presets={
        "fast": {"epochs": 2, "learning_rate": 2e-4, "batch_size": 4},
        "balanced": {"epochs": 4, "learning_rate": 1e-4, "batch_size": 2},
        "quality": {"epochs": 6, "learning_rate": 5e-5, "batch_size": 1},
        "memory_efficient": {
            "epochs": 3,
            "learning_rate": 1e-4,
            "batch_size": 1,
            "checkpointing": True,
            "optimizer": "adamw_8bit",
        },
    },
    best_presets=("quality", "balanced", "fast", "memory_efficient"),
    miniature={"learning_rate": 3e-3, "batch_size": 8, "accumulation": 1, "epochs": 20, "checkpointing": False},
    split=Split(validation=0.1, test=0.1, by="category"),
    sample="civil.csv",
    read=read,
    options=Questions(),
    facets=("category", "difficulty"),
    cases=CASES,
    to_example=to_example,
    ask=ask,
    text_column="question",
    score=score_answers,
    sampling=Sampling(temperature=0.3, top_p=0.9, max_new_tokens=256),
    notice="(이 답변은 법률 자문이 아닙니다. 구체적인 사안은 변호사나 대한법률구조공단에 확인하세요.)",
)

if __name__ == "__main__":
    main(RECIPE)
