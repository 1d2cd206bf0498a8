"""A merged model for Ollama: the Modelfile beside the weights.

Ollama writes prompts by a template of its own language (Go's text/template). It is derived here from what our renderer
writes, piece by piece, and tried on conversations before it is believed.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from recipes.stages.export import Source, begins_with_bos
from recipes.stages.recipe import Message, Recipe, UserError
from recipes.stages.render import Renderer
from recipes.stages.run import read_json, write_whole

IMPORTS = frozenset(
    {"LlamaForCausalLM", "GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration",
     "MistralForCausalLM", "MixtralForCausalLM", "Phi3ForCausalLM", "Qwen2ForCausalLM"}
)  # fmt: skip
"""Architectures whose safetensors `ollama create` reads by itself; others it takes as GGUF."""


class Turns(NamedTuple):
    """What stands around the words of a conversation."""

    user: str
    """Before the first question."""
    answer: str
    """Between a question and its answer."""
    again: str
    """Between an answer and the next question."""
    system: str
    """Before a system text."""
    after_system: str
    """Between it and the first question."""


def turns(renderer: Renderer, bos: str) -> Turns:
    """The renderer's text, taken apart. What begins a text (bos) is left away: Ollama puts it there by itself."""
    user, answer = _between(renderer, ("user",))
    again = _between(renderer, ("user", "assistant", "user"))[2]
    # Where the template knows no system text: Ollama lets anybody send one, so it is put before the question.
    system, after_system = user, "\n\n"
    if knows_system(renderer):
        system, after_system, _ = _between(renderer, ("system", "user"))
    found = Turns(user, answer, again, system, after_system)
    for roles in (("user", "assistant") * 3 + ("user",), ("system", *("user", "assistant") * 2, "user")):
        words = [Message(role, f"<{i}>") for i, role in enumerate(roles)]  # type: ignore[arg-type]
        if (roles[0] == "user" or knows_system(renderer)) and spoken(found, words) != renderer.text(words, True):
            raise UserError(
                f"this chat template writes {' '.join(roles)} in a way that a Modelfile cannot say; use vLLM"
            )
    return found._replace(user=user.removeprefix(bos), system=system.removeprefix(bos))


def knows_system(renderer: Renderer) -> bool:
    from jinja2 import TemplateError

    try:
        renderer.text((Message("system", "?"), Message("user", "?")), True)
    except TemplateError:
        return False
    return "system" in renderer.tokenizer.chat_template


def spoken(told: Turns, messages: Sequence[Message]) -> str:
    """What the template below writes for a conversation, a system text at its head at most."""
    text = told.system if messages[0].role == "system" else told.user
    behind = {"system": told.after_system, "user": told.answer, "assistant": told.again}
    return text + "".join(message.content + behind[message.role] for message in messages)


def _between(renderer: Renderer, roles: Sequence[Any]) -> list[str]:
    """The template's text before, between and behind the messages, the stop phrase of earlier answers included."""
    found = [""]
    for piece in renderer.pieces([Message(role, "?") for role in roles], generation_prompt=True):
        if piece.typed:
            found.append("")
        else:
            found[-1] += piece.text
    return found


def template(told: Turns) -> str:
    """The same in Go's language. One line of it, since line ends between its parts would be part of the prompt."""
    return (
        "{{ range $i, $m := .Messages }}"
        '{{ if eq $m.Role "system" }}'
        f"{{{{ if eq $i 0 }}}}{told.system}{{{{ $m.Content }}}}{told.after_system}"
        "{{ else }}{{ $m.Content }}\n\n{{ end }}"
        '{{ else if eq $m.Role "assistant" }}'
        "{{ $m.Content }}"
        f"{{{{ if gt (len (slice $.Messages $i)) 1 }}}}{told.again}{{{{ end }}}}"
        "{{ else }}"
        f"{{{{ if eq $i 0 }}}}{told.user}{{{{ end }}}}{{{{ $m.Content }}}}{told.answer}"
        "{{ end }}{{ end }}"
    )


def modelfile(source: Source, model: Any, origin: str, config: dict[str, Any]) -> str:
    """FROM, TEMPLATE, SYSTEM and PARAMETER, in the order in which Ollama's own are printed."""
    recipe, renderer = source.recipe, model.renderer
    bos = model.tokenizer.bos_token if begins_with_bos(model) else ""
    told = turns(renderer, bos)
    asked = recipe.ask("…")
    system = next((message.content for message in asked if message.role == "system"), None)
    lines = [f"# {recipe.title}, exported by {recipe.name}; base model {source.base_name}"]
    if source.chosen.weights == "random":
        lines.append("# NOT the real model: random weights, only for trying things out")
    if asked[-1].content != "…":
        lines.append("# Ask as it was trained to be asked:")
        lines += [f"#   {line}" for line in asked[-1].content.splitlines()]
    lines += [f"FROM {origin}", f"TEMPLATE {quoted(template(told))}"]
    if system:
        lines.append(f"SYSTEM {quoted(system)}")
    sampling, longest = recipe.sampling, config.get("max_position_embeddings")
    context = source.max_length + sampling.max_new_tokens
    parameters: list[tuple[str, Any]] = [("stop", f'"{stop}"') for stop in stops(recipe, model)]
    parameters += [("temperature", sampling.temperature), ("top_p", sampling.top_p), ("top_k", 0)]
    # Ollama's own default punishes repetition, with which nobody looked at this model.
    parameters += [("repeat_penalty", 1), ("num_predict", sampling.max_new_tokens)]
    parameters.append(("num_ctx", min(context, longest) if longest else context))
    lines += [f"PARAMETER {name} {value}" for name, value in parameters]
    return "\n".join(lines) + "\n"


def stops(recipe: Recipe, model: Any) -> list[str]:
    """Texts behind which an answer is over."""
    renderer = model.renderer
    marker = renderer.tokenizer.convert_ids_to_tokens(renderer.end_marker_id)
    return list(dict.fromkeys([*recipe.stop, marker, model.tokenizer.eos_token]))


def quoted(text: str) -> str:
    if '"""' in text:
        raise UserError('a Modelfile cannot hold a text with """ in it')
    return f'"""{text}"""'


def write(source: Source, folder: Path, model: Any) -> None:
    """Beside the merged weights, before the folder gets its name."""
    config = read_json(folder / "config.json")
    origin = "." if set(config.get("architectures", ())) <= IMPORTS else f"./{gguf_name(source)}"
    write_whole(folder / "Modelfile", modelfile(source, model, origin, config))


def gguf_name(source: Source) -> str:
    return f"{source.recipe.name.replace('_', '-')}.gguf"


def shortcomings(folder: Path) -> list[str]:
    """What Ollama will not read as it was meant."""
    config = read_json(folder / "config.json")
    if config["model_type"].startswith("gemma") and not (folder / "tokenizer.model").is_file():
        return [
            f"{folder / 'tokenizer.model'} is not there: from tokenizer.json alone Ollama cuts Gemma's texts otherwise "
            "than in training; put the base model's tokenizer.model beside it before ollama create"
        ]
    return []


def next_commands(source: Source, folder: Path) -> list[str]:
    """What to type now."""
    name = source.recipe.name.replace("_", "-")
    commands = [f"cd {shlex.quote(str(folder))} && ollama create {name}", f"ollama run {name}"]
    if not (folder / "Modelfile").read_text(encoding="utf-8").count("\nFROM .\n"):
        commands.insert(0, f"python llama.cpp/convert_hf_to_gguf.py {folder} --outfile {folder / gguf_name(source)}")
    return commands
