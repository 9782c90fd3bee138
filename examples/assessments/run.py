"""Assess MiniLM on three public data sets, and a causal language model on a fourth.

    python examples/assessments/run.py FOLDER [sst2 trec sms e2e]

FOLDER holds the data sets: docs/results-assessments.md says where they come from. Each run is
``lora-privacy assess --config``, with the settings beside this script; a finished one is not run
again. The tables of the page are made from what is kept in docs/reproduction.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path

import numpy as np

from lora_privacy.assess import AssessConfig, Assessment, assess
from lora_privacy.assess.config import read_settings
from lora_privacy.assess.report_tables import all_tables

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "docs" / "reproduction"
NAMES = ("sst2", "trec", "sms", "e2e")


def split_sms(folder: Path, work: Path) -> None:
    """2,000 messages to train on and 1,000 others, by a fixed shuffle, as files."""
    lines = (folder / "sms_spam/SMSSpamCollection").read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line]
    order = np.random.default_rng(0).permutation(len(lines))
    for name, rows in (("train", order[:2000]), ("dev", order[2000:3000])):
        text = "\n".join(lines[i] for i in rows)
        (work / f"sms-{name}.tsv").write_text(text + "\n", encoding="utf-8")


def kept(result: Assessment) -> dict[str, object]:
    """report.json without what is long: curves, quantiles and scores of single records."""
    data = result.to_dict()
    for method in data["methods"]:
        method["curve"]["losses"] = []
        for layer in method["layers"]:
            for long in ("observed", "expected", "normal"):
                layer["entry"][long] = []
        if method["membership"]:
            method["membership"]["curves"] = {}
    return data


def page_tables(result: Assessment) -> str:
    """The tables of docs/results-assessments.md, which a test holds against the results."""
    tables = all_tables(result)
    shown = [name for name in ("privacy", "attacks", "utility", "projection") if name in tables]
    return "\n\n".join(tables[name].markdown() for name in shown)


def main() -> None:
    """Run what is asked for, and print its tables."""
    parser = argparse.ArgumentParser(description="Assessments of public data sets.")
    parser.add_argument("data", type=Path)
    parser.add_argument("names", nargs="*", default=list(NAMES), metavar="|".join(NAMES))
    parser.add_argument("--output", type=Path, default=Path("reports/assessments"))
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    data = options.data.resolve()
    for name in options.names:
        if name == "sms":
            split_sms(data, options.output)
        settings = read_settings(HERE / f"{name}.toml")
        output = (options.output / name).resolve()
        # From the data's own folder, so that reports name no folder of this machine.
        with contextlib.chdir(options.output if name == "sms" else data):
            result = assess(
                AssessConfig.from_dict(settings), output, resume=True, overwrite=True,
                n_jobs=options.jobs,
            )  # fmt: skip
        path = RESULTS / f"assess-{name}.json"
        path.write_text(json.dumps(kept(result), indent=1, allow_nan=False) + "\n")
        print(f"\n{name}\n\n{page_tables(result)}", flush=True)


if __name__ == "__main__":
    main()
