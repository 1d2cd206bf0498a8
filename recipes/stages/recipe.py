"""The nouns. A recipe is a value made of these; a stage is a function from these to these."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Row = dict[str, Any]
"""One record as read and cleaned; what data/*.jsonl holds, a line each."""

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Every linear layer of a Llama or Gemma block."""


class UserError(Exception):
    """Something the user can mend: printed as one line with its remedy, never as a traceback."""


class Interrupted(Exception):
    """Somebody asked us to stop, and nothing is lost; `code` is what the process ends with."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


class StartOver(Exception):
    """The same command has to be given again, in a process of its own, with flags that this one found to be needed."""

    def __init__(self, flags: Mapping[str, str]):
        super().__init__(str(flags))
        self.flags = flags


@dataclass(frozen=True)
class Settings:
    """What recipes vary. One function, train.sft_arguments, turns this into an SFTConfig."""

    epochs: float = 3.0
    """Passes over the training split."""
    max_steps: int | None = None
    """Train for this many optimiser steps, whatever the epochs say."""
    learning_rate: float = 2e-4
    """Peak learning rate."""
    batch_size: int = 2
    """Examples per device and forward pass, where they are as long as --max-length allows."""
    accumulation: int = 1
    """So many times --batch-size examples make an optimiser step; where they are short, in fewer forward passes."""
    batch_tokens: int | None = None
    """Tokens per device and forward pass at most, padding among them; 0 counts examples, however short they are. Not
    given: what --batch-size examples of --max-length come to, which is what plan says room is for."""
    max_length: int = 1024
    """Tokens per example; longer inputs are cut, answers never."""
    warmup_ratio: float = 0.03
    """Share of the steps over which the learning rate rises."""
    weight_decay: float = 0.0
    """Weight decay of the LoRA matrices."""
    scheduler: Literal["linear", "cosine", "constant"] = "cosine"
    """How the learning rate falls after warm-up."""
    optimizer: Literal["paged_adamw_8bit", "paged_adamw_32bit", "adamw_8bit", "adamw_torch"] = "paged_adamw_8bit"
    """Optimiser; on a CPU all of these become adamw_torch."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    checkpointing: bool = True
    """Recompute activations in the backward pass instead of keeping them."""
    quantization: Literal["4bit", "8bit", "none"] = "4bit"
    """How the frozen base weights are held: NF4 with double quantisation, int8, or 16 bits."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """How attention is computed; auto takes torch's fused one where the model allows it."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """What is computed in, answers of the run too; auto takes what the hardware does well and the model stands."""
    lora_rank: int = 16
    """Rank of the LoRA matrices."""
    lora_alpha: int = 32
    """LoRA scale is alpha / rank."""
    lora_dropout: float = 0.05
    """Dropout in front of the LoRA matrices."""
    lora_init: Literal["kaiming", "gaussian"] = "kaiming"
    """Start of the first LoRA matrix; the second starts at zero."""
    lora_targets: tuple[str, ...] = SEVEN
    """Names of the linear layers that get LoRA matrices."""
    neftune_alpha: float = 0.0
    """Noise on the embeddings in training (NEFTune); 0 turns it off."""
    early_stopping: str = "off"
    """off, or patience=10,min_delta=0.001,watch=train (or watch=validation): end after so many checks without so much
    improvement of the loss. Checks are every --log-every steps, or every evaluation."""
    fold: bool = True
    """Put each batch into one row, without padding and with what all its prompts begin with once, where attention can
    be told and enough is saved (with --compile: anything)."""
    compile: bool = False
    """Compile the decoder layers before the first step, for plain PEFT on a CPU: a minute or less, after which steps
    are a little shorter. It says by how much, and whether this training is long enough."""
    seed: int = 42
    """Seeds the split, the LoRA start, the order of batches and dropout."""
    log_every: int = 10
    """Optimiser steps between two printed lines; steps.jsonl has every step."""
    checkpoint_minutes: float = 10.0
    """Minutes between two checkpoints, from which train --resume goes on; 0 writes one after every step."""

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("accumulation", 1), ("batch_tokens", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name.replace('_', '-')} {value}: {least} at least")

    @property
    def tokens_at_once(self) -> int | None:
        """Room of one forward pass; None where examples are counted instead."""
        return self.batch_size * self.max_length if self.batch_tokens is None else self.batch_tokens or None


@dataclass(frozen=True)
class Balance:
    """How rare classes are learned, for recipes whose answer is one of a closed set."""

    class_weights: Literal["none", "balanced", "effective"] = "none"
    """Weight of an example in the loss by how often its class is drawn: balanced is n / (classes x n_class), effective
    levels off for classes that have many rows."""
    weight_cap: float = 10.0
    """No weight is larger than this; the average over the drawn examples is 1."""
    focal_gamma: float = 0.0
    """Focal loss: examples count by (1 - p) to this power, p the probability of the whole answer; 0 turns it off."""
    logit_adjustment: float = 0.0
    """Prior correction: a class must win by as much more as it is rarer, to this power (1 is the usual); 0 is off."""
    sampler: Literal["none", "weighted", "sqrt"] = "none"
    """How often a class is drawn: by its size, all classes alike, or by the square root of its size."""
    oversample_to: int = 0
    """Classes with fewer rows are repeated until they have this many; 0 repeats none."""
    eval_rows: int = 400
    """Rows of the validation split, every class among them, by which the best checkpoint is chosen."""


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn."""

    temperature: float = 0.0
    """0 takes the most probable token every time."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens with this probability."""
    max_new_tokens: int = 128
    """Longest answer, in tokens."""
    batch_size: int = 64
    """Questions answered at once, at most: fewer where their keys and values would take more than 1 GiB."""
    answers: int = 1
    """Answers drawn for each question."""
    max_trials: int = 30
    """Empty answers are drawn again, so often at most; at temperature 0 every draw is the same."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size", "answers"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: one at least")


@dataclass(frozen=True)
class Message:
    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class Example:
    """A row as the model sees it: a conversation whose assistant turns are what is learned."""

    messages: tuple[Message, ...]
    label: str | None = None
    """The class, where the answer is one of a closed set."""
    source: str | None = None
    """The row's own text, where the prompt holds more than that."""

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The conversation up to the last answer."""
        return self.messages[:-1] if self.messages[-1].role == "assistant" else self.messages

    @property
    def text(self) -> str:
        """What was asked."""
        return self.prompt[-1].content if self.source is None else self.source

    @property
    def answer(self) -> str:
        return self.messages[-1].content if self.messages[-1].role == "assistant" else ""


@dataclass(frozen=True)
class Prediction:
    """An example, answered."""

    example: Example
    answer: str
    stopped: bool
    """True where the model ended by itself, False where it ran into the length limit."""


@dataclass(frozen=True)
class BaseModel:
    """A base model by its public name, and what a copy with random weights needs."""

    hub_id: str
    architecture: str
    """A file in recipes/architectures, without its ending."""
    chat_template: str | None = None
    """The model's official chat template, by its file name in trl/chat_templates; None for base models."""
    licence: str = ""
    """Of its weights, as the hub calls it."""
    terms: str = ""
    """Where that licence can be read."""


@dataclass(frozen=True)
class Split:
    """Shares of the rows; what remains is the training split."""

    validation: float
    test: float
    by: str | None = None
    """Row field over whose values every split is spread evenly."""
    assigned: str | None = None
    """Row field that says train or valid; valid rows are shared out between validation and test."""


@dataclass
class Reading:
    """What became of the rows of a source file."""

    source: Path
    kept: int = 0
    dropped: dict[str, list[int]] = field(default_factory=dict)
    """Reason -> line numbers."""
    notes: dict[str, Any] = field(default_factory=dict)
    """What was found out while reading, such as the encoding."""

    def drop(self, reason: str, line: int) -> None:
        self.dropped.setdefault(reason, []).append(line)


@dataclass(frozen=True)
class NoOptions:
    """For recipes whose reader needs no telling."""


@dataclass(frozen=True, eq=False)
class Recipe:
    """Everything that distinguishes one recipe from another. A value: stages take it, nobody inherits it."""

    name: str
    title: str
    base: BaseModel
    settings: Settings
    split: Split
    sample: Callable[..., None] | str
    """The data a run uses where no source is named: a file in recipes/samples, or a function that writes one; it is
    given a path, and by the command `sample` also rows, classes and seed."""
    read: Callable[[Path, Any, Reading], Iterator[Row]]
    """Source file, options, report -> cleaned rows."""
    to_example: Callable[[Row], Example]
    score: Callable[[Sequence[Prediction]], dict[str, Any]] | None = None
    """Answered test examples -> metrics, for recipes that answer in free text."""
    options: Any = NoOptions()
    """An instance of a dataclass of what this recipe's reader can be told; its fields become flags of prepare."""
    plain_template: str | None = None
    """Chat template (Jinja) for base models that have none of their own."""
    stop_phrase: str | None = None
    """Every answer is trained to end with this, and answering stops there."""
    balance: Balance | NoOptions = NoOptions()
    """A Balance where the answer is one of a closed set (split.by names the row field that holds it): answers are
    then scored instead of generated, and the best checkpoint is kept."""
    recall: Any = NoOptions()
    """A memory.Recall where the recipe can bring up what a user's memory file says; `ask` then takes it as its second
    argument."""
    sampling: Sampling = Sampling()
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Name -> settings that differ."""
    best_presets: tuple[str, ...] = ()
    """Their names, best first: --auto-preset takes the first that fits the card. Not named: the last is the best."""
    miniature: Mapping[str, Any] = field(default_factory=dict)
    """Settings that differ at the sizes tiny and small, whose random weights need a higher learning rate."""
    ask: Callable[..., tuple[Message, ...]] = lambda text: (Message("user", text),)
    """One user text -> prompt, for predict and chat."""
    text_column: str = "text"
    """Column of a file whose rows are to be answered."""
    facets: tuple[str, ...] = ()
    """Row fields by whose values `stats` counts."""
    cases: Mapping[str, str] = field(default_factory=dict)
    """Title -> question: a fixed set that `evaluate --cases` answers."""
    notice: str | None = None
    """A line that follows every answer."""

    @property
    def closed(self) -> bool:
        """The answer is one of a closed set."""
        return isinstance(self.balance, Balance)

    @property
    def presets_by_quality(self) -> tuple[str, ...]:
        return self.best_presets or tuple(self.presets)[::-1]

    @property
    def stop(self) -> tuple[str, ...]:
        return (self.stop_phrase,) if self.stop_phrase else ()
