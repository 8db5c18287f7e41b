"""The table of docs/reliability.md: what the soak killed, and what the tests of faults, numbers and files try."""

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any


TESTS = Path(__file__).parents[1]
BEGIN, END = "<!-- table: written by make soak -->\n", "<!-- end of the table -->\n"
WHAT = {
    "faults/test_faults.py": "kills at given steps, SIGTERM, a lost process, a full disk, two runs in one folder",
    "trainer/test_resume.py": "checkpoints that lost a file or its end; resuming behind every step",
    "hardening/test_numbers.py": "numbers: NaN, infinities, ties, scales from 1e-30 to 1e30, half precision",
    "hardening/test_bad_files.py": "malformed logs, embeddings, tasks, pools, configs and checkpoints",
    "hardening/test_large_records.py": "records and headers of any size",
    "hardening/test_fuzz.py": "parsers on changed files (hypothesis; hundreds of files each)",
    "hardening/test_hostile_files.py": "hostile files: code, traversal, links, markup, lying headers",
}


def count(file: str) -> tuple[int, int]:
    """How many cases a file of tests has that could be run here, and how many were handled."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / file)]
        subprocess.run([*command, f"--junitxml={report}"], cwd=TESTS.parent, check=False)
        suite = ET.parse(report).getroot()[0]
    bad = int(suite.attrib["failures"]) + int(suite.attrib["errors"])
    tried = int(suite.attrib["tests"]) - int(suite.attrib["skipped"])
    return tried, tried - bad


def rows(kills: list[dict[str, Any]]) -> list[tuple[str, int, int]]:
    """What was tried, how often, and how often it was handled; a run counts as all its kills."""
    table = []
    for soak in kills:
        stages = ", ".join(f"{stage} {n}" for stage, n in soak["stages"].items())
        one = f", {soak['of_one_worker']} of them of one worker alone" if soak["processes"] == 2 else ""
        what = f"kill -9 of {soak['processes']} process(es) at random moments ({stages}; "
        what += f"{soak['during_saves']} while something was saved{one})"
        table.append((what, soak["kills"], soak["kills_handled"]))
    return table + [(f"{what} (`tests/{file}`)", *count(file)) for file, what in WHAT.items()]


def write_table(page: Path, kills: list[dict[str, Any]]) -> bool:
    """Writes the table into a page, between its marks; whether all was handled."""
    found = rows(kills)
    lines = ["| what | tried | handled |", "| --- | ---: | ---: |", *(f"| {a} | {b} | {c} |" for a, b, c in found)]
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    page.write_text(before + BEGIN + "\n" + "\n".join(lines) + "\n\n" + END + rest.split(END)[1], encoding="utf-8")
    return all(tried == handled for _, tried, handled in found)
