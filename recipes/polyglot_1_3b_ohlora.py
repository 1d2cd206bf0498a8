"""Oh-LoRA, a persona to chat with. Polyglot-Ko 1.3B (GPT-NeoX), LoRA in bf16, answers end with a stop phrase.

    python -m recipes.polyglot_1_3b_ohlora                            everything, on the recipe's own sample
    python -m recipes.polyglot_1_3b_ohlora train --source persona.csv
    python -m recipes.polyglot_1_3b_ohlora chat

The file: CSV with the columns data_type (train or valid), input_data, output_data, output_message and memory.
Base model: EleutherAI/polyglot-ko-1.3b, Apache-2.0. Its rival on the same data: recipes.gemma2_2b_ohlora.
"""

from recipes.stages import persona
from recipes.stages.answers import score_answers
from recipes.stages.cli import main
from recipes.stages.memory import Recall
from recipes.stages.recipe import BaseModel, Recipe, Sampling, Settings, Split

PLAIN = (
    "{% for m in messages %}"
    "{% if m.role == 'user' %}### 사용자: {{ m.content }}\n"
    "{% else %}### 오로라: {{ m.content }}{{ eos_token }}{% if not loop.last %}\n{% endif %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}### 오로라: {% endif %}"
)

RECIPE = Recipe(
    name="polyglot_1_3b_ohlora",
    title="Oh-LoRA persona on GPT-NeoX",
    base=BaseModel(
        "EleutherAI/polyglot-ko-1.3b",
        "polyglot-ko-1.3b",
        licence="apache-2.0",
        terms="https://www.apache.org/licenses/LICENSE-2.0",
    ),
    plain_template=PLAIN,
    settings=Settings(
        epochs=60,
        learning_rate=2e-4,
        batch_size=4,
        accumulation=1,
        max_length=1024,
        optimizer="adamw_torch",
        quantization="none",
        lora_rank=64,
        lora_alpha=16,
        lora_dropout=0.05,
        lora_init="gaussian",
        lora_targets=("query_key_value",),
    ),
    miniature={"learning_rate": 1e-2, "batch_size": 8, "checkpointing": False},
    split=Split(validation=0.5, test=0.5, assigned="data_type"),
    sample="ohlora.csv",
    read=persona.read,
    to_example=persona.to_example,
    ask=persona.ask,
    recall=Recall(),
    text_column="input_data",
    score=score_answers,
    stop_phrase=persona.STOP,
    sampling=Sampling(temperature=0.6, max_new_tokens=80),
)

if __name__ == "__main__":
    main(RECIPE)
