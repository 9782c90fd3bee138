"""LaTeX itself sets the tables, where it is installed: pdflatex without any package."""

import shutil
import subprocess
from pathlib import Path

import pytest
from example_assessment import HOSTILE, example_assessment

from lora_privacy.assess.escaping import latex_text
from lora_privacy.assess.latex import latex_table
from lora_privacy.assess.report_tables import all_tables

pytestmark = pytest.mark.skipif(not shutil.which("pdflatex"), reason="needs pdflatex")

_HEAD = r"""\documentclass{article}
\setlength\paperwidth{200in}\setlength\pdfpagewidth{200in}\setlength\textwidth{199in}
\begin{document}
"""


def set_by_latex(body: str, folder: Path) -> str:
    """What pdflatex says of ``body``; AssertionError if it stops."""
    (folder / "t.tex").write_text(f"{_HEAD}{body}\n\\end{{document}}\n", encoding="ascii")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape"]
    done = subprocess.run([*command, "t.tex"], cwd=folder, capture_output=True, check=False)
    log = (folder / "t.log").read_text(encoding="latin-1")
    assert done.returncode == 0, log[-2_000:]
    return log


def test_every_table_of_a_report_compiles(tmp_path: Path) -> None:
    tables = all_tables(example_assessment()).values()
    log = set_by_latex("\n\n".join(map(latex_table, tables)), tmp_path)
    assert "Missing character" not in log


def test_every_character_compiles(tmp_path: Path) -> None:
    """Each of the first 12,288, and text that means harm, in a cell of its own."""
    texts = [*(f"x{chr(code)}y" for code in range(0x3000)), *HOSTILE]
    log = set_by_latex("\n\n".join(map(latex_text, texts)), tmp_path)
    assert "Missing character" not in log
    assert "/etc/passwd" not in log


def test_the_check_sees_what_does_not_compile(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="Undefined control sequence"):
        set_by_latex(r"\nothing", tmp_path)
