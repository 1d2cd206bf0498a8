"""A conversation, streamed. The same renderer as training; what is typed stays text."""

import sys

from recipes.stages.console import say, write
from recipes.stages.recipe import Message, Recipe, Sampling
from recipes.stages.train import Model


def chat(recipe: Recipe, model: Model, sampling: Sampling, max_length: int) -> list[Message]:
    from recipes.stages.generation import stream

    say("/reset forgets the conversation, /exit or Ctrl-D ends, Ctrl-C stops an answer")
    history: list[Message] = []
    while True:
        write("> ")
        line = sys.stdin.readline()
        if not line or line.strip() == "/exit":
            say()
            return history
        if not line.strip():
            continue
        if line.strip() == "/reset":
            history = []
            say("forgotten")
            continue
        turn = recipe.ask(line.strip())
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
