"""What can be said to each stage on its command line: the string under a field is its --help."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Generic, Literal, TypeVar

import tyro

from fallback.choose import Backend
from recipes.stages import gguf_file
from recipes.stages.classifier import Scoring
from recipes.stages.memory import Recall
from recipes.stages.recipe import Sampling, Settings

Options = TypeVar("Options")
Balancing = TypeVar("Balancing")
Answering = TypeVar("Answering", Sampling, Scoring)
Remembering = TypeVar("Remembering")


@dataclass(frozen=True)
class Prepare(Generic[Options]):
    """Clean and split a source file into a new run's data/."""

    options: Options
    source: Path | None = None
    """Your data; without it the recipe's own sample."""
    run: Path | None = None
    """Folder of the run; a new one under runs/ if not given."""
    seed: int = 42
    """Seeds the split."""
    show: int = 0
    """Print this many examples as the model will see them, and which of their tokens carry loss."""
    size: Literal["auto", "tiny", "small", "full"] = "auto"
    """Whose tokenizer --show uses."""
    weights: Literal["pretrained", "random"] | None = None
    """As for train."""
    model: str | None = None
    """As for train."""


@dataclass(frozen=True)
class Stats(Generic[Options]):
    """Count what a file holds: rows, values, lengths in tokens."""

    options: Options
    source: Path | None = None
    """Your data; without it the recipe's own sample."""
    size: Literal["auto", "tiny", "small", "full"] = "auto"
    """Whose tokenizer counts."""
    weights: Literal["pretrained", "random"] | None = None
    """As for train."""
    model: str | None = None
    """As for train."""


@dataclass(frozen=True)
class Sample:
    """Write a synthetic file of the true shape, to try things out with: the same seed gives the same bytes."""

    rows: int = 388_706
    """Rows of the file."""
    classes: int = 86
    """Classes among them: the largest has about a quarter of the rows, the rarest 8 to 20."""
    seed: int = 0
    """Seeds what is drawn."""
    out: Path = Path("sample.csv")
    """The file."""


@dataclass(frozen=True)
class Train(Generic[Options, Balancing]):
    """Fine-tune. Prepares the data first, unless --run names a prepared run."""

    options: Options
    balance: Balancing
    settings: Settings
    source: Path | None = None
    """Your data; without it the recipe's own sample."""
    run: Path | None = None
    """Folder of the run; a new one under runs/ if not given."""
    preset: str | None = None
    """A named set of settings; flags given beside it override it. Where presets are named after an amount of GPU
    memory, the GPU's own decides if none is named."""
    auto_preset: bool = False
    """Take the best preset that fits this GPU by what plan calculates, which takes some seconds. At full size only."""
    size: Literal["auto", "tiny", "small", "full"] = "auto"
    """full is the real model; tiny and small are the same architecture, shrunk, with random weights; auto takes full
    where there is a CUDA GPU and the weights are at hand, else tiny."""
    weights: Literal["pretrained", "random"] | None = None
    """pretrained loads the published weights (only at full size), random makes new ones."""
    model: str | None = None
    """Another base model, by hub id or folder."""
    backend: Backend = "auto"
    """auto takes Unsloth for full-size models on a GPU that it runs on, else peft+liger or plain PEFT, and says why."""
    resume: bool = False
    """Go on with the training in --run, or with the newest that did not come to its end."""
    accept_changes: bool = False
    """Go on although settings, data or the machine are not what they were."""
    auto_batch: bool = False
    """When memory does not suffice, let half as many tokens through at once and go on: the same steps."""


@dataclass(frozen=True)
class Plan(Generic[Options]):
    """Calculate parameters, steps, memory and time of a full-size training, before any download."""

    options: Options
    settings: Settings
    source: Path | None = None
    """Your data, whose tokens are counted; without it the recipe's own sample."""
    run: Path | None = None
    """A prepared run, whose training split is counted instead."""
    rows: int | None = None
    """Training examples, where there is no file yet: the mean length found is scaled to so many."""
    gpu: tuple[str, ...] = ()
    """Cards to ask for: --gpu "RTX 4090" 12GB "Quadro M6000:5.2:12"; without it this machine's, else usual ones."""
    preset: str | None = None
    """As for train."""
    gpus: int = 1
    """How many of them share the training; tells what each holds under DDP, FSDP2 and ZeRO-3, and which to take."""
    presets: bool = False
    """Tell instead which presets fit those cards, best first."""
    json: bool = False
    """Print it as JSON."""


@dataclass(frozen=True)
class Runs:
    """A table of all runs of this recipe: settings, loss, metrics, time."""

    json: bool = False
    """Print it as JSON."""


@dataclass(frozen=True)
class Trained:
    """Which run answers, and with what."""

    run: Path | None = None
    """Folder of the run; the newest trained one if not given."""
    backend: Backend = "auto"
    """auto takes the backend that trained the run, where it can run."""


@dataclass(frozen=True)
class Evaluate(Generic[Answering]):
    """Answer the test split and score the answers."""

    answering: Answering
    cases: bool = False
    """Answer the recipe's fixed questions instead, and write them to cases.md."""
    trained: Trained = Trained()


@dataclass(frozen=True)
class Predict(Generic[Answering, Remembering]):
    """Answer one text, every row of a file, or every line of standard input."""

    answering: Answering
    recall: Remembering
    text: Annotated[str | None, tyro.conf.Positional] = None
    """The text to answer; without it they are read from standard input."""
    speed: bool = False
    """Measure how fast answers are made instead: prefill and decode, tokens per second."""
    file: Path | None = None
    """CSV file whose rows are to be answered."""
    out: Path | None = None
    """Where they go, with the answers; the same command again continues after an interruption."""
    text_column: str = ""
    """Column of the file that holds the text."""
    trained: Trained = Trained()


@dataclass(frozen=True)
class Chat(Generic[Remembering]):
    """Talk to the model."""

    sampling: Sampling
    recall: Remembering
    trained: Trained = Trained()


@dataclass(frozen=True)
class Export:
    """Hand the model on: merged weights, an Ollama model, a GGUF file, or a place on the hub."""


@dataclass(frozen=True)
class ExportMerged:
    """Fold the adapter into the base weights at 16 bits, and check that the outcome answers like the adapter."""

    run: Path | None = None
    """Folder of the run; the newest trained one if not given."""
    out: Path | None = None
    """The folder to write; merged/ in the run if not given."""


@dataclass(frozen=True)
class ExportOllama:
    """The merged model with a Modelfile beside it, for `ollama create`."""

    run: Path | None = None
    """Folder of the run; the newest trained one if not given."""
    out: Path | None = None
    """The folder to write; ollama/ in the run if not given."""


@dataclass(frozen=True)
class ExportGguf:
    """The merged model as one GGUF file, by Unsloth's exporter or llama.cpp's converter, and read back."""

    run: Path | None = None
    """Folder of the run; the newest trained one if not given."""
    out: Path | None = None
    """The file; one in the run's folder if not given."""
    type: gguf_file.Kind = "auto"
    """How weights are held; auto is as they are merged."""
    llama_cpp: Path | None = None
    """Your checkout of llama.cpp; without it LLAMA_CPP and the search path are looked at."""


@dataclass(frozen=True)
class ExportHub:
    """Upload the adapter with a model card: private, and after showing what goes there and asking."""

    to: str = ""
    """Name of the repository on the hub, as in you/model; has to be given."""
    run: Path | None = None
    """Folder of the run; the newest trained one if not given."""
    merged: bool = False
    """The merged model instead of the adapter."""
    public: bool = False
    """For everybody to see, where the repository is new."""
    yes: bool = False
    """Do not ask."""


@dataclass(frozen=True)
class Remember:
    """Show which item of a memory file would be put before a question, and how related all of them are."""

    recall: Recall
    test: tuple[str, ...] = ()
    """Questions to try; the recipe's own sample questions if none is given."""
