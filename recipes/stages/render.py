"""Examples -> tokens. The one place where a prompt is put together, for training and for answering alike.

The chat template is run over stand-ins for the messages, so that what the template wrote and what somebody
typed can be told apart in its output. Template text may hold control tokens; typed text is encoded with
control tokens switched off, so `<end_of_turn>` inside a payment stays fifteen characters of a payment.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from recipes.stages.recipe import Example, Message, UserError

IGNORED = -100
SOURCE = Path(__file__).read_bytes()
"""What this process makes tokens by, whatever the file says later."""
# Private-use characters: no template trims, doubles or compares them.
_STAND_IN = re.compile("\ue000(\\d+)\ue001")
# Rows whose texts go through the tokenizer in one call.
_AT_ONCE = 1000
# Templates that print today's date would teach a different prompt every day; this is Llama 3.2's own default.
_FIXED_DATE = "26 Jul 2024"


class Piece(NamedTuple):
    text: str
    typed: bool
    supervised: bool


@dataclass(frozen=True)
class Rendered:
    input_ids: list[int]
    labels: list[int]
    cut_tokens: int = 0
    """Tokens of input text that did not fit into max_length."""

    @property
    def supervised_tokens(self) -> int:
        return sum(label != IGNORED for label in self.labels)


class Renderer:
    def __init__(self, tokenizer: Any, stop_phrase: str | None = None):
        if not tokenizer.is_fast:
            raise UserError("this tokenizer is written in Python; use the model's fast tokenizer (tokenizer.json)")
        self.tokenizer = tokenizer
        self.stop_phrase = stop_phrase
        self.control = sorted(set(tokenizer.all_special_tokens), key=len, reverse=True)
        self._control_pattern = re.compile("|".join(map(re.escape, self.control)))
        # Few shapes of conversation and few template pieces, asked for once per row.
        self._skeleton = cache(self._write_skeleton)
        self._template_ids = cache(lambda text: self._ids(text, typed=False))
        control_ids = set(tokenizer.all_special_ids)
        forged = [token for token in self.control if control_ids.intersection(self._ids(token, typed=True))]
        if forged:
            raise UserError(
                f"this tokenizer reads {forged[0]!r} in user text as a control token even when told not to; "
                "use the model's fast tokenizer (tokenizer.json)"
            )

    def _ids(self, text: Any, typed: bool) -> Any:
        """Of a text, or of each of several."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=typed)["input_ids"]

    def pieces(self, messages: Sequence[Message], generation_prompt: bool = False) -> list[Piece]:
        """The rendered text, cut where somebody's words begin and end and where the loss begins and ends."""
        pieces = []
        for part in self._skeleton(tuple(message.role for message in messages), generation_prompt):
            if isinstance(part, int):
                message = messages[part]
                answer = message.role == "assistant"
                pieces.append(Piece(message.content.strip(), True, answer))
                if answer and self.stop_phrase:
                    pieces.append(Piece(f" {self.stop_phrase}", False, True))
            else:
                pieces.append(part)
        return pieces

    def _write_skeleton(self, roles: tuple[str, ...], generation_prompt: bool) -> list[Piece | int]:
        """What the template writes for such a sequence of roles, with an index in place of each message."""
        text = self.tokenizer.apply_chat_template(
            [{"role": role, "content": f"\ue000{i}\ue001"} for i, role in enumerate(roles)],
            tokenize=False,
            add_generation_prompt=generation_prompt,
            date_string=_FIXED_DATE,
        )
        parts: list[Piece | int] = []
        after_answer = False
        for position, part in enumerate(_STAND_IN.split(text)):
            if position % 2:
                after_answer = roles[int(part)] == "assistant"
                parts.append(int(part))
            else:
                end = self._end_marker(part) if after_answer else 0
                if end:
                    parts.append(Piece(part[:end], False, True))
                if part[end:]:
                    parts.append(Piece(part[end:], False, False))
        return parts

    def _end_marker(self, after_answer: str) -> int:
        """How much of the text after an answer the model must learn to write itself: up to the first control token."""
        control = self._control_pattern.search(after_answer)
        if control is None:
            raise UserError(
                f"the chat template ends an answer with {after_answer!r}, which holds no control token: "
                "the model could never learn to stop; add the end-of-turn or end-of-text token to the template"
            )
        return control.end()

    @property
    def end_marker_id(self) -> int:
        """The last token of what a model writes to end its answer."""
        pieces = self.pieces((Message("user", "?"), Message("assistant", "!")))
        closing = [piece for piece in pieces if piece.supervised and not piece.typed]
        return self._template_ids(closing[-1].text)[-1]

    def text(self, messages: Sequence[Message], generation_prompt: bool = False) -> str:
        return "".join(piece.text for piece in self.pieces(messages, generation_prompt))

    def example(self, example: Example, max_length: int | None = None) -> Rendered | None:
        """Tokens and labels. None where not even a shortened input leaves room for the answer."""
        return next(self.examples([example], max_length))

    def examples(self, many: Sequence[Example], max_length: int | None = None) -> Iterator[Rendered | None]:
        """The same for each of many."""
        for rendered in self._encoded((self.pieces(example.messages) for example in many), max_length):
            yield rendered if rendered is not None and rendered.supervised_tokens else None

    def answer(self, text: str) -> tuple[list[int], list[int]]:
        """An answer's own tokens, and those that end it."""
        pieces = self.pieces((Message("user", "?"), Message("assistant", text)))
        own = [id for piece in pieces if piece.supervised and piece.typed for id in self._ids(piece.text, typed=True)]
        end = [id for p in pieces if p.supervised and not p.typed for id in self._template_ids(p.text)]
        return own, end

    def prompt(self, messages: Sequence[Message], max_length: int | None = None) -> list[int]:
        """What the model is given to answer: the same tokens that preceded the answer in training."""
        return self.prompts([messages], max_length)[0]

    def prompts(self, many: Sequence[Sequence[Message]], max_length: int | None = None) -> list[list[int]]:
        """The same for each of many."""
        found = []
        for rendered in self._encoded((self.pieces(messages, generation_prompt=True) for messages in many), max_length):
            if rendered is None:
                raise UserError(f"the prompt's fixed text alone is longer than {max_length} tokens; raise --max-length")
            found.append(rendered.input_ids)
        return found

    def _encoded(self, many: Iterator[list[Piece]], max_length: int | None) -> Iterator[Rendered | None]:
        """What somebody wrote in a thousand rows goes through the tokenizer in one call, each text once: alone a text
        waits longer for transformers than for the tokenizer."""
        while some := list(islice(many, _AT_ONCE)):
            texts = list({piece.text: None for pieces in some for piece in pieces if piece.typed})
            known = dict(zip(texts, self._ids(texts, typed=True), strict=True)) if texts else {}
            for pieces in some:
                yield self._encode(pieces, known, max_length)

    def _encode(self, pieces: list[Piece], typed: dict[str, list[int]], max_length: int | None) -> Rendered | None:
        encoded = [(piece, typed[piece.text] if piece.typed else self._template_ids(piece.text)) for piece in pieces]
        surplus = sum(len(ids) for _, ids in encoded) - max_length if max_length else 0
        cut = 0
        # An answer that is cut would teach to stop in the middle of a sentence, so the longest question gives way.
        while surplus > 0:
            longest = max(
                (k for k, (piece, _) in enumerate(encoded) if piece.typed and not piece.supervised),
                key=lambda k: len(encoded[k][1]),
                default=None,
            )
            if longest is None or len(encoded[longest][1]) == 0:
                return None
            piece, ids = encoded[longest]
            kept = max(0, len(ids) - surplus)
            encoded[longest] = (piece, ids[:kept])
            cut += len(ids) - kept
            surplus -= len(ids) - kept
        input_ids: list[int] = []
        labels: list[int] = []
        for piece, ids in encoded:
            input_ids += ids
            labels += ids if piece.supervised else [IGNORED] * len(ids)
        return Rendered(input_ids, labels, cut)

    def show(self, example: Example) -> str:
        """The rendered text with the tokens that carry loss between 「 and 」, and the tokens themselves below it."""
        marked = []
        for piece in self.pieces(example.messages):
            marked.append(f"「{piece.text}」" if piece.supervised else piece.text)
        rendered = self.example(example)
        assert rendered is not None
        tokens = [self.tokenizer.decode([token]) for token in rendered.labels if token != IGNORED]
        text = "".join(marked).replace("」「", "")
        return (
            f"{text}\n-- {len(rendered.input_ids)} tokens, {rendered.supervised_tokens} of them carry loss: "
            f"{'|'.join(tokens)}\n"
        )
