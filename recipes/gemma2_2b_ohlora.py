"""Oh-LoRA, a persona to chat with, on Gemma 2 2B: the rival of recipes.polyglot_1_3b_ohlora on the same data.

    python -m recipes.gemma2_2b_ohlora                            everything, on the recipe's own sample
    python -m recipes.gemma2_2b_ohlora train --source persona.csv
    python -m recipes.gemma2_2b_ohlora chat

The file: CSV with the columns data_type (train or valid), input_data, output_data, output_message and memory.
Base model: google/gemma-2-2b-it, under Gemma's terms of use (https://ai.google.dev/gemma/terms).
"""

from recipes.stages import persona
from recipes.stages.answers import score_answers
from recipes.stages.cli import main
from recipes.stages.memory import Recall
from recipes.stages.recipe import BaseModel, Recipe, Sampling, Settings, Split

RECIPE = Recipe(
    name="gemma2_2b_ohlora",
    title="Oh-LoRA persona on Gemma 2",
    base=BaseModel(
        "google/gemma-2-2b-it", "gemma-2-2b-it", "gemma", licence="gemma", terms="https://ai.google.dev/gemma/terms"
    ),
    settings=Settings(
        epochs=3,
        learning_rate=2e-4,
        batch_size=4,
        accumulation=1,
        max_length=1024,
        optimizer="adamw_torch",
        quantization="none",
        lora_rank=64,
        lora_alpha=16,
        lora_dropout=0.05,
    ),
    miniature={"learning_rate": 3e-3, "batch_size": 8, "epochs": 30, "checkpointing": False},
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
