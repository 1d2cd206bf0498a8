"""The comparison's HTML page in a real browser: nothing runs in it, nothing sticks out of it, light and dark."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from test_compare import ENVIRONMENT, rows_of, summary_of

from bench import report

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NASTY = "<script>window.hacked=1</script>\"'><img src=x onerror=window.hacked=1>"
# Appended by the test: the page has no script of its own.
ASK = """<script>document.title = JSON.stringify({
    hacked: window.hacked === 1, wide: document.documentElement.scrollWidth, window: innerWidth,
    figures: document.querySelectorAll('svg').length, colour: getComputedStyle(document.body).backgroundColor,
    outside: performance.getEntriesByType('resource').length,
    cut: [...document.querySelectorAll('svg text')].filter(t => {
        const box = t.getBBox(), all = t.ownerSVGElement.viewBox.baseVal;
        return box.x < -1 || box.x + box.width > all.width + 1 || box.y + box.height > all.height + 1;
    }).map(t => t.textContent),
})</script></body>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if BROWSER is None:
        pytest.skip("no Chromium here (Debian: apt-get install chromium): the page was not looked at")
    rows = rows_of(slower=0.7, reason=NASTY)
    for row in rows:
        row["recipe"] = NASTY
        if "notice" in row:
            row["notice"] = row["model"] = NASTY
            row["proof"] = {"patched": {NASTY: 2}}
    summary = summarise_nasty(rows)
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(report.as_html(summary, rows).replace("</body>", ASK), encoding="utf-8")
    return file


def summarise_nasty(rows: list[dict[str, Any]]) -> dict[str, Any]:
    gpu = {"name": NASTY, "memory_bytes": 2**34, "driver": NASTY}
    return {**summary_of(rows), "command": NASTY, "environment": {**ENVIRONMENT, "gpu": gpu, "processor": NASTY}}


PLANTED = [
    NASTY, "</style><script>window.hacked=1</script>", "</title></h2></td></svg><script>window.hacked=1</script>",
    "'><svg onload=window.hacked=1>", "javascript:window.hacked=1", "`${window.hacked=1}`",
    "<style>*{display:none}</style>",
    "<base href=http://127.0.0.1/>", "]]><iframe srcdoc='<script>parent.hacked=1</script>'>",
]  # fmt: skip


def planted(value: Any, what: str) -> Any:
    """The same with `what` in every text: recipes, arms, models, files, versions, reasons, the tail of a log."""
    if isinstance(value, dict):
        return {name: one if name == "status" else planted(one, what) for name, one in value.items()}
    if isinstance(value, list):
        return [planted(one, what) for one in value]
    return f"{value}{what}" if isinstance(value, str) else value


def test_nothing_planted_in_any_text_runs_or_becomes_an_element(tmp_path: Path) -> None:
    if BROWSER is None:
        pytest.skip("no Chromium here (Debian: apt-get install chromium): the page was not looked at")
    rows, what = rows_of(slower=0.7, reason=NASTY), "".join(PLANTED)
    summary = planted(summarise_nasty(rows), what)
    summary["environment"]["versions"] = dict.fromkeys(PLANTED, what)
    for recipe in summary["recipes"]:
        for arm in recipe["arms"]:
            arm["patched"] = dict.fromkeys(PLANTED, 1)
    rows = planted([{**row, "tail": [NASTY]} for row in rows], what)
    sound = report.as_html(summary_of(rows_of(slower=0.7)), rows_of(slower=0.7))
    elements = "JSON.stringify({hacked: window.hacked === 1, there: [...new Set([...document.querySelectorAll('*')]"
    elements += (
        ".map(e => e.localName))].sort(), odd: document.querySelectorAll('[href],[src],[onload],[onerror]').length})"
    )
    found = []
    for name, page in (("sound", sound), ("planted", report.as_html(summary, rows))):
        file = tmp_path / f"{name}.html"
        file.write_text(
            page.replace("</body>", f"<script>document.title = {elements}</script></body>"), encoding="utf-8"
        )
        found.append(seen(file, 1280, dark=False))
    assert what in html.unescape(report.as_html(summary, rows)), "it was not planted at all"
    assert not found[1]["hacked"]
    assert found[1]["odd"] == 0
    assert found[1]["there"] == found[0]["there"]


def seen(page: Path, width: int, dark: bool) -> dict[str, Any]:
    assert BROWSER is not None
    done = subprocess.run(
        [
            BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--dump-dom",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--user-data-dir={page.parent}/{width}{dark}",
            page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.S)
    assert title, done.stderr[-2000:]
    return json.loads(html.unescape(title.group(1)))


@pytest.mark.parametrize("width", [500, 1280], ids=["phone", "desktop"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page(page: Path, width: int, dark: bool) -> None:
    found = seen(page, width, dark)
    assert not found["hacked"], "text of a recipe, model or GPU ran as a script"
    assert found["wide"] <= found["window"], "it has to be scrolled sideways"
    assert found["figures"] == 4
    assert found["outside"] == 0, "it fetches something"
    assert found["cut"] == []
    lightness = sum(map(int, re.findall(r"\d+", found["colour"])[:3]))
    assert (lightness < 150) if dark else (lightness > 600)
