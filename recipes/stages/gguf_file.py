"""A merged model as one GGUF file, for llama.cpp and what is built on it.

Two exporters can write it, and neither is ours: Unsloth's, where its llama.cpp is built, and llama.cpp's own converter,
where the user has it. Nothing is fetched here. What they wrote is read back, and refused where it is not the model.
"""

import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

from fallback.choose import why_not
from fallback.torch_build import usable_gpu
from recipes.stages import export
from recipes.stages.console import say
from recipes.stages.export import Source
from recipes.stages.recipe import UserError
from recipes.stages.run import read_json, replacing

Kind = Literal["auto", "f16", "bf16", "q8_0"]
ARCHITECTURES = {
    "llama": "llama", "gemma2": "gemma2", "gemma3_text": "gemma3", "gemma3": "gemma3", "gpt_neox": "gptneox",
}  # fmt: skip
"""What transformers calls an architecture -> what llama.cpp calls it."""
CONVERTER = "convert_hf_to_gguf.py"
_ON_PATH = (CONVERTER, "convert-hf-to-gguf")

# Takes a merged folder and not a model: whatever else Unsloth's exporter would do to the weights was done and checked.
_UNSLOTH = (
    "import sys, unsloth; from unsloth.save import save_to_gguf; name, kind, dtype, folder, type, out = sys.argv[1:]; "
    "save_to_gguf(name, kind, dtype, model_directory=folder, quantization_method=[type], gguf_directory=out)"
)


def write(source: Source, out: Path | None, kind: Kind, llama_cpp: Path | None) -> Path:
    """Convert the run's merged model, which is made first where there is none."""
    place = out or source.run.path / f"{source.recipe.name.replace('_', '-')}.gguf"
    if place.is_dir() or not place.parent.is_dir():
        raise UserError(f"--out {place}: no file can be there")
    command = converter(llama_cpp)
    # Before minutes are spent on merging.
    obstacle = unsloth_obstacle(export.stored_dtype(source)[0], llama_cpp)
    if isinstance(command, str) and obstacle:
        raise UserError(f"no GGUF file can be written here. Unsloth's exporter: {obstacle}; llama.cpp's: {command}")
    folder = export.merged_before(source) or export.merged(source, None)
    with export.system_errors(), replacing(place) as beside:
        by = _convert(source, folder, beside, kind, llama_cpp, command, obstacle)
        found = check(beside, folder)
    size = place.stat().st_size
    say(
        f"{place}: {size / 2**20:,.1f} MiB, written by {by}; read back: {found['architecture']}, {found['blocks']} "
        f"blocks, {found['vocabulary']:,} tokens, ends at token {found['eos']}, chat template as it was trained"
    )
    return place


def converter(llama_cpp: Path | None) -> list[str] | str:
    """The command that converts, or why there is none."""
    named = llama_cpp or (Path(os.environ["LLAMA_CPP"]) if os.environ.get("LLAMA_CPP") else None)
    if named is not None:
        script = named / CONVERTER
        if not script.is_file():
            flag = f"--llama-cpp {named}" if llama_cpp else f"LLAMA_CPP={named}"
            raise UserError(f"{flag}: there is no {CONVERTER}; name a checkout of llama.cpp")
        # It asks for other versions of the libraries than we do; a checkout with an environment of its own has them.
        own = [path for folder in (".venv", "venv") if (path := named / folder / "bin" / "python").is_file()]
        return [str(own[0] if own else sys.executable), str(script)]
    for name in _ON_PATH:
        if found := shutil.which(name):
            return [sys.executable, found] if name.endswith(".py") else [found]
    return f"no {CONVERTER} here; name your checkout of llama.cpp with --llama-cpp DIR or LLAMA_CPP"


def unsloth_obstacle(dtype: str, llama_cpp: Path | None) -> str | None:
    """Why Unsloth's exporter cannot be asked. Where it finds no llama.cpp it would fetch and build one."""
    if dtype == "float32":
        return "it converts 16-bit weights, and these are float32"
    folder = llama_cpp or Path(os.environ.get("UNSLOTH_LLAMA_CPP_PATH") or Path.home() / ".unsloth" / "llama.cpp")
    for name in ("llama-quantize", CONVERTER):
        if not (folder / name).is_file():
            return f"its llama.cpp is not built: there is no {name} in {folder}"
    return why_not("unsloth", usable_gpu(), "")


def _convert(
    source: Source,
    folder: Path,
    out: Path,
    kind: Kind,
    llama_cpp: Path | None,
    command: list[str] | str,
    obstacle: str | None,
) -> str:
    about = read_json(folder / "export.json")
    complaint = obstacle or _by_unsloth(folder, out, kind, about["dtype"], llama_cpp)
    if complaint is None:
        return "Unsloth's exporter"
    reasons = [f"Unsloth's exporter: {complaint}"]
    if isinstance(command, str):
        reasons.append(f"llama.cpp's converter: {command}")
    elif complaint := _by_converter(source, folder, out, kind, command):
        reasons.append(f"llama.cpp's converter: {complaint}")
    else:
        say(f"not by {reasons[0]}")
        return "llama.cpp's converter"
    raise UserError(f"no GGUF file could be written. {'; '.join(reasons)}. The merged model is in {folder}")


def _by_unsloth(folder: Path, out: Path, kind: Kind, dtype: str, llama_cpp: Path | None) -> str | None:
    """What went wrong, or None. In a process of its own: Unsloth has to be imported before what is loaded here."""
    exact = {"bfloat16": "bf16", "float16": "f16"}[dtype] if kind == "auto" else kind
    env = {**os.environ, "UNSLOTH_LLAMA_CPP_OFFLINE": "1"}
    if llama_cpp:
        env |= {"UNSLOTH_LLAMA_CPP_PATH": str(llama_cpp), "UNSLOTH_LLAMA_CPP_SCRIPTS_DIR": str(llama_cpp)}
    model_type = read_json(folder / "config.json")["model_type"]
    with tempfile.TemporaryDirectory(dir=out.parent) as place:
        words = ["model", model_type, dtype, str(folder.resolve()), exact, place]
        complaint = _run([sys.executable, "-c", _UNSLOTH, *words], env, place)
        if complaint is None:
            written = sorted(Path(place).glob("*.gguf"))
            if len(written) != 1:
                return f"it left {len(written)} files instead of one"
            written[0].replace(out)
    return complaint


def _by_converter(source: Source, folder: Path, out: Path, kind: Kind, command: list[str]) -> str | None:
    words = [str(folder.resolve()), "--outfile", str(out.resolve()), "--outtype", kind]
    complaint = _run([*command, *words], dict(os.environ), None)
    if (
        complaint
        and ("pre-tokenizer" in complaint or "tokenizer.model" in complaint)
        and source.chosen.weights == "random"
    ):
        return "it knows published tokenizers alone, and a random model's was made here: only real models convert"
    if complaint and "rotary_pct" in complaint:
        return (
            "it reads GPT-NeoX with the transformers of its own requirements alone; in your checkout: "
            "python -m venv .venv && .venv/bin/pip install -r requirements.txt"
        )
    return complaint


def _run(command: list[str], env: Mapping[str, str], place: str | None) -> str | None:
    done = subprocess.run(command, env=env, cwd=place, capture_output=True, text=True, errors="replace")
    # Into the log of the libraries, whole.
    sys.stderr.write(done.stdout + done.stderr)
    if done.returncode == 0:
        return None
    lines = [line.strip() for line in (done.stderr or done.stdout).strip().splitlines() if line.strip()]
    return f"{lines[-1][:300] if lines else 'no message'} (exit code {done.returncode})"


def check(path: Path, folder: Path) -> dict[str, Any]:
    """Hold what a GGUF file says of itself against the model that it was made from."""
    try:
        found = metadata(path)
    except (OSError, ValueError, struct.error, MemoryError, KeyError) as error:
        raise UserError(f"the GGUF file that was written cannot be read back ({error}); it was not kept") from None
    config, tokenizer = read_json(folder / "config.json"), read_json(folder / "tokenizer_config.json")
    about, text = read_json(folder / "export.json"), config.get("text_config") or config
    name = found.get("general.architecture")
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    ends = set(about["end_tokens"].values())
    expected: dict[str, tuple[Any, Any]] = {
        "architecture": (name, ARCHITECTURES.get(config["model_type"], name)),
        "blocks": (found.get(f"{name}.block_count"), text["num_hidden_layers"]),
        "vocabulary": (len(found.get("tokenizer.ggml.tokens") or ()), text["vocab_size"]),
        "chat template": (str(found.get("tokenizer.chat_template", "")).strip(), template.strip()),
        "token that begins a text": (found.get("tokenizer.ggml.add_bos_token"), tokenizer["add_bos_token"]),
    }
    for key in ("eos", "eot"):
        token = found.get(f"tokenizer.ggml.{key}_token_id")
        if key == "eos" or token is not None:
            expected[f"{key} token"] = (token in ends, True)
    wrong = [
        f"{what} is {str(is_)[:60]!r} and not {str(should)[:60]!r}"
        for what, (is_, should) in expected.items()
        if is_ != should
    ]
    if wrong:
        raise UserError(f"the GGUF file that was written is not this model: {'; '.join(wrong)}; it was not kept")
    return {
        **{what: is_ for what, (is_, _) in expected.items()},
        "eos": found["tokenizer.ggml.eos_token_id"],
    }


_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9


def metadata(path: Path) -> dict[str, Any]:
    """The key-value pairs at the head of a GGUF file (versions 2 and 3), whose tensors all lie within the file."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version, tensors, pairs = struct.unpack("<IQQ", _exactly(file, 20))
        if version not in (2, 3):
            raise ValueError(f"GGUF version {version} is unknown")
        found = {_text(file): _value(file, *struct.unpack("<I", _exactly(file, 4))) for _ in range(pairs)}
        last = 0
        for _ in range(tensors):
            _text(file)
            (dimensions,) = struct.unpack("<I", _exactly(file, 4))
            *_, offset = struct.unpack(f"<{dimensions}QIQ", _exactly(file, 8 * dimensions + 12))
            last = max(last, offset)
        step = found.get("general.alignment", 32)
        begin = -(-file.tell() // step) * step
        if not tensors or path.stat().st_size <= begin + last:
            raise ValueError("it ends before its tensors do")
    return found


def _exactly(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise ValueError("it ends in the middle of its metadata")
    return data


def _text(file: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", _exactly(file, 8))
    return _exactly(file, length).decode("utf-8", errors="replace")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _TEXT:
        return _text(file)
    if kind == _LIST:
        inner, count = struct.unpack("<IQ", _exactly(file, 12))
        if inner in _NUMBERS:
            return list(
                struct.unpack(f"<{count}{_NUMBERS[inner]}", _exactly(file, count * struct.calcsize(_NUMBERS[inner])))
            )
        return [_value(file, inner) for _ in range(count)]
    return struct.unpack(f"<{_NUMBERS[kind]}", _exactly(file, struct.calcsize(f"<{_NUMBERS[kind]}")))[0]
