"""What a log is made of and with: rows that cannot be used, embeddings that are kept, models that are known again."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image
from safetensors.torch import save_file
from small_clip import make_clip, make_processor, png
from small_language_models import TOKENIZER
from test_generate import Known, interrupted_at, make, write_rows
from transformers import AutoModelForImageTextToText, AutoTokenizer

from lever_grpo.data import BeamDataError
from lever_grpo.pipeline.frozen_model import make_scorer
from lever_grpo.pipeline.generate import GenerateArguments, GenerationStopped, generate
from lever_grpo.pipeline.generate_folder import model_digest


@pytest.fixture
def task(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_rows(path, [{"id": i, "question": f"what is {i}?", "answers": [f"{i % 5}"]} for i in range(30)])
    return str(path)


# ---- rows that cannot be used ----


@pytest.fixture(scope="module")
def vision_language_model(tmp_path_factory):
    """With a NaN in the embedding of the letter ~, which only the text of a row that holds it meets."""
    pytest.importorskip("torchvision")
    from small_vision_language import save_vision_language_model

    folder = tmp_path_factory.mktemp("models") / "tiny-vl"
    save_vision_language_model(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[AutoTokenizer.from_pretrained(folder)("~").input_ids] = float("nan")
    model.save_pretrained(folder)
    return folder


def test_whatever_goes_wrong_is_named_with_its_reason(vision_language_model, tmp_path):
    folder, output = tmp_path / "task", tmp_path / "out"
    folder.mkdir()
    Image.new("RGB", (28, 28), "red").save(folder / "red.png")
    (folder / "broken.png").write_bytes(b"no image")
    rows = [{"id": i, "question": f"what is {i}?", "answers": ["a"], "image": "red.png"} for i in range(12)]
    rows[1]["image"] = rows[10]["image"] = "broken.png"
    rows[2]["answers"] = ["\u200b"]  # nothing is left of it in the tokens
    rows[3]["question"] = rows[9]["question"] = "long " * 60
    rows[5]["question"] = "what is ~?"
    write_rows(folder / "rows.jsonl", rows)
    pools = {0: [6, 7, 8], 1: [6, 7, 8], 2: [6, 7, 8], 3: [6, 7, 8], 4: [6], 5: [6, 7, 8], 11: [6, 9, 7, 10]}
    (tmp_path / "pools.json").write_text(json.dumps(pools))
    options = {"scorer": "vision_language", "model": str(vision_language_model), "device": "cpu", "max_length": 200}
    options |= {"candidate_pools": str(tmp_path / "pools.json"), "query_ids": list(pools), "num_queries": None}
    arguments = make(str(folder / "rows.jsonl"), output, batch_queries=4, random_sequences=0, judge="none", **options)
    records = {r["query_id"]: r for r in map(json.loads, generate(arguments).read_text().splitlines())}

    assert records.keys() == {0, 11}  # the others have no score, and these have nothing but numbers
    assert all(np.isfinite(record["scores"]).all() for record in records.values())
    assert [len(records[query]["sequences"]) for query in (0, 11)] == [3 + 6, 2 + 2]
    report = json.loads((output / "failures.json").read_text())
    skipped = {f["query_id"]: (f["kind"], f["reason"]) for f in report["failures"] if f["skipped"]}
    assert {query: kind for query, (kind, _) in skipped.items()} == {
        1: "value", 2: "value", 3: "value", 4: "pool", 5: "value",
    }  # fmt: skip
    assert "its image cannot be read: UnidentifiedImageError" in skipped[1][1]
    assert skipped[2][1] == "no usable score of zero-shot: the answer '\\u200b' has no tokens"
    assert "tokens with the answer, more than max_length=200" in skipped[3][1]
    assert skipped[4][1] == "a pool of 1 is too small for 2 shots"
    assert "NaN or infinite log-probabilities" in skipped[5][1]
    assert report["skipped_by_kind"] == {"pool": 1, "value": 4} and report["skipped_queries"] == 5
    # of query 11, what holds the long or the broken demonstration
    of_sequence = {tuple(s): f["reason"] for f in report["failures"] if f["query_id"] == 11 for s in f["sequences"]}
    assert report["failed_sequences"] == len(of_sequence) == records[11]["notes"]["failed"] == 6
    for sequence, reason in of_sequence.items():
        wanted = {9: "more than max_length=200", 10: "the image of demonstration 10 cannot be read"}
        assert any(text in reason for row, text in wanted.items() if row in sequence), (sequence, reason)


def test_a_blank_answer_refuses_the_task_file_by_name(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_rows(path, [{"id": 0, "question": "a?", "answers": ["a"]}, {"id": 1, "question": "b?", "answers": [" "]}])
    with pytest.raises(BeamDataError, match=r"line 2, field 'answers\[0\]': expected text that is not blank"):
        generate(make(str(path), tmp_path / "out"), Known())
    assert not (tmp_path / "out" / "shards").exists()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A task with images, of which those of rows 3 and 7 are broken, and a tiny CLIP."""
    folder = tmp_path_factory.mktemp("pictures")
    make_clip().save_pretrained(folder / "clip")
    make_processor().save_pretrained(folder / "clip")
    for i, rgb in enumerate(np.random.default_rng(0).random((12, 3))):
        (folder / f"{i}.png").write_bytes(b"no image" if i in (3, 7) else png(*rgb))
    rows = [{"id": i, "question": f"what is {i}?", "answers": ["a"], "image": f"{i}.png"} for i in range(12)]
    write_rows(folder / "rows.jsonl", rows)
    return folder


def images_of(pictures, output, **options) -> GenerateArguments:
    options |= {"sampler": "image_sim", "image_encoder": str(pictures / "clip"), "num_queries": None}
    return make(str(pictures / "rows.jsonl"), output, query_ids=[1, 2, 3, 4], **options)


def test_broken_images_leave_the_pools(pictures, tmp_path):
    log = generate(images_of(pictures, tmp_path / "out"), Known())
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [record["query_id"] for record in records] == [1, 2, 4]
    assert all(len(r["candidate_ids"]) == 6 and not {3, 7} & set(r["candidate_ids"]) for r in records)
    report = json.loads((tmp_path / "out" / "failures.json").read_text())
    ((query, kind, reason),) = [(f["query_id"], f["kind"], f["reason"]) for f in report["failures"]]
    assert (query, kind) == (3, "pool") and reason.startswith("its image cannot be read: UnidentifiedImageError")
    assert report["skipped_by_kind"] == {"pool": 1} and report["unreadable_images"].keys() == {"3", "7"}
    # the pools of the others are those of a task without the two rows
    whole = tmp_path / "whole.jsonl"
    lines = (pictures / "rows.jsonl").read_text().splitlines(keepends=True)
    whole.write_text("".join(line.replace('"image": "', f'"image": "{pictures.name}/')
                             for i, line in enumerate(lines) if i not in (3, 7)))  # fmt: skip
    (tmp_path / pictures.name).symlink_to(pictures)
    again = replace(images_of(pictures, tmp_path / "again"), task_file=str(whole), query_ids=[1, 2, 4])
    pools = [[json.loads(line)["candidate_ids"] for line in path.read_text().splitlines()]
             for path in (log, generate(again, Known()))]  # fmt: skip
    assert pools[0] == pools[1]


@pytest.mark.parametrize("kept", [False, True])
def test_nothing_is_encoded_twice(pictures, tmp_path, monkeypatch, kept):
    output = tmp_path / "out"
    options = {"cache_dir": str(tmp_path / "kept")} if kept else {}
    options |= {"sampler": "mix", "ratios": ["image_sim=0.5", "text_sim=0.5"], "text_encoder": str(pictures / "clip")}
    arguments = replace(images_of(pictures, output), **options)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted_at("pools.jsonl"))
        with pytest.raises(KeyboardInterrupt):
            generate(arguments, Known())
    undisturbed = generate(replace(arguments, output_dir=str(tmp_path / "undisturbed"), cache_dir=None), Known())

    def refuse(*arguments, **options):
        raise AssertionError("encoded again")

    monkeypatch.setattr("lever_grpo.search.encoders.encode_images", refuse)
    monkeypatch.setattr("lever_grpo.search.encoders.encode_texts", refuse)
    assert generate(arguments, Known()).read_bytes() == undisturbed.read_bytes()
    assert not (output / "cache").exists()  # what was kept for the pools alone goes with them
    other = replace(arguments, output_dir=str(tmp_path / "other"), seed=1)
    if kept:
        generate(other, Known())
    # other rows or another encoder are not taken from there
    with pytest.raises(AssertionError, match="encoded again"):
        generate(replace(other, overwrite=True, image_encoder=None if not kept else other.image_encoder,
                         text_encoder_revision="other"), Known())  # fmt: skip


# ---- models ----


def test_options_reach_the_scorer(vision_language_model, tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    options = {"server_batch_size": 5, "server_concurrency": 2, "server_timeout": 7.5, "tokenizer": str(tmp_path)}
    arguments = make(None, tmp_path, scorer="vllm", url="http://localhost:1", model="served", **options)
    scorer = make_scorer(arguments, PartialState())
    assert (scorer.batch_size, scorer.concurrency, scorer.timeout) == (5, 2, 7.5)
    pixels = {"min_pixels": 4 * 28**2, "max_pixels": 9 * 28**2}
    options = {"scorer": "vision_language", "model": str(vision_language_model), "device": "cpu"}
    scorer = make_scorer(make(None, tmp_path, **options, **pixels), PartialState())
    assert scorer.describe()["image_size"] == {"shortest_edge": 4 * 28**2, "longest_edge": 9 * 28**2}


@pytest.mark.parametrize("name", ["model", "text_encoder"])
def test_other_weights_in_the_same_folder_are_refused(task, tmp_path, name):
    folder = tmp_path / "model"
    make_clip().save_pretrained(folder)
    make_processor().save_pretrained(folder)
    arguments = make(task, tmp_path / "out", **{name: str(folder)})
    log = generate(arguments, Known())
    size = (folder / "model.safetensors").stat().st_size
    make_clip(seed=1).save_pretrained(folder)
    assert (folder / "model.safetensors").stat().st_size == size
    with pytest.raises(ValueError, match=f"inputs.{name}: "):
        generate(arguments, Known())
    make_clip().save_pretrained(folder)
    (folder / "README.md").write_text("nothing that scores depend on")
    assert generate(arguments, Known()) == log


@pytest.mark.parametrize("tensors", [1, 3])
def test_a_changed_layer_of_a_large_file_is_noticed(tmp_path, tensors):
    weights = {f"layer{i}": torch.zeros(300, 300) for i in range(tensors)}  # 360 KB each
    save_file(weights, tmp_path / "model.safetensors")
    before = model_digest(tmp_path)
    for i in range(tensors):
        save_file(weights | {f"layer{i}": torch.ones(300, 300)}, tmp_path / "model.safetensors")
        assert model_digest(tmp_path) != before
    save_file(weights, tmp_path / "model.safetensors")
    assert model_digest(tmp_path) == before


def test_other_embeddings_are_refused(task, tmp_path):
    values = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    for source in (tmp_path / "folder", tmp_path / "question.npy"):
        file = source if source.suffix else source / "question.npy"
        file.parent.mkdir(exist_ok=True)
        np.save(file, values)
        arguments = make(task, tmp_path / f"of_{source.name}", embeddings=str(source), sampler="text_sim")
        log = generate(arguments, Known())
        np.save(file, values[::-1])
        with pytest.raises(ValueError, match="inputs.embeddings: "):
            generate(arguments, Known())
        np.save(file, values)
        assert generate(arguments, Known()) == log


def test_a_log_of_an_earlier_version_goes_on(task, tmp_path):
    np.save(tmp_path / "question.npy", np.eye(30, dtype=np.float32))
    arguments = make(task, tmp_path / "out", embeddings=str(tmp_path / "question.npy"))
    with pytest.raises(GenerationStopped):
        generate(replace(arguments, max_hours=0.0), Known())
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    del settings["inputs"]["embeddings"], settings["arguments"]["text_encoder_revision"]
    (tmp_path / "out" / "settings.json").write_text(json.dumps(settings))
    assert generate(arguments, Known()).exists()
