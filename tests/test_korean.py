"""What the Korean recipes make of the files they are given, and how one talks to them."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, recipe

from recipes.gemma3_1b_counsel import Dialogues
from recipes.llama_1b_civil import CASES, Questions
from recipes.stages.read import clean
from recipes.stages.recipe import Reading, UserError

COUNSEL, CIVIL, PERSONA = (recipe(name) for name in ("gemma3_1b_counsel", "llama_1b_civil", "polyglot_1_3b_ohlora"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("안녕<br>하세요", "안녕\n하세요"),
        ("<p>첫째</p><p class='x'>둘째</p>", "첫째\n둘째"),
        ("a &amp; b &lt;c&gt; &quot;d&quot;", 'a & b <c> "d"'),
        ("3 < 5 이고 7 > 2", "3 < 5 이고 7 > 2"),
        ("  여러   칸\t\t탭  \n\n\n\n 줄 ", "여러 칸 탭\n\n줄"),
        ("\u1112\u1161\u11ab\u1100\u1173\u11af", "한글"),
    ],
)
def test_text_from_web_pages(text: str, expected: str) -> None:
    assert clean(text) == expected


def dialogue(*roles: str, content: str = "말") -> str:
    return json.dumps({"messages": [{"role": role, "content": content} for role in roles]}, ensure_ascii=False)


BAD = {
    "not JSON": "{",
    "not a JSON object": "[1]",
    "no list under messages": '{"messages": 7}',
    "a turn without text": '{"messages": [{"role": "user", "content": null}]}',
    "empty text": dialogue("user", "assistant", content="<br> "),
    "unknown role 'model'": dialogue("user", "model"),
    "roles are not (system,) user, assistant, user, assistant …": dialogue("assistant", "user"),
}


def test_bad_lines_are_dropped_by_number(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    lines = [dialogue("system", "user", "assistant"), *BAD.values(), dialogue("user", "assistant", "user", "assistant")]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    reading = Reading(path)
    rows = list(COUNSEL.read(path, Dialogues(), reading))
    assert [len(row["messages"]) for row in rows] == [3, 4]
    assert reading.dropped == {fault: [number] for number, fault in enumerate(BAD, 2)}


@pytest.mark.parametrize("fault", BAD)
def test_strict_stops_at_a_bad_line(fault: str, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(f"{dialogue('user', 'assistant')}\n{BAD[fault]}\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        list(COUNSEL.read(path, Dialogues(strict=True), Reading(path)))
    assert f"d.jsonl: line 2: {fault}" in str(caught.value)


QA = [
    ("question", "answer", "category", "difficulty"),
    ("보증금을 못 받았어요", "내용증명을 보내세요", "전세사기", "초급"),
    ("보증금을 못 받았어요", "내용증명을 보내세요", "전세사기", "초급"),
    ("등기를 안 했는데 제 집인가요", "아직 소유자가 아닙니다", "부동산물권", "고급"),
    ("네?", "짧은 질문입니다", "전세사기", "초급"),
    ("", "질문이 없습니다", "전세사기", "초급"),
]


def written(tmp_path: Path, encoding: str) -> Path:
    path = tmp_path / "qa.csv"
    path.write_bytes("".join(",".join(row) + "\n" for row in QA).encode(encoding))
    return path


@pytest.mark.parametrize(
    ("encoding", "reported"),
    [("utf-8", "utf-8-sig"), ("utf-8-sig", "utf-8-sig"), ("cp949", "cp949"), ("euc-kr", "cp949"), ("utf-16", "utf-16")],
)
def test_encodings_of_korean_spreadsheets(encoding: str, reported: str, tmp_path: Path) -> None:
    reading = Reading(tmp_path)
    rows = list(CIVIL.read(written(tmp_path, encoding), Questions(), reading))
    assert [row["category"] for row in rows] == ["전세사기", "부동산물권"]
    assert reading.notes["encoding"] == reported
    assert reading.dropped == {"duplicate": [3], "shorter than 5 characters": [5], "empty text": [6]}


def test_only_some_categories_or_difficulties(tmp_path: Path) -> None:
    path = written(tmp_path, "utf-8")
    for options, expected in (
        (Questions(categories=("부동산물권",)), ["고급"]),
        (Questions(difficulties=("초급",)), ["초급"]),
        (Questions(categories=("전세사기", "부동산물권")), ["초급", "고급"]),
    ):
        assert [row["difficulty"] for row in CIVIL.read(path, options, Reading(path))] == expected
    with pytest.raises(UserError, match="no row has the category '상속'; there are 부동산물권, 전세사기"):
        list(CIVIL.read(path, Questions(categories=("상속",)), Reading(path)))


def test_the_fixed_questions_cover_the_field() -> None:
    for part in ("보증금 반환", "계약서 검토", "예방", "소유권", "담보물권", "취득시효", "일반"):
        assert sum(part in title for title in CASES) == 1


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of the persona, trained for a moment."""
    folder = tmp_path_factory.mktemp("talk")
    done = subprocess.run(
        [sys.executable, "-m", f"recipes.{PERSONA.name}", "train", "--backend", "peft", "--size", "tiny",
         "--max-steps", "8"],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


class Terminal:
    """A program in a pseudo-terminal, as somebody sits before it."""

    def __init__(self, folder: Path, *arguments: str):
        self.process, self.handle = self._open(folder, arguments)
        self.shown, self.at = "", 0

    def _open(self, folder: Path, arguments: tuple[str, ...]) -> tuple[subprocess.Popen[bytes], int]:
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb"},
            stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        return process, ours

    def until(self, text: str, seconds: float = 100) -> None:
        """Wait for this text behind what was waited for before."""
        end = time.monotonic() + seconds
        while (found := self.shown.find(text, self.at)) < 0:
            assert time.monotonic() < end, f"no {text!r} in {self.shown[self.at :]!r}"
            if select.select([self.handle], [], [], 0.2)[0]:
                try:
                    self.shown += os.read(self.handle, 65536).decode("utf-8", "replace")
                except OSError:
                    raise AssertionError(f"ended before {text!r}: {self.shown[self.at :]!r}") from None
        self.at = found + len(text)

    def type(self, line: str) -> None:
        os.write(self.handle, f"{line}\n".encode())


def test_a_conversation(talker: Path) -> None:
    terminal = Terminal(talker, f"recipes.{PERSONA.name}", "chat", "--max-new-tokens", "400", "--temperature", "0")
    terminal.until("/exit or Ctrl-D ends")
    terminal.until("> ")
    terminal.type("안녕, 오로라!")
    terminal.until("오로라!")
    # Ctrl-C while it answers, or just after: the program lives on and asks for the next line.
    terminal.until("\n")
    time.sleep(0.3)
    terminal.process.send_signal(signal.SIGINT)
    terminal.until("> ")
    terminal.type("/save")
    terminal.until("/save wants a file name")
    terminal.until("> ")
    terminal.type("/save talk.json")
    terminal.until("saved 2 messages to talk.json")
    terminal.until("> ")
    terminal.type("/sing")
    terminal.until("no command /sing")
    terminal.until("> ")
    terminal.type("/reset")
    terminal.until("forgotten")
    terminal.until("> ")
    terminal.type("/save none/talk.json")
    terminal.until("nothing was saved")
    terminal.until("> ")
    terminal.type("/exit")
    assert terminal.process.wait(60) == 0
    assert "답변 종료" not in terminal.shown
    saved = json.loads((talker / "talk.json").read_text(encoding="utf-8"))
    assert saved["messages"][0] == {"role": "user", "content": "안녕, 오로라!"}
    assert saved["messages"][1]["role"] == "assistant"
    assert saved["recipe"] == PERSONA.name
    assert "NOT" in saved["model"]
    assert saved["sampling"]["max_new_tokens"] == 400


def test_the_history_of_runs(talker: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"recipes.{PERSONA.name}", "runs", "--json"],
        cwd=talker, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    (line,) = json.loads(done.stdout)
    assert (line["state"], line["size"], line["backend"], line["steps"]) == ("trained", "tiny", "peft", 8)
    assert line["loss"] > 0
    assert line["seconds"] > 0
