"""Handing a model on: what is written answers like the adapter, and other programs read it as it was meant."""

import base64
import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RECIPES, ROOT, recipe
from safetensors.torch import load_file
from test_disk import on_a_disk

from fallback import choose as choosing
from fallback import cpu, passes
from fallback.choose import choose
from recipes.stages import export, exported, gguf_file, modelfile
from recipes.stages.base_model import ensure_files, settle
from recipes.stages.classifier import Scoring
from recipes.stages.cli import main, run_command
from recipes.stages.exported import Exported, with_phrase, without_phrase
from recipes.stages.loading import Model
from recipes.stages.recipe import Message, UserError
from recipes.stages.render import Renderer
from recipes.stages.run import Run, write_json

CIVIL, OPERCODE, PERSONA = map(recipe, ("llama_1b_civil", "gemma3_12b_opercode", "polyglot_1_3b_ohlora"))
TOKEN = "hf_planted0123456789"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def base(folder: Path) -> Path:
    """A base model as somebody publishes it: 16 bits, in a folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    chosen = settle(CIVIL, "tiny")
    ensure_files(CIVIL, chosen)
    place = folder / "published"
    AutoModelForCausalLM.from_pretrained(chosen.source, dtype=torch.bfloat16).save_pretrained(place)
    AutoTokenizer.from_pretrained(chosen.source).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def civil(folder: Path, base: Path) -> Path:
    """A run on that base, quantised to 4 bits."""
    few = ("--max-steps", "6", "--learning-rate", "1e-2", "--batch-size", "4", "--accumulation", "1")
    few = (*few, "--no-checkpointing", "--dtype", "float32")
    given = ("train", "--backend", "peft", "--size", "full", "--model", str(base), *few)
    run_command(CIVIL, [*given, "--early-stopping", "off", "--run", str(folder / "civil")])
    return folder / "civil"


@pytest.fixture(scope="module")
def merged(civil: Path) -> Path:
    """Its merged model, in more files than one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "SHARD_BYTES", 1 << 20)
        run_command(CIVIL, ["export", "merged", "--run", str(civil)])
    return civil / "merged"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def refused(capsys: pytest.CaptureFixture[str], of: Any, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(of, arguments)
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert "Traceback" not in said
    # In this process what the libraries print comes along; theirs are no errors.
    [line] = [line for line in said.splitlines() if line.startswith("error: ")]
    return line


# Merged weights.


def test_every_weight_is_the_sum_rounded_once(civil: Path, base: Path, merged: Path) -> None:
    before, after = weights(base), weights(merged)
    lora = load_file(civil / "adapter" / "adapter_model.safetensors")
    config = json.loads((civil / "adapter" / "adapter_config.json").read_text())
    scale, changed = config["lora_alpha"] / config["r"], 0
    assert set(before) == set(after)
    for name, weight in before.items():
        assert after[name].dtype == torch.bfloat16
        matrix = "base_model.model." + name.removesuffix(".weight") + ".lora_{}.weight"
        if matrix.format("A") in lora:
            delta = scale * (lora[matrix.format("B")] @ lora[matrix.format("A")])
            expected = (weight.float() + delta).to(torch.bfloat16)
            # The last bit may hang on the order of a sum, in a few places of many thousands.
            assert float((after[name] != expected).float().mean()) < 1e-3, name
            changed += not torch.equal(after[name], weight)
        else:
            assert torch.equal(after[name], weight), name
    assert changed == len(lora) / 2


def test_the_outcome_is_measured_and_told(merged: Path) -> None:
    about = json.loads((merged / "export.json").read_text())
    parity, quantised = about["parity"], about["on_quantised_base"]
    assert (about["dtype"], about["trained_on"], quantised["quantization"]) == ("bfloat16", "4bit", "4bit")
    # What the quantisation took away is not told together with another rounding.
    assert (about["trained_in"], quantised["dtype"]) == ("float32", "bfloat16")
    assert parity["same_answers"] + parity["answers_that_part_at_a_tie"] == parity["prompts"] >= 6
    assert 0.5 < parity["half_digits_off"] < 1.2
    assert 0 < parity["rms_difference"] < 0.1 * parity["rms_of_what_training_changed"]
    # What 4 bits took away is more than what rounding does, and is a number here and no failure.
    assert quantised["rms_difference"] > 3 * parity["rms_difference"]
    assert not [path for path in merged.parent.iterdir() if "making" in path.name]


def test_a_merged_model_is_complete(merged: Path, base: Path) -> None:
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in merged.glob("*.safetensors")}
    assert len(list(merged.glob("*.safetensors"))) > 1
    generation = json.loads((merged / "generation_config.json").read_text())
    tokenizer = json.loads((merged / "tokenizer.json").read_text())
    named = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    assert {named["<|end_of_text|>"], named["<|eot_id|>"]} <= set(generation["eos_token_id"])
    assert (generation["do_sample"], generation["temperature"], generation["top_p"]) == (True, 0.3, 0.9)
    assert generation["_from_model_config"] is False
    assert "### 답변:" in (merged / "chat_template.jinja").read_text(encoding="utf-8")
    # Names of transformers 4, which Ollama, llama.cpp and older servers look for.
    config = json.loads((merged / "config.json").read_text())
    assert config["rope_theta"] == 500000.0
    assert config["rope_scaling"]["rope_type"] == "llama3"
    words = json.loads((merged / "tokenizer_config.json").read_text())
    assert words["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert words["add_bos_token"] is True
    assert {path.stat().st_mode & 0o777 for path in merged.iterdir()} == {0o644}
    for path in merged.glob("*.json"):
        assert str(base.parent) not in path.read_text(encoding="utf-8"), path


def test_older_names_of_every_family() -> None:
    neox = {"model_type": "gpt_neox", "rope_parameters": {"rope_theta": 10000, "partial_rotary_factor": 0.5}}
    assert export.with_older_names(neox) == {"rotary_emb_base": 10000, "rotary_pct": 0.5, **neox}
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    told = export.with_older_names({"text_config": {"model_type": "gemma3_text", "rope_parameters": rope}})
    assert told["text_config"]["rope_theta"] == 1e6
    assert told["text_config"]["rope_local_base_freq"] == 1e4
    assert told["text_config"]["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}


def test_another_answer_is_refused_and_nothing_is_kept(
    civil: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = export.fold

    def twice(network: Any) -> Any:
        for module in network.modules():
            for name in getattr(module, "lora_A", ()):
                module.scaling[name] *= 2
        return real(network)

    monkeypatch.setattr(export, "fold", twice)
    said = refused(capsys, CIVIL, "export", "merged", "--run", str(civil), "--out", str(civil / "wrong"))
    assert "is not the adapter on its base model: its weights are off by" in said
    assert "nothing was kept" in said
    assert not (civil / "wrong").exists()
    assert not list(civil.glob(".wrong*"))


def seen(answers: list[list[int]], logits: list[Any]) -> export.Seen:
    return export.Seen(answers, [torch.tensor(each) for each in logits])


def test_what_agrees_and_what_does_not() -> None:
    adapter = seen([[0, 1]], [[[2.0, 0.0, -1.0], [0.0, 1.0, -1.0]]])
    untrained = seen([[0, 1]], [[[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]])
    same = export.agreement(adapter, untrained, adapter, adapter, "float32")
    assert (same["share"], same["same_answers"], same["same_likeliest_token"]) == (0, 1, 1)
    none = export.agreement(adapter, untrained, untrained, untrained, "float32")
    assert none["share"] == pytest.approx(1)
    assert none["rms_difference"] > none["rms_allowed"]
    near = seen([[0, 0]], [[[2.0, 0.0, -1.0], [0.6, 0.5, -1.0]]])
    told = export.agreement(adapter, untrained, near, near, "bfloat16")
    assert (told["same_answers"], told["answers_that_part_at_a_tie"]) == (0, 1)
    far = seen([[2, 1]], [[[2.0, 0.0, -1.0], [0.0, 1.0, -1.0]]])
    assert export.agreement(adapter, untrained, far, far, "bfloat16")["answers_that_part_at_a_tie"] == 0


def test_each_measure_refuses_by_itself(tmp_path: Path) -> None:
    good = {
        "half_digits_off": 1.0, "half_digits_allowed": 2.0, "rms_difference": 0.01, "rms_allowed": 0.1, "prompts": 8,
        "same_answers": 7, "answers_that_part_at_a_tie": 1,
    }  # fmt: skip
    source = source_of("llama_1b_civil", tmp_path)
    export.refuse_other_answers(source, good)
    for bad in (
        {"half_digits_off": 2.1},
        {"half_digits_off": float("nan")},
        {"rms_difference": 0.11},
        {"rms_difference": float("nan")},
        {"answers_that_part_at_a_tie": 0},
    ):
        with pytest.raises(UserError, match="is not the adapter on its base model"):
            export.refuse_other_answers(source, {**good, **bad})


def test_what_cannot_be_exported(
    civil: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert "no such folder" in refused(capsys, CIVIL, "export", "merged", "--run", "nowhere")
    assert "no finished run" in refused(capsys, CIVIL, "export", "merged")
    assert "merged, ollama, gguf, hub" in refused(capsys, CIVIL, "export", "tarball")
    assert "merged, ollama, gguf, hub" in refused(capsys, CIVIL, "export")
    (folder / "precious").mkdir()
    (folder / "precious" / "file").write_text("precious")
    for out, why in (
        ("precious", "something else than an export is there"),
        ("precious/file", "something else than an export is there"),
        ("nowhere/there", "there is no folder nowhere"),
    ):
        assert why in refused(capsys, CIVIL, "export", "merged", "--run", str(civil), "--out", out)
    assert (folder / "precious" / "file").read_text() == "precious"
    begun = Path(shutil.copytree(civil, folder / "begun", ignore=shutil.ignore_patterns("merged")))
    write_json(begun / "metrics.json", {})
    assert "has not come to its end; python -m recipes.llama_1b_civil train --resume" in refused(
        capsys, CIVIL, "export", "hub", "--run", str(begun), "--to", "a/b", "--yes"
    )


def test_quantised_weights_are_never_merged_into(civil: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = json.loads((base / "config.json").read_text())
    write_json(base / "config.json", {**whole, "quantization_config": {"load_in_4bit": True}})
    try:
        said = refused(capsys, CIVIL, "export", "merged", "--run", str(civil), "--out", str(civil / "other"))
    finally:
        write_json(base / "config.json", whole)
    assert "its weights are quantised already" in said
    assert not (civil / "other").exists()


def test_disks_that_are_full_or_read_only(civil: Path, base: Path, tmp_path: Path) -> None:
    command = f"python -m recipes.llama_1b_civil export merged --run {civil} --out disk/model"
    done = on_a_disk(tmp_path, "1m", f"{command}; ls -A disk; mount -o remount,ro disk; {command}")
    full, read_only = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "GiB are needed" in full
    assert "free some space" in full
    assert "Read-only file system; choose another folder with --run or --out" in read_only
    assert "Traceback" not in done.stderr
    assert "model" not in done.stdout.split("\n")


def test_a_disk_that_fills_up_under_way_is_the_systems_matter() -> None:
    with pytest.raises(OSError, match="No space left") as caught, export.system_errors():
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert caught.value.errno == 28
    with pytest.raises(RuntimeError, match="another"), export.system_errors():
        raise RuntimeError("another")


# Closed sets.


@pytest.fixture(scope="module")
def payments(folder: Path) -> Path:
    given = ("train", "--backend", "peft", "--size", "tiny", "--quantization", "none", "--max-steps", "30")
    run_command(OPERCODE, [*given, "--learning-rate", "1e-2", "--run", str(folder / "payments")])
    run_command(OPERCODE, ["export", "merged", "--run", str(folder / "payments"), "--out", str(folder / "codes")])
    return folder / "payments"


def test_a_merged_classifier_scores_as_the_adapter_does(payments: Path, folder: Path) -> None:
    from recipes.gemma3_12b_opercode import OperCodeClassifier

    texts = [json.loads(line)["text"] for line in (payments / "data" / "test.jsonl").read_text().splitlines()[:40]]
    # Elsewhere, and without its run.
    moved = Path(shutil.copytree(folder / "codes", folder / "elsewhere" / "codes"))
    before = set(moved.iterdir())
    for scoring in (Scoring(), Scoring(exhaustive=True)):
        adapter = OperCodeClassifier(payments, backend="peft", scoring=scoring)
        model = OperCodeClassifier(str(moved), backend="peft", scoring=scoring)
        one = adapter.predict_batch(texts, return_confidence=True)
        other = model.predict_batch(texts, return_confidence=True)
        assert [code for code, _ in one] == [code for code, _ in other]
        assert [p for _, p in one] == pytest.approx([p for _, p in other], abs=1e-4)
        assert len({round(p, 3) for _, p in one}) > 3
        assert adapter._loaded[1] == model._loaded[1]
        layers = [m for m in adapter._loaded[0].network.modules() if hasattr(m, "lora_A")]
        assert len(layers) > 1
        assert all(m.forward.__func__ is passes.whole_forward for m in layers)
    assert model._loaded[1].temperature != 1.0
    assert set(moved.iterdir()) == before


def test_a_folder_of_another_recipe_is_refused(merged: Path) -> None:
    from recipes.gemma3_12b_opercode import OperCodeClassifier

    with pytest.raises(UserError, match="was exported by 'llama_1b_civil' and not by gemma3_12b_opercode"):
        OperCodeClassifier(merged).predict("text")


def test_a_broken_export_json_is_one_line(tmp_path: Path) -> None:
    for content in ("[]", "{}", "{"):
        (tmp_path / "export.json").write_text(content)
        with pytest.raises(UserError, match=r"export\.json: not "):
            Exported.at(tmp_path)


@pytest.mark.parametrize(("trained", "answers"), [("bfloat16", "bfloat16"), ("float32", "float32"), (None, "float32")])
def test_on_a_cpu_it_answers_in_what_it_was_trained_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: str | None, answers: str
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(choosing, "read_gpu", lambda: None)
    monkeypatch.setattr(cpu, "bfloat16", lambda: "amx_bf16")
    monkeypatch.setattr(exported, "load_whole", lambda _, __, choice, ___: asked.append(choice.dtype))
    write_json(tmp_path / "config.json", {"model_type": "llama"})
    write_json(tmp_path / "export.json", {"recipe": "llama_1b_civil", "max_length": 9, "trained_in": trained})
    found = Exported.at(tmp_path)
    assert found
    found.load(recipe("llama_1b_civil"))
    assert asked == [answers]


# Ollama.


def model_of(name: str, tokenizers: Callable[[str], Any]) -> Model:
    """All of a model but its weights."""
    tokenizer = tokenizers(name)
    return Model(None, tokenizer, Renderer(tokenizer, recipe(name).stop_phrase), choose("llama", "peft"))


def conversations(name: str) -> list[list[Message]]:
    talk = [Message(role, f"말 {i} {{{{ .x }}}}") for i, role in enumerate(["user", "assistant"] * 3)]  # type: ignore[arg-type]
    asked = list(recipe(name).ask("질문"))
    return [asked, talk[:1], talk[:3], talk[:5], [*asked, *talk[1:3]]]


class GoTemplate:
    """As much of Go's text/template as the templates here are written in: range over messages, if, else if, else, eq,
    gt, len, slice and fields. Anything else fails."""

    def __init__(self, text: str):
        self.parts = re.split(r"\{\{ (.*?) \}\}", text)

    def __call__(self, messages: Sequence[Message]) -> str:
        self.messages = messages
        out, at = self.block(0, {}, True)
        assert at == len(self.parts)
        return out

    def block(self, at: int, names: dict[str, Any], live: bool) -> tuple[str, int]:
        """From a text on, up to the action that ends this block."""
        out = ""
        while True:
            out += self.parts[at] if live else ""
            if at + 1 >= len(self.parts):
                return out, at + 1
            action = self.parts[at + 1]
            if action == "end" or action.startswith("else"):
                return out, at + 1
            if action == "range $i, $m := .Messages":
                for i, message in enumerate(self.messages):
                    more, end = self.block(at + 2, {"$i": i, "$m": message}, live)
                    out += more
                at = end + 1
            elif action.startswith("if "):
                more, at = self.choice(at + 1, names, live)
                out += more
            else:
                out += str(self.value(action, names)) if live else ""
                at += 2

    def choice(self, at: int, names: dict[str, Any], live: bool) -> tuple[str, int]:
        action, taken, out = self.parts[at].removeprefix("if "), False, ""
        while True:
            true = live and not taken and (action == "" or bool(self.value(action, names)))
            more, at = self.block(at + 1, names, true)
            out, taken = out + more, taken or true
            if self.parts[at] == "end":
                return out, at + 1
            action = self.parts[at].removeprefix("else").removeprefix(" if ")

    def value(self, words: str, names: dict[str, Any]) -> Any:
        found = re.fullmatch(r"(eq|gt) (\(.*\)|\S+) (\S+)", words)
        if found:
            one, other = self.value(found[2], names), self.value(found[3], names)
            return one == other if found[1] == "eq" else one > other
        if words == "(len (slice $.Messages $i))":
            return len(self.messages[names["$i"] :])
        fields = {
            "$i": lambda: names["$i"],
            "$m.Role": lambda: names["$m"].role,
            "$m.Content": lambda: names["$m"].content,
        }
        return fields[words]() if words in fields else json.loads(words)


@pytest.mark.parametrize("name", RECIPES)
def test_ollama_writes_the_prompt_of_the_training(name: str, tokenizers: Callable[[str], Any]) -> None:
    model = model_of(name, tokenizers)
    bos = model.tokenizer.bos_token if export.begins_with_bos(model) else ""
    written = GoTemplate(modelfile.template(modelfile.turns(model.renderer, bos)))
    for messages in conversations(name):
        assert bos + written(messages) == model.renderer.text(messages, True)


def test_a_system_text_goes_before_the_question_where_a_template_has_none(tokenizers: Callable[[str], Any]) -> None:
    for name, user in (("gemma2_2b_ohlora", "<start_of_turn>user\n"), ("polyglot_1_3b_ohlora", "### 사용자: ")):
        model = model_of(name, tokenizers)
        bos = model.tokenizer.bos_token if export.begins_with_bos(model) else ""
        written = GoTemplate(modelfile.template(modelfile.turns(model.renderer, bos)))
        talk = [Message("system", "S"), Message("user", "U")]
        assert written(talk) == model.renderer.text([Message("user", "S\n\nU")], True).removeprefix(bos)
        assert written(talk).startswith(f"{user}S\n\nU")


GO = """package main

import ("encoding/json"; "os"; "text/template")

type message struct { Role, Content string }
type task struct { Template string; Messages []*message }

func main() {
	var tasks []task
	if err := json.NewDecoder(os.Stdin).Decode(&tasks); err != nil { panic(err) }
	for _, t := range tasks {
		made := template.Must(template.New("").Option("missingkey=zero").Parse(t.Template))
		if err := made.Execute(os.Stdout, map[string]any{"Messages": t.Messages}); err != nil { panic(err) }
		os.Stdout.WriteString("\\x00")
	}
}
"""


def test_go_itself_writes_the_same(tokenizers: Callable[[str], Any], tmp_path: Path) -> None:
    go = shutil.which("go")
    if go is None:
        pytest.skip("go is not installed: Ollama's template was run by this file's own reading of it alone")
    tasks, expected = [], []
    for name in RECIPES:
        model = model_of(name, tokenizers)
        bos = model.tokenizer.bos_token if export.begins_with_bos(model) else ""
        text = modelfile.template(modelfile.turns(model.renderer, bos))
        for messages in conversations(name):
            tasks.append({"Template": text, "Messages": [{"Role": m.role, "Content": m.content} for m in messages]})
            expected.append(model.renderer.text(messages, True).removeprefix(bos))
    (tmp_path / "main.go").write_text(GO)
    done = subprocess.run([go, "run", "main.go"], cwd=tmp_path, input=json.dumps(tasks), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\x00")[:-1] == expected


def source_of(name: str, tmp_path: Path) -> export.Source:
    run, chosen = Run(tmp_path), settle(recipe(name), "tiny")
    return export.Source(recipe(name), run, chosen, choose("llama", "peft"), "none", 512)


def lines_of(name: str, tokenizers: Callable[[str], Any], tmp_path: Path) -> list[str]:
    config = {"max_position_embeddings": 8192}
    text = modelfile.modelfile(source_of(name, tmp_path), model_of(name, tokenizers), ".", config)
    return text.splitlines()


def test_a_modelfile_says_how_the_recipe_answers(tokenizers: Callable[[str], Any], tmp_path: Path) -> None:
    persona = lines_of("polyglot_1_3b_ohlora", tokenizers, tmp_path)
    wanted = ['stop "(답변 종료)"', 'stop "<|endoftext|>"', "temperature 0.6", "repeat_penalty 1", "num_ctx 592"]
    assert {f"PARAMETER {line}" for line in wanted} <= set(persona)
    assert not [line for line in persona if line.startswith("SYSTEM")]
    assert any("NOT the real model" in line for line in persona)
    counsel = lines_of("gemma3_1b_counsel", tokenizers, tmp_path)
    assert 'PARAMETER stop "<end_of_turn>"' in counsel
    assert [line for line in counsel if line.startswith('SYSTEM """당신은 경험이')]
    payments = lines_of("gemma3_12b_opercode", tokenizers, tmp_path)
    assert "#   Payment: …" in payments
    assert "PARAMETER temperature 0.0" in payments


def test_export_ollama(civil: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "ANSWER_TOKENS", 4)
    run_command(CIVIL, ["export", "ollama", "--run", str(civil)])
    printed = capsys.readouterr().out
    text = (civil / "ollama" / "Modelfile").read_text(encoding="utf-8")
    assert "\nFROM .\n" in text
    assert 'SYSTEM """당신은 한국 민법을' in text
    assert (civil / "ollama" / "export.json").is_file()
    assert "ollama create llama-1b-civil" in printed
    assert ("is not here" in printed) == (shutil.which("ollama") is None)


def test_architectures_that_ollama_does_not_read_are_converted_first(
    tokenizers: Callable[[str], Any], tmp_path: Path
) -> None:
    write_json(tmp_path / "config.json", {"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox"})
    source, model = source_of("polyglot_1_3b_ohlora", tmp_path), model_of("polyglot_1_3b_ohlora", tokenizers)
    modelfile.write(source, tmp_path, model)
    assert "\nFROM ./polyglot-1-3b-ohlora.gguf\n" in (tmp_path / "Modelfile").read_text(encoding="utf-8")
    first, *_ = modelfile.next_commands(source, tmp_path)
    assert "convert_hf_to_gguf.py" in first
    write_json(tmp_path / "config.json", {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"})
    assert "tokenizer.model is not there" in modelfile.shortcomings(tmp_path)[0]


@pytest.mark.parametrize("name", [name for name in RECIPES if recipe(name).stop_phrase])
def test_the_template_handed_on_puts_the_stop_phrase_behind_earlier_answers(
    name: str, tokenizers: Callable[[str], Any]
) -> None:
    model = model_of(name, tokenizers)
    ours = model.tokenizer.chat_template
    theirs = with_phrase(ours, recipe(name).stop_phrase)
    assert without_phrase(theirs, recipe(name).stop_phrase) == ours
    for messages in conversations(name):
        text = model.tokenizer.apply_chat_template(
            [{"role": m.role, "content": m.content} for m in messages],
            chat_template=theirs, tokenize=False, add_generation_prompt=True,
        )  # fmt: skip
        assert text == model.renderer.text(messages, True)


# GGUF.


def gguf_bytes(pairs: dict[str, Any], tensors: int = 1) -> bytes:
    """A file as the format's description has it, version 3: numbers, booleans, texts and lists of texts."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    out = b"GGUF" + struct.pack("<IQQ", 3, tensors, len(pairs))
    for key, value in pairs.items():
        out += text(key)
        if isinstance(value, bool):
            out += struct.pack("<I?", 7, value)
        elif isinstance(value, int):
            out += struct.pack("<II", 4, value)
        elif isinstance(value, str):
            out += struct.pack("<I", 8) + text(value)
        else:
            out += struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
    for i in range(tensors):
        out += text(f"t{i}") + struct.pack("<IQIQ", 1, 8, 0, 32 * i)
    return out + b"\0" * (-len(out) % 32) + b"\0" * 32 * tensors


def pairs_of(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())
    return {
        "general.architecture": "llama",
        "llama.block_count": config["num_hidden_layers"],
        "tokenizer.ggml.tokens": [f"t{i}" for i in range(config["vocab_size"])],
        "tokenizer.ggml.eos_token_id": config["eos_token_id"][0],
        "tokenizer.ggml.eot_token_id": config["eos_token_id"][-1],
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": (folder / "chat_template.jinja").read_text(encoding="utf-8"),
    }


def test_a_gguf_file_is_read_back(merged: Path, tmp_path: Path) -> None:
    pairs = pairs_of(merged)
    (tmp_path / "a.gguf").write_bytes(gguf_bytes(pairs))
    assert gguf_file.metadata(tmp_path / "a.gguf") == pairs
    assert gguf_file.check(tmp_path / "a.gguf", merged)["blocks"] == 2


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("general.architecture", "gemma3", "architecture is 'gemma3' and not 'llama'"),
        ("llama.block_count", 3, "blocks is '3' and not '2'"),
        ("tokenizer.ggml.tokens", ["a"], "vocabulary is '1'"),
        ("tokenizer.ggml.eos_token_id", 5, "eos token"),
        ("tokenizer.ggml.eot_token_id", 5, "eot token"),
        ("tokenizer.ggml.add_bos_token", False, "token that begins a text is 'False'"),
        ("tokenizer.chat_template", "{{ messages }}", "chat template"),
    ],
)
def test_a_gguf_file_of_another_model_is_refused(key: str, value: Any, said: str, merged: Path, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(gguf_bytes({**pairs_of(merged), key: value}))
    with pytest.raises(UserError, match="is not this model: ") as error:
        gguf_file.check(tmp_path / "a.gguf", merged)
    assert said in str(error.value)


def test_a_gguf_file_that_is_torn_is_refused(merged: Path, tmp_path: Path) -> None:
    whole = gguf_bytes(pairs_of(merged))
    for data in (b"", b"PK\3\4", whole[:100], whole[:-33], gguf_bytes(pairs_of(merged), tensors=0)):
        (tmp_path / "a.gguf").write_bytes(data)
        with pytest.raises(UserError, match="cannot be read back"):
            gguf_file.check(tmp_path / "a.gguf", merged)


def test_what_other_peoples_writer_makes_is_read(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed: only files of this test were read")
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_block_count(2)
    writer.add_chat_template("{{ 말 }}")
    writer.add_token_list([b"a", b"b"])
    writer.add_token_scores([0.5, 1.5])
    writer.add_tensor("t", torch.ones(4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = gguf_file.metadata(tmp_path / "a.gguf")
    assert found["llama.block_count"] == 2
    assert found["tokenizer.chat_template"] == "{{ 말 }}"
    assert found["tokenizer.ggml.scores"] == [0.5, 1.5]


def converter_that(folder: Path, does: str) -> Path:
    """A checkout of llama.cpp, as far as it is looked at."""
    folder.mkdir()
    (folder / "convert_hf_to_gguf.py").write_text(f"import pathlib, sys\nout = pathlib.Path(sys.argv[3])\n{does}\n")
    return folder


def test_export_gguf_by_a_converter_of_the_users(
    civil: Path, merged: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "good.bin").write_bytes(gguf_bytes(pairs_of(merged)))
    (tmp_path / "bad.bin").write_bytes(gguf_bytes({**pairs_of(merged), "tokenizer.ggml.eos_token_id": 5}))
    copy = "out.write_bytes(pathlib.Path({!r}).read_bytes())"
    good = converter_that(tmp_path / "good", copy.format(str(tmp_path / "good.bin")))
    bad = converter_that(tmp_path / "bad", copy.format(str(tmp_path / "bad.bin")))
    torn = converter_that(tmp_path / "torn", "sys.exit('first\\nValueError: no such model')")
    given = ["export", "gguf", "--run", str(civil), "--out", str(tmp_path / "m.gguf")]
    assert "is not this model: eos token" in refused(capfd, CIVIL, *given, "--llama-cpp", str(bad))
    said = refused(capfd, CIVIL, *given, "--llama-cpp", str(torn))
    assert "Unsloth's exporter: its llama.cpp is not built: there is no llama-quantize" in said
    assert "llama.cpp's converter: ValueError: no such model (exit code 1). The merged model is in" in said
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".m", "m.gguf"))]
    run_command(CIVIL, [*given, "--llama-cpp", str(good)])
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "good.bin").read_bytes()
    printed = capfd.readouterr().out
    assert "not by Unsloth's exporter" in printed
    assert "written by llama.cpp's converter; read back: llama, 2 blocks, 2,059 tokens" in printed
    # The model was merged before, from this adapter, and is not merged again.
    assert "merging" not in printed


def test_without_any_exporter_there_is_a_reason(
    civil: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("LLAMA_CPP", "UNSLOTH_LLAMA_CPP_PATH"):
        monkeypatch.delenv(name, raising=False)
    said = refused(capsys, CIVIL, "export", "gguf", "--run", str(civil))
    assert "Unsloth's exporter: its llama.cpp is not built" in said
    assert "no convert_hf_to_gguf.py here; name your checkout of llama.cpp with --llama-cpp DIR or LLAMA_CPP" in said
    said = refused(capsys, CIVIL, "export", "gguf", "--run", str(civil), "--llama-cpp", str(tmp_path))
    assert f"--llama-cpp {tmp_path}: there is no convert_hf_to_gguf.py" in said
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path / "nowhere"))
    assert "LLAMA_CPP=" in refused(capsys, CIVIL, "export", "gguf", "--run", str(civil))
    assert "no file can be there" in refused(
        capsys, CIVIL, "export", "gguf", "--run", str(civil), "--out", str(tmp_path)
    )
    (tmp_path / "convert-hf-to-gguf").write_text("#!/bin/sh\n")
    (tmp_path / "convert-hf-to-gguf").chmod(0o755)
    monkeypatch.delenv("LLAMA_CPP")
    assert gguf_file.converter(None) == [str(tmp_path / "convert-hf-to-gguf")]
    assert gguf_file.unsloth_obstacle("float32", None) == "it converts 16-bit weights, and these are float32"


# The hub.


@dataclass
class Hub:
    """As much of the hub as an upload asks for, on this machine."""

    address: str = ""
    fails: dict[str, Any] = field(default_factory=dict)
    """Beginning of an endpoint's name -> status, or "drop" for a connection that breaks."""
    private: bool | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)

    def answer(self, path: str, body: bytes) -> Any:
        if path == "/api/repos/create":
            exists, asked = self.private is not None, json.loads(body)
            if not exists:
                self.private = asked.get("private", asked.get("visibility") == "private")
            return (409 if exists else 200, {"url": f"{self.address}/me/model"})
        if path == "/api/models/me/model":
            return (
                (404, {"error": "there is none"})
                if self.private is None
                else {"id": "me/model", "private": self.private, "siblings": [], "tags": [], "sha": "0" * 40}
            )
        if "/preupload/" in path:
            mode = {True: "lfs", False: "regular"}
            named = [file["path"] for file in json.loads(body)["files"]]
            return {
                "files": [
                    {"path": name, "uploadMode": mode[name.endswith("safetensors")], "shouldIgnore": False}
                    for name in named
                ]
            }
        if path.endswith("/objects/batch"):
            upload = {
                one["oid"]: {"upload": {"href": f"{self.address}/lfs/{one['oid']}"}}
                for one in json.loads(body)["objects"]
            }
            return {"objects": [{**one, "actions": upload[one["oid"]]} for one in json.loads(body)["objects"]]}
        if path.startswith("/lfs/"):
            self.blobs[path.removeprefix("/lfs/")] = body
            return {}
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.files[value["path"]] = self.blobs[value["oid"]]
            return {"commitUrl": f"{self.address}/me/model/commit/1", "commitOid": "1" * 40}
        if "/tree/" in path:
            return [
                {"type": "file", "path": name, "size": len(data), "oid": "2" * 40} for name, data in self.files.items()
            ]
        return {}


@pytest.fixture
def hub() -> Iterator[Hub]:
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def respond(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            state.calls.append(f"{self.command} {path}")
            state.tokens.add(self.headers.get("Authorization", ""))
            fault = next((what for part, what in state.fails.items() if part in path), None)
            if fault == "drop":
                self.close_connection = True
                return
            answer = (fault, {"error": "as this test wants it"}) if fault else state.answer(path, body)
            status, told = answer if isinstance(answer, tuple) else (200, answer)
            data = json.dumps(told).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_HEAD = respond

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that goes away is what some tests are about."""
            state.calls.append(f"broken: {sys.exc_info()[1]!r}")

    server = Server(("127.0.0.1", 0), Handler)
    state.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield state
    server.shutdown()
    server.server_close()


@pytest.fixture
def at_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """For commands in this process, in which the library has read its addresses already."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


def test_an_adapter_goes_to_the_hub_as_it_was_shown(civil: Path, hub: Hub, tmp_path: Path) -> None:
    """The real command, in a home of its own."""
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1",
        "HOME": str(tmp_path), "HF_HUB_OFFLINE": "0",
    }  # fmt: skip
    command = [sys.executable, "-m", "recipes.llama_1b_civil", "export", "hub", "--run", str(civil), "--to", "me/model"]
    done = subprocess.run([*command, "--yes"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown = set(re.findall(r"^ +[\d,]+ bytes  (\S+)$", done.stdout, re.M))
    assert shown == set(hub.files) > {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
    assert "to me/model, private:" in done.stdout
    assert f"uploaded {len(shown)} files: {hub.address}/me/model" in done.stdout
    assert hub.private is True
    assert hub.files["adapter_model.safetensors"] == (civil / "adapter" / "adapter_model.safetensors").read_bytes()
    assert hub.tokens == {f"Bearer {TOKEN}", ""}
    # Neither of this machine nor of its user: the base model lies in a folder here.
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "published"
    for name, data in hub.files.items():
        for secret in (TOKEN, str(civil.parent), str(tmp_path), str(Path.home())):
            assert secret.encode() not in data, name
    assert hashlib.sha256(hub.files["adapter_model.safetensors"]).hexdigest() in hub.blobs


def test_merged_weights_go_there_too(payments: Path, folder: Path, at_hub: Hub) -> None:
    shutil.copytree(folder / "codes", payments / "merged", dirs_exist_ok=True)
    run_command(
        OPERCODE, ["export", "hub", "--run", str(payments), "--to", "me/model", "--merged", "--public", "--yes"]
    )
    assert at_hub.private is False
    wanted = {"model.safetensors", "config.json", "classes.json", "export.json", "generation_config.json"}
    assert wanted <= set(at_hub.files)
    card = at_hub.files["README.md"].decode()
    assert "**This is not the real model.**" in card
    assert "tags: [random-weights, not-for-use]" in card
    assert "license:" not in card.partition("# ")[0]
    assert "greedy answers of 8 are the same" in card


@pytest.mark.parametrize(
    ("where", "what", "said"),
    [
        ("/repos/create", 401, "the hub does not take this access token (401)"),
        ("/repos/create", 403, "may not write there (403)"),
        ("/repos/create", "drop", "nothing was uploaded"),
        ("/lfs/", 400, "the upload broke off"),
        ("/commit/", 500, "the upload broke off: status 500"),
        ("/commit/", "drop", "the upload broke off"),
    ],
)
def test_an_upload_that_fails_is_one_line(
    where: str, what: Any, said: str, civil: Path, at_hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    at_hub.fails = {where: what} if what != 401 else {"": 401}
    line = refused(capsys, CIVIL, "export", "hub", "--run", str(civil), "--to", "me/model", "--yes")
    assert said in line
    assert "me/model" in line
    assert TOKEN not in line
    assert not at_hub.files


def test_a_hub_that_lost_a_file_is_noticed(civil: Path, at_hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    real = at_hub.answer
    at_hub.answer = lambda path, body: [] if "/tree/" in path else real(path, body)  # type: ignore[method-assign]
    line = refused(capsys, CIVIL, "export", "hub", "--run", str(civil), "--to", "me/model", "--yes")
    assert "the hub does not have README.md, adapter_config.json" in line


def test_nothing_goes_anywhere_unless_somebody_agrees(
    civil: Path, at_hub: Hub, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["export", "hub", "--run", str(civil), "--to", "me/model"]
    assert "there is no terminal to ask at; give --yes" in refused(capfd, CIVIL, *given)

    class Terminal:
        def isatty(self) -> bool:
            return True

        def readline(self) -> str:
            return self.line

        line = "\n"

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdin", terminal)
    run_command(CIVIL, given)
    assert "upload? [y/N] nothing was uploaded" in capfd.readouterr().out
    assert not at_hub.calls
    terminal.line = "y\n"
    run_command(CIVIL, given)
    assert "README.md" in at_hub.files


def test_what_is_public_already_gets_nothing_that_should_be_private(
    civil: Path, at_hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["export", "hub", "--run", str(civil), "--yes"]
    at_hub.private = False
    assert "it exists already and is public" in refused(capsys, CIVIL, *given, "--to", "me/model")
    assert not at_hub.files
    assert "say where to" in refused(capsys, CIVIL, *given)
    assert "--to a/b/c: " in refused(capsys, CIVIL, *given, "--to", "a/b/c")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "hf auth login" in refused(capsys, CIVIL, *given, "--to", "me/model")


def test_the_card_tells_what_the_run_tells(civil: Path) -> None:
    from recipes.stages.model_card import card

    source = export.open_source(CIVIL, civil)
    text = card(source, "me/model", None)
    data = json.loads((civil / "data" / "metadata.json").read_text())
    metrics = json.loads((civil / "metrics.json").read_text())["train"]
    machine = json.loads((civil / "environment.json").read_text())
    for wanted in (
        f"{data['rows']} rows from the recipe's own sample", "train 48", "| learning_rate | 0.01 |",
        "| quantization | 4bit |",
        f"| final loss | {metrics['final_loss']:.4g} |", machine["processor"], f"torch {machine['versions']['torch']}",
        "Ask as it was trained to be asked", "당신은 한국 민법을", "vllm serve", "library_name: peft",
        "법률 자문이 아닙니다",
    ):  # fmt: skip
        assert wanted in text, wanted
    # Another base model than the recipe's: its licence is not known here.
    assert "its licence is on its own page" in text
    assert "llama3.2" not in text


@pytest.mark.parametrize("name", RECIPES)
def test_every_base_models_licence_is_named_and_linked(name: str, civil: Path) -> None:
    from recipes.stages.model_card import card

    chosen = settle(recipe(name), "full")
    source = export.Source(recipe(name), Run(civil), chosen, choose("llama", "peft"), "none", 512)
    text = card(source, "me/model", None)
    licence, terms = recipe(name).base.licence, recipe(name).base.terms
    assert f"license: {licence}\n" in text
    assert f"base_model: {recipe(name).base.hub_id}\n" in text
    assert f"[{licence}]({terms})" in text
    for phrase in recipe(name).stop:
        assert f'"stop": ["{phrase}"]' in text
    if licence == "gemma":
        assert "Gemma is provided under and subject to the Gemma Terms of Use" in text


def test_the_client_of_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            message = {"role": "assistant", "content": "산책 가자 (답변 종료)"}
            data = json.dumps({"choices": [{"message": message}]}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    [code] = re.findall(r"```python\n(import json.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        exec(code.replace("localhost:8000", f"127.0.0.1:{server.server_address[1]}"), {})
    finally:
        server.shutdown()
        server.server_close()
    assert capsys.readouterr().out == "산책 가자\n"
    assert asked[0]["stop"] == [PERSONA.stop_phrase]
