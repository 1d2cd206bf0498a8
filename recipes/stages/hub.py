"""adapter/ or merged weights -> the hub, after it was shown what goes there and somebody said yes."""

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from recipes.stages import export
from recipes.stages.console import private, say, typed, write
from recipes.stages.export import Source
from recipes.stages.exported import with_phrase
from recipes.stages.model_card import card
from recipes.stages.recipe import UserError
from recipes.stages.run import read_json, write_json, write_whole

# Of an adapter's or a model's folder: whatever else may lie there was put there by somebody.
_BELONGS = (
    "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "classes.json", "config.json",
    "export.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", "tokenizer.json",
    "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "preprocessor_config.json",
    "processor_config.json",
)  # fmt: skip


def upload(source: Source, to: str, public: bool, merged: bool, yes: bool) -> None:
    repo = _checked(to)
    if not yes and not sys.stdin.isatty():
        raise UserError("export hub: it asks before it uploads, and there is no terminal to ask at; give --yes")
    folder = source.run.adapter
    if merged:
        folder = export.merged_before(source) or export.merged(source, None)
    with tempfile.TemporaryDirectory() as place:
        staged = Path(place) / "model"
        stage(source, folder, staged, repo, merged)
        show(staged, repo, public)
        if not yes and not _agreed():
            say("nothing was uploaded")
            return
        _send(staged, repo, public)


def _checked(to: str) -> str:
    if not to:
        raise UserError("export hub: say where to, as in --to you/model")
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(to)
    except HFValidationError as error:
        raise UserError(f"--to {to}: {' '.join(str(error).split())[:200]}") from None
    return to


def stage(source: Source, folder: Path, place: Path, repo: str, merged: bool) -> None:
    """What goes up, put together: nothing in it names this machine or its user."""
    place.mkdir()
    for pattern in _BELONGS:
        for path in sorted(folder.glob(pattern)):
            if path.suffix == ".safetensors":
                (place / path.name).symlink_to(path.resolve())
            else:
                shutil.copyfile(path, place / path.name)
    if (config := place / "adapter_config.json").is_file():
        write_json(config, {**read_json(config), "base_model_name_or_path": source.base_name})
    export.rewrite_tokenizer_config(place, {})
    if not merged and (template := place / "chat_template.jinja").is_file():
        write_whole(template, with_phrase(template.read_text(encoding="utf-8"), source.recipe.stop_phrase))
    about = read_json(folder / "export.json") if merged else None
    write_whole(place / "README.md", card(source, repo, about))
    for path in place.iterdir():
        if path.suffix in (".json", ".md", ".jinja"):
            text = path.read_text(encoding="utf-8")
            if (told := private(text)) != text:
                write_whole(path, told)


def show(folder: Path, repo: str, public: bool) -> None:
    say(f"to {repo}, {'PUBLIC: everybody can read it' if public else 'private'}:")
    total = 0
    for path in sorted(folder.iterdir()):
        size = path.stat().st_size
        total += size
        say(f"  {size:>14,} bytes  {path.name}")
    say(f"  {total:>14,} bytes in all")


def _agreed() -> bool:
    write("upload? [y/N] ")
    return str(typed().readline()).strip().lower() in ("y", "yes")


def _send(folder: Path, repo: str, public: bool) -> None:
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise UserError("export hub: there is no access token; hf auth login once, or HF_TOKEN in the environment")
    api = HfApi()
    try:
        repo = api.create_repo(repo, private=not public, exist_ok=True).repo_id
        hidden = api.repo_info(repo).private
    except Exception as error:
        raise UserError(f"{repo}: {_reason(error)}; nothing was uploaded") from error
    if not hidden and not public:
        raise UserError(
            f"{repo}: it exists already and is public; give --public, or another name. Nothing was uploaded"
        )
    if hidden and public:
        say(f"{repo} exists already and is private; it stays so until you change that on its page")
    wanted = {path.name for path in folder.iterdir()}
    try:
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload by export hub")
        there = set(api.list_repo_files(repo))
    except Exception as error:
        raise UserError(
            f"{repo}: the upload broke off: {_reason(error)}; the repository has no new version. "
            "Give the same command again"
        ) from error
    if missing := sorted(wanted - there):
        raise UserError(f"{repo}: the hub does not have {', '.join(missing)}; give the same command again")
    say(f"uploaded {len(wanted)} files: {api.endpoint}/{repo}")


def _reason(error: Any) -> str:
    """In one line, and without what the user keeps to themselves."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return "the hub does not take this access token (401); hf auth login again, or set another HF_TOKEN"
    if status == 403:
        return "this access token may not write there (403); take one with the role write"
    if type(error).__name__ == "OfflineModeIsEnabled":
        return "HF_HUB_OFFLINE is set; unset it to upload"
    words = " ".join(str(error).split()) or type(error).__name__
    return private(f"{f'status {status}, ' if status else ''}{words[:200]}")
