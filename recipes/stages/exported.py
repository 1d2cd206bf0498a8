"""A model that `export merged` wrote: whole in itself, it answers without its run and without its base model."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fallback.choose import Backend, Choice, choose
from recipes.stages.base_model import Chosen, load_tokenizer, published_config
from recipes.stages.recipe import Recipe, UserError
from recipes.stages.run import read_json


@dataclass(frozen=True)
class Exported:
    """A folder with weights, tokenizer, export.json, and classes.json where the set of answers is closed."""

    path: Path
    about: dict[str, Any]
    """export.json."""

    @classmethod
    def at(cls, path: Path | None) -> "Exported | None":
        """The model that lies there, if an export wrote one."""
        record = path / "export.json" if path else None
        if path is None or record is None or not record.is_file():
            return None
        about = read_json(record)
        if not isinstance(about, dict) or not isinstance(about.get("max_length"), int):
            raise UserError(f"{record}: not what an export writes; export the run again")
        return cls(path, about)

    @property
    def max_length(self) -> int:
        return self.about["max_length"]

    def load(self, recipe: Recipe, wanted: Backend = "auto") -> Any:
        """As a loading.Model. The weights lie here at 16 bits or more, and are not quantised again."""
        if self.about.get("recipe") != recipe.name:
            raise UserError(f"{self.path} was exported by {self.about.get('recipe')!r} and not by {recipe.name}")
        config = published_config(Chosen(str(self.path), "full", "pretrained", str(self.path)))
        # On a CPU as the run answers, whose confidence goes along.
        narrow = self.about.get("trained_in") == "bfloat16"
        choice = choose(str(read_json(config).get("model_type")), wanted, "none", large=narrow)
        print(f"{self.path}: {self.about.get('notice')}", file=sys.stderr)
        return load_whole(recipe, self.path, choice, self.max_length)


def load_whole(recipe: Recipe, folder: Path, choice: Choice, max_length: int) -> Any:
    """A model without an adapter, and how to talk to it."""
    backend = choice.module()
    backend.import_libraries(choice)
    from recipes.stages.loading import Model
    from recipes.stages.render import Renderer

    tokenizer = load_tokenizer(recipe, str(folder))
    try:
        network = backend.load(str(folder), choice, max_length)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: cannot be loaded ({' '.join(str(error).split())[:300]})") from error
    # The template that is handed on puts the stop phrase behind earlier answers by itself.
    tokenizer.chat_template = without_phrase(tokenizer.chat_template, recipe.stop_phrase)
    return Model(backend.for_inference(network), tokenizer, Renderer(tokenizer, recipe.stop_phrase), choice)


def _phrase_adder(phrase: str) -> str:
    return (
        "{%- set said = namespace(list=[]) -%}{%- for m in messages -%}"
        "{%- if m['role'] == 'assistant' -%}"
        f"{{%- set said.list = said.list + [{{'role': 'assistant', 'content': m['content'] + ' {phrase}'}}] -%}}"
        "{%- else -%}{%- set said.list = said.list + [m] -%}{%- endif -%}"
        "{%- endfor -%}{%- set messages = said.list -%}"
    )


def with_phrase(template: str, phrase: str | None) -> str:
    """A chat template that puts the stop phrase behind the answers of a conversation, where training had it and where
    servers have cut it off."""
    return template if phrase is None else _phrase_adder(phrase) + template


def without_phrase(template: str, phrase: str | None) -> str:
    return template if phrase is None else template.removeprefix(_phrase_adder(phrase))
