"""Malformed files through the public entry points: a message that names file, record and rule, and nothing else."""

import json
import re
import time

import pytest
from corpus import (
    ALL,
    CHECKPOINTS,
    CONFIGS,
    EMBEDDINGS,
    LOGS,
    MODELS,
    POOLS,
    QUESTION,
    TASKS,
    VQA,
    lever_lm,
    lines,
    more_memory_than,
    row,
    scored,
    text,
)

from lever_grpo.cli import main
from lever_grpo.convert import read_checkpoint
from lever_grpo.data import BeamDataError, EmbeddingStore, load_beams, load_examples, load_vqa
from lever_grpo.models import load_selector


SECONDS = 20  # for what takes a tenth of one on an idle machine
MEMORY = 1 << 30


def each(cases):
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


@pytest.fixture
def refused(tmp_path, capsys):
    """Asserts that a call is refused as it should be, within bounds, twice, and that it wrote nothing."""

    def refused(case, call, error=(ValueError, OSError)):
        before = sorted(tmp_path.rglob("*"))
        for _ in range(2):  # the second time shows that nothing half done is taken for whole
            started = time.monotonic()
            with more_memory_than(MEMORY), pytest.raises(error, match=f"(?s){case.message}") as caught:
                call()
            assert time.monotonic() - started < SECONDS
            assert case.file in str(caught.value)
            assert len(str(caught.value)) < 2000
        after = [path for path in tmp_path.rglob("*") if path not in before and "cache" not in path.parts]
        halves = [path for path in tmp_path.rglob("*") if path.name.endswith(".incomplete") or ".writing" in path.name]
        assert not after and not halves

    return refused


@pytest.fixture
def command(capsys):
    """Asserts that a command refuses a file in one line, which the terminal can show, and with 2."""

    def command(case, *arguments):
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        (line,) = capsys.readouterr().err.strip().split("\n")
        assert line.startswith("lever-grpo: error: ") and case.file in line and line.isprintable()

    return command


def test_the_corpus_is_large_and_its_names_differ():
    assert len({case.name for case in ALL}) == len(ALL) > 150


@each(LOGS)
def test_logs(case, tmp_path, refused, command):
    path = case.write(tmp_path)
    refused(case, lambda: load_beams(path, cache_dir=tmp_path / "cache"), BeamDataError)
    with more_memory_than(MEMORY):
        command(case, "inspect", path)


@each(POOLS)
def test_pools(case, tmp_path, refused, command):
    path, log = case.write(tmp_path), tmp_path / "log.json"
    record = lever_lm()
    del record["candidate_ids"]
    log.write_text(text({"7": record}))
    refused(case, lambda: load_beams(log, candidate_pools=path, cache_dir=tmp_path / "cache"), BeamDataError)
    command(case, "inspect", log, "--pools", path)


@each(TASKS)
def test_tasks(case, tmp_path, refused):
    path = case.write(tmp_path)
    refused(case, lambda: load_examples(path), BeamDataError)


@each(VQA)
def test_vqa(case, tmp_path, refused):
    path, annotations = case.write(tmp_path), tmp_path / "annotations.json"
    annotations.write_text(text({"annotations": [{**QUESTION, "answers": [{"answer": "a dog"}]}]}))
    refused(case, lambda: load_vqa(path, annotations), BeamDataError)


def test_line_ends_of_windows_change_nothing(tmp_path):
    logs = {
        "lines": lines(scored(), scored(query_id=8)),
        "object": json.dumps({"7": lever_lm(), "8": lever_lm(8)}, indent=1),
        "array": json.dumps([scored(), scored(query_id=8)], indent=1),
    }
    for name, content in logs.items():
        groups = []
        for end in ("\n", "\r\n"):
            (tmp_path / name).write_bytes(content.replace("\n", end).encode())
            groups.append(load_beams(tmp_path / name, cache_dir=tmp_path / "cache").to_list())
        assert len(groups[0]) == 2 and repr(groups[0]) == repr(groups[1])
    (tmp_path / "task.jsonl").write_bytes(lines(row(), row(id=1)).replace("\n", "\r\n").encode())
    assert [example.id for example in load_examples(tmp_path / "task.jsonl")] == [0, 1]


@each(EMBEDDINGS)
def test_embeddings(case, tmp_path, refused, command):
    path, log = case.write(tmp_path), tmp_path / "log.json"
    log.write_text(text({"7": lever_lm()}))
    refused(case, lambda: EmbeddingStore.open(path), (BeamDataError, FileNotFoundError))
    command(case, "inspect", log, "--embeddings", path)


@each(CONFIGS)
def test_configs(case, tmp_path, command, capsys):
    path = case.write(tmp_path)
    names = ["train"] + ["generate", "evaluate"] * (case.name != "config_with_text_for_a_list")  # a recipe's argument
    for name in names:
        with more_memory_than(MEMORY):
            assert main([name, "--config", str(path), "--output_dir", str(tmp_path / "out")]) == 2
        line = capsys.readouterr().err
        assert str(path) in line and line.count("\n") == 1
        assert re.search(case.message, line), line
    assert not (tmp_path / "out").exists()


@each(MODELS)
def test_models(case, tmp_path, refused):
    path = case.write(tmp_path)
    refused(case, lambda: load_selector(path))


@each(CHECKPOINTS)
def test_checkpoints(case, tmp_path, refused, command):
    path = case.write(tmp_path)
    if case.name != "checkpoint_of_another_model":
        refused(case, lambda: read_checkpoint(path), ValueError)
    command(case, "convert", path, "--output_dir", tmp_path / "new")
    assert not (tmp_path / "new").exists()
