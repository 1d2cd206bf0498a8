"""What README tells people to type exists and is understood."""

import re
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, recipe

from fallback.choose import choose
from recipes.stages import cli, resume
from recipes.stages.base_model import model_type, settle
from recipes.stages.run import Run, write_json

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.partition("#")[0].strip() for line in re.findall(r"^    (.*(?:make |python -m ).*)$", README, re.M)]


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_make_targets(command: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{command.split()[1]}:", makefile, re.M)


@pytest.mark.parametrize("command", [c for c in COMMANDS if "python -m recipes." in c])
def test_recipe_commands_parse(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Through the real parser, with only the work behind it taken away."""
    words = shlex.split(command.partition("python -m recipes.")[2])
    name, given = words[0], words[1:]
    parsed: list[Any] = []

    class Parsed(Exception):
        pass

    if "--resume" in given:
        run, chosen = Run(tmp_path), settle(recipe(name), "tiny")
        write_json(run.config, {"base_model": chosen.stored(), "settings": asdict(recipe(name).settings)})
        choice = choose(model_type(recipe(name), chosen), "peft", "none")
        write_json(run.path / "choice.json", choice.as_json())
        begun = resume.begun(recipe(name), tmp_path)
        monkeypatch.setattr(resume, "begun", lambda recipe, path: begun)
    real = cli.parse

    def parse(*arguments: Any) -> Any:
        parsed.append(real(*arguments))
        raise Parsed

    monkeypatch.setattr(cli, "parse", parse)
    with pytest.raises(Parsed):
        cli.run_command(recipe(name), given)
    assert parsed


def test_links_into_the_repository() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_recipe_is_in_the_table() -> None:
    for path in (ROOT / "recipes").glob("*_*.py"):
        if path.stem != "__init__":
            assert f"`recipes.{path.stem}`" in README
