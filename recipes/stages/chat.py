"""A conversation, streamed. The same renderer as training; what is typed stays text."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from recipes.stages.base_model import Chosen
from recipes.stages.console import say, typed, write
from recipes.stages.loading import Model
from recipes.stages.memory import asker
from recipes.stages.recipe import Message, Recipe, Sampling
from recipes.stages.run import Run, write_json

HELP = "/reset forgets the conversation, /save FILE writes it as JSON, /exit or Ctrl-D ends, Ctrl-C stops an answer"


def chat(recipe: Recipe, run: Run, model: Model, sampling: Sampling, max_length: int, recall: Any = None) -> None:
    from recipes.stages.generation import stream

    ask = asker(recipe, recall)
    say(HELP)
    history: list[Message] = []
    keyboard = typed()
    while True:
        write("> ")
        try:
            line = keyboard.readline()
        except KeyboardInterrupt:
            say("\n/exit or Ctrl-D ends")
            continue
        command, _, argument = line.strip().partition(" ")
        if not line or command == "/exit":
            say()
            return
        if not command:
            continue
        if command == "/reset":
            history = []
            say("forgotten")
            continue
        if command == "/save":
            save(argument.strip(), recipe, run, sampling, history)
            continue
        if command.startswith("/"):
            say(f"no command {command}; {HELP}")
            continue
        turn = ask(line.strip())
        # A system text stands once, at the head of the conversation.
        history += turn if not history else [message for message in turn if message.role != "system"]
        shown: list[str] = []

        def emit(piece: str, shown: list[str] = shown) -> None:
            shown.append(piece)
            write(piece)

        try:
            answer = stream(model, history, sampling, emit, recipe.stop, max_length).text
        except KeyboardInterrupt:
            answer = "".join(shown).strip()
            write(" …")
        say()
        if recipe.notice:
            say(recipe.notice)
        history.append(Message("assistant", answer))


def save(name: str, recipe: Recipe, run: Run, sampling: Sampling, history: list[Message]) -> None:
    if not name:
        say("/save wants a file name, as in /save talk.json")
        return
    transcript: dict[str, Any] = {
        "recipe": recipe.name,
        "run": str(run.path),
        "model": Chosen.opened(run.config).description,
        "sampling": asdict(sampling),
        "messages": [asdict(message) for message in history],
    }
    try:
        write_json(Path(name), transcript)
    except OSError as error:
        say(f"{name}: {error.strerror}; nothing was saved")
    else:
        say(f"saved {len(history)} messages to {name}")
