"""The files of a saved report: figures that papers accept, and a page that a browser shows."""

import base64
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from example_assessment import example_assessment, make_plain

from lora_privacy.assess import plots
from lora_privacy.assess.figure_style import SERIES
from lora_privacy.assess.methods import ADDITIONS, METHODS

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FIGURES = {
    "areas",
    "attacks",
    "distances",
    "dynamics",
    "noise-ratio",
    "quantiles-flora",
    "quantiles-lora",
    "spectra-dp-lora+denoise",
    "training",
    "utility-privacy",
}


def test_every_figure_is_there_in_three_forms(saved: Path) -> None:
    """Fonts of the PDFs are embedded TrueType; the page shows the very same SVGs."""
    for name in FIGURES:
        pdf = (saved / "figures" / f"{name}.pdf").read_bytes()
        assert pdf.startswith(b"%PDF")
        assert b"/FontFile2" in pdf
        assert b"/Type3" not in pdf
        assert (saved / "figures" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        svg = (saved / "figures" / f"{name}.svg").read_bytes()
        assert b"<script" not in svg
    assert {path.stem for path in (saved / "figures").iterdir()} == FIGURES
    page = (saved / "report.html").read_text(encoding="utf-8")
    shown = {base64.b64decode(one) for one in re.findall(r"svg\+xml;base64,([^\"]+)\"", page)}
    assert shown == {(saved / "figures" / f"{name}.svg").read_bytes() for name in FIGURES}


def test_every_table_is_there_in_two_forms(saved: Path) -> None:
    names = {"privacy", "attacks", "membership", "secrets", "utility", "projection", "settings"}
    names |= {"layers-lora", "layers-flora"}
    found = {path.name for path in (saved / "tables").iterdir()}
    assert found == {f"{name}.{ending}" for name in names for ending in ("tex", "md")}
    assert json.loads((saved / "report.json").read_text())["methods"][0]["method"] == "full"


def test_the_same_numbers_draw_the_same_files() -> None:
    whole = example_assessment()
    small = replace(whole, methods=(make_plain("full", whole.config),))
    first, second = plots.draw_all(small), plots.draw_all(small)
    assert first == second
    assert set(first) == {"training", "utility-privacy"}


def test_series_differ_in_grey_too() -> None:
    """As many styles as methods; no two share a marker, or a line and a colour."""
    private = [method for method in METHODS if method.startswith("dp-")]
    assert len(SERIES) >= len(METHODS) + len(ADDITIONS)
    assert len(private) == 4
    assert len({marker for _, marker, _ in SERIES}) == len(SERIES)
    assert len({line for _, _, line in SERIES}) == len(SERIES)
    assert len({colour for colour, _, _ in SERIES}) == len(SERIES)


def _browse(page: Path, *options: str) -> tuple[str, str]:
    """The page's document after loading, and what the browser logged."""
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--enable-logging=stderr", "--log-level=0", "--virtual-time-budget=4000"]
    command += ["--disable-background-networking", f"--user-data-dir={page.parent}/profile"]
    done = subprocess.run(
        [*command, *options, page.as_uri()], capture_output=True, text=True, timeout=120
    )
    return done.stdout, done.stderr


# Runs inside a copy of the page, whose policy is taken out for it.
_MEASURE = """<script>addEventListener('load', () => {
  const wide = [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll') &&
    !e.closest('.skip') && e.getBoundingClientRect().right > innerWidth + 1).length;
  const images = [...document.images];
  const top = document.querySelector('.answer').getBoundingClientRect().bottom;
  parent.postMessage(JSON.stringify({width: innerWidth, wide, top,
    scroll: document.documentElement.scrollWidth,
    images: images.length, loaded: images.filter(i => i.naturalWidth > 0).length,
    fetched: performance.getEntriesByType('resource').filter(
      r => !r.name.startsWith('data:')).length}), '*');
});</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_shows_it_without_errors(saved: Path, tmp_path: Path, width: int) -> None:
    """Chromium: no error, nothing fetched, all figures shown, nothing wider than the window."""
    source = (saved / "report.html").read_text(encoding="utf-8")
    copy = re.sub(r"<meta http-equiv=Content-Security-Policy[^>]*>", _MEASURE, source)
    assert copy != source
    (tmp_path / "copy.html").write_text(copy, encoding="utf-8")
    (tmp_path / "frame.html").write_text(
        "<body><pre id=out>nothing</pre><script>addEventListener('message', e => "
        "document.getElementById('out').textContent = e.data)</script>"
        f"<iframe src=copy.html style='width:{width}px;height:900px;border:0'></iframe>"
    )
    dom, log = _browse(tmp_path / "frame.html", "--window-size=1400,1000")
    found = re.search(r"<pre id=\"out\">(.*?)</pre>", dom)
    assert found is not None, log
    seen = json.loads(found.group(1).replace("&quot;", '"'))
    assert seen["width"] == width
    assert seen["scroll"] <= width
    assert seen["wide"] == 0
    assert seen["images"] == seen["loaded"] == len(FIGURES)
    assert seen["fetched"] == 0
    assert seen["top"] < 900  # the answer is on the first screen
    assert "CONSOLE" not in log


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_the_policy_of_the_page_stops_nothing_of_its_own(saved: Path, tmp_path: Path) -> None:
    """The page itself: its policy refuses no figure and no style, and would refuse a script."""
    source = (saved / "report.html").read_text(encoding="utf-8")
    (tmp_path / "page.html").write_text(source, encoding="utf-8")
    _, log = _browse(tmp_path / "page.html")
    assert "CONSOLE" not in log
    broken = source.replace("<main>", "<main><script>document.title = 'run'</script>")
    (tmp_path / "broken.html").write_text(broken, encoding="utf-8")
    dom, log = _browse(tmp_path / "broken.html")
    assert "CONSOLE" in log
    assert "<title>run" not in dom
