import os
import pickle
from pathlib import Path

import pytest
import torch

from lever_grpo.cli import main
from lever_grpo.convert import read_checkpoint


class Command:
    """A pickle that creates a file when it is restored."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_pickle_that_runs_a_command_is_refused_and_not_run(tmp_path, capsys):
    made, path = tmp_path / "made", tmp_path / "a.ckpt"
    torch.save({"state_dict": {"query_proj.0.weight": torch.ones(2, 2)}, "callbacks": Command(made)}, path)
    with pytest.raises(ValueError, match=r"holds an object of (posix|nt).system .*restoring it would run code"):
        read_checkpoint(path)
    assert main(["convert", str(path), "--output_dir", str(tmp_path / "new")]) == 2
    message = capsys.readouterr().err
    assert "torch.save({'state_dict': checkpoint['state_dict']}" in message and "weights_only" not in message
    assert not made.exists() and not (tmp_path / "new").exists()
    torch.load(path, weights_only=False)  # the pickle is one that does what it says
    assert made.exists()


def test_a_plain_pickle_is_refused_and_not_run(tmp_path):
    made = tmp_path / "made"
    (tmp_path / "a.pth").write_bytes(pickle.dumps({"state_dict": Command(made)}, protocol=2))
    with pytest.raises(ValueError, match="would run code"):
        read_checkpoint(tmp_path / "a.pth")
    assert not made.exists()


def test_a_whole_model_is_refused_by_the_name_of_its_class(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="holds an object of torch.nn.modules.linear.Linear"):
        read_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_file_is_refused(zipped, share, tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"state_dict": {"a": torch.ones(100)}}, path, _use_new_zipfile_serialization=zipped)
    assert read_checkpoint(path).tensors["a"].sum() == 100
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"a\.pt (is no checkpoint, or a damaged one|holds .* \(or is damaged\))"):
        read_checkpoint(path)


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_another_kind_of_file_is_refused(name, tmp_path):
    (tmp_path / name).write_text("hello, this is a text")
    with pytest.raises(ValueError, match=f"{name} is no checkpoint, or a damaged one"):
        read_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.ones(2), "holds a Tensor; expected tensors by name"),
        ([torch.ones(2)], "holds a list; expected tensors by name"),
        ({}, "expected tensors by name, at the top or as state_dict, model_state_dict, model; found nothing"),
        ({"state_dict": {}}, "found nothing"),
        ({"weights": {"a": torch.ones(2)}, "epoch": 3}, "found other values: weights, epoch"),
        ({"module.a": torch.ones(2), "a": torch.ones(2)}, "two tensors named 'a' behind different prefixes"),
    ],
)
def test_another_layout_is_refused(content, message, tmp_path):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message):
        read_checkpoint(tmp_path / "a.pt")


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a\.pt: expected a checkpoint file, found none"):
        read_checkpoint(tmp_path / "a.pt")
    with pytest.raises(FileNotFoundError, match="found a folder"):
        read_checkpoint(tmp_path)


def test_prefixes_are_taken_off_in_any_order_and_encoders_keep_theirs(tmp_path):
    names = ["module.lever_lm.pointer_selector.a", "_orig_mod.model.lever_lm.lm_model.b", "lever_lm.img_model.model.c"]
    torch.save({"state_dict": {name: torch.ones(1) for name in names}}, tmp_path / "a.ckpt")
    assert list(read_checkpoint(tmp_path / "a.ckpt").tensors) == ["a", "lm_model.b", "img_model.model.c"]
