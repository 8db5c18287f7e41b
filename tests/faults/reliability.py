"""The table of docs/reliability.md: what the soak killed, and what the tests of faults, numbers and files try."""

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any


TESTS = Path(__file__).parents[1]
BEGIN, END = "<!-- table: written by make soak -->\n", "<!-- end of the table -->\n"
WHAT = {  # what is tried: the tests that try it, less those that look after the tests themselves
    "kills at given steps, SIGTERM, a lost process or worker, a full disk, two runs in one folder": (
        ["faults/test_faults.py", "faults/test_frozen_model_faults.py"],
        "",
    ),
    "checkpoints that lost a file or its end; resuming behind every step": (["trainer/test_resume.py"], ""),
    "numbers: NaN, infinities, ties, scales from 1e-30 to 1e30, half precision": (["hardening/test_numbers.py"], ""),
    "malformed logs, embeddings, tasks, pools, configs and checkpoints": (
        ["hardening/test_bad_files.py"],
        "not corpus_is_large",
    ),
    "records and headers of any size, up to a gigabyte": (["hardening/test_large_records.py"], ""),
    "parsers on changed files (hypothesis; hundreds of files each)": (
        ["hardening/test_fuzz.py"],
        "not valid_before_they_are_changed",
    ),
    "hostile files: code, traversal, links, markup, lying headers": (
        ["hardening/test_hostile_files.py"],
        "not would_run_its_code and not spreadsheet",
    ),
    "pickles and damage in checkpoints of other programs": (["convert/test_checkpoint_files.py"], ""),
    "markup in the HTML report and on the demo page": (
        ["test_html_report.py", "demo/test_app.py", "demo/test_page.py"],
        "hostile or texts_stay_texts or nothing_comes_from_elsewhere",
    ),
}
Row = tuple[str, int, int, int]  # what, tried, handled, skipped


def count(files: list[str], which: str) -> tuple[int, int, int]:
    """How many cases tests have that were tried here, the slow ones among them; how many were handled, and skipped."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "", "-k", which]
        paths = [str(TESTS / file) for file in files]
        subprocess.run([*command, f"--junitxml={report}", *paths], cwd=TESTS.parent, check=False)
        suite = {name: int(value) for name, value in ET.parse(report).getroot()[0].attrib.items() if value.isdigit()}
    tried = suite["tests"] - suite["skipped"]
    return tried, tried - suite["failures"] - suite["errors"], suite["skipped"]


def rows(kills: list[dict[str, Any]]) -> list[Row]:
    """What was tried, how often, how often it was handled, and what could not be tried; a run counts as its kills."""
    table: list[Row] = []
    for soak in kills:
        stages = ", ".join(f"{stage} {n}" for stage, n in soak["stages"].items())
        one = f", {soak['of_one_worker']} of them of one worker alone" if soak["processes"] == 2 else ""
        what = f"kill -9 of {soak['processes']} process(es) at random moments ({stages}; "
        what += f"{soak['during_saves']} while something was saved{one})"
        table.append((what, soak["kills"], soak["kills_handled"], 0))
    for what, (files, which) in WHAT.items():
        places = ", ".join(f"`tests/{file}`" for file in files)
        table.append((f"{what} ({places})", *count(files, which)))
    return table


def write_table(page: Path, kills: list[dict[str, Any]]) -> bool:
    """Writes the table into a page, between its marks; whether all was handled."""
    found = rows(kills)
    lines = ["| what | tried | handled | skipped |", "| --- | ---: | ---: | ---: |"]
    lines += [f"| {' | '.join(map(str, row))} |" for row in found]
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    page.write_text(before + BEGIN + "\n" + "\n".join(lines) + "\n\n" + END + rest.split(END)[1], encoding="utf-8")
    return all(tried == handled > 0 for _, tried, handled, _ in found)
