import re
from pathlib import Path

import pytest
import torch
from public_lever_plus import PUBLIC, WIDTH, public_selector
from safetensors.torch import save_file
from transformers import AutoModel

from lever_grpo.cli import main
from lever_grpo.convert import convert_checkpoint
from lever_grpo.models import LeverPlusSelector, load_selector


def saved(public, path, prefix="", key=None, **others):
    """A checkpoint as a trainer writes it: tensors by prefixed names, under `key` if any."""
    tensors = {f"{prefix}{name}": x for name, x in public.state_dict().items()}
    torch.save({key: tensors, **others} if key else tensors, path)
    return path


def heads_of(name):
    heads = PUBLIC[name].get("heads")
    return {"num_attention_heads": heads} if heads else {}


@torch.no_grad()
def assert_same_function(selector, public):
    query, pool = torch.randn(3, WIDTH), torch.randn(3, 7, WIDTH)
    sequences = torch.stack([torch.stack([torch.randperm(7)[:4] for _ in range(2)]) for _ in range(3)])
    output = selector(query, pool, sequences=sequences, return_step_log_probs=True)
    picks = selector.select(query, pool, num_shots=4).sequences
    for i in range(3):
        assert picks[i, 0].tolist() == public.greedy(query[i], pool[i], 4)
        for j in range(2):
            sequence = sequences[i, j].tolist()
            expected = public.logits(query[i], pool[i], sequence).log_softmax(-1)
            chosen = expected.gather(-1, sequences[i, j].unsqueeze(-1)).squeeze(-1)
            torch.testing.assert_close(output.log_probs[i, j], chosen, atol=1e-5, rtol=1e-5)
            probabilities = output.step_log_probs[i, j].exp()  # of what was picked, -100 is 0 as -inf is
            torch.testing.assert_close(probabilities, expected.exp(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_converted_selector_is_the_same_function(name, tmp_path):
    public = public_selector(name)
    path = saved(public, tmp_path / "last.ckpt", "lever_lm.pointer_selector.", "state_dict", epoch=3)
    conversion = convert_checkpoint(path, tmp_path / "new", **heads_of(name))
    assert conversion.family == f"Lever-Plus {PUBLIC[name]['version']}"
    assert conversion.num_weights == sum(p.numel() for p in public.parameters())
    selector = AutoModel.from_pretrained(tmp_path / "new")
    assert type(selector) is LeverPlusSelector and not selector.training
    assert_same_function(selector, public)


@pytest.mark.parametrize(
    ("prefix", "key"), [("", None), ("", "model_state_dict"), ("module.", "model"), ("model.", None)]
)
def test_every_layout_of_the_file_gives_the_same_selector(prefix, key, tmp_path):
    public = public_selector("v2-layers")
    convert_checkpoint(saved(public, tmp_path / "a.pt", prefix, key), tmp_path / "a")
    assert_same_function(load_selector(tmp_path / "a"), public)


def test_a_safetensors_file_in_half_precision_is_taken_as_it_is(tmp_path):
    public = public_selector("v1").half().float()
    save_file({name: x.half() for name, x in public.state_dict().items()}, tmp_path / "a.safetensors")
    convert_checkpoint(tmp_path / "a.safetensors", tmp_path / "a")
    selector = load_selector(tmp_path / "a")
    assert selector.dtype == torch.float32
    assert_same_function(selector, public)


def test_the_number_of_heads_matters_and_is_said_to_be_assumed(tmp_path):
    public = public_selector("v2-heads")
    path = saved(public, tmp_path / "a.pt")
    assumed = convert_checkpoint(path, tmp_path / "one").assumed
    assert assumed == ["1 attention head (--num_attention_heads)", "temperature 0.1 (--logit_temperature)"]
    with pytest.raises(AssertionError):
        assert_same_function(load_selector(tmp_path / "one"), public)


def test_options_come_from_the_file_where_it_has_them_and_from_the_caller_first(tmp_path):
    public = public_selector("v2-heads")
    public.temperature = 0.3
    options = {"num_heads": 2, "temperature": torch.tensor([0.3]), "dropout": 0.5}
    path = saved(public, tmp_path / "a.pt", key="model_state_dict", model_config=options)
    assert convert_checkpoint(path, tmp_path / "a").assumed == []
    assert_same_function(load_selector(tmp_path / "a"), public)
    given = convert_checkpoint(path, tmp_path / "b", num_attention_heads=3, logit_temperature=0.7).config
    assert (given.num_attention_heads, given.logit_temperature) == (3, 0.7)


@torch.no_grad()
def test_the_first_v3_on_v1s_network_keeps_its_query(tmp_path):
    public = public_selector("v1")
    path = saved(public, tmp_path / "a.pt", key="model_state_dict", model_config={"base_architecture": "v1"})
    assert convert_checkpoint(path, tmp_path / "a").config.pick_update == "none"
    selector, (query, pool) = load_selector(tmp_path / "a"), (torch.randn(1, WIDTH), torch.randn(1, 5, WIDTH))
    ranked = public.logits(query[0], pool[0], [0])[0].argsort(descending=True)
    assert torch.equal(selector.select(query, pool, num_shots=5).sequences[0, 0], ranked)


def test_encoders_are_left_out_and_named(tmp_path):
    public, prefix = public_selector("v2"), "lever_lm.pointer_selector."
    tensors = {f"{prefix}{name}": x for name, x in public.state_dict().items()}
    tensors["lever_lm.img_model.vision_model.post_layernorm.weight"] = torch.ones(3)
    tensors["lever_lm.sen_model.base_model.model.q_proj.lora_A.default.weight"] = torch.ones(2, 3)
    tensors["lever_lm.sen_adapter.weight"] = torch.ones(8, 8)
    torch.save({"state_dict": tensors}, tmp_path / "a.ckpt")
    assert convert_checkpoint(tmp_path / "a.ckpt", tmp_path / "a").left_out == [
        "CLIP's image encoder (img_model.*, 1 tensors); embeddings must come from it",
        "CLIP's text encoder, with LoRA (sen_model.*, 1 tensors); embeddings must come from it",
        "the trained layer behind the text encoder (sen_adapter.*, 1 tensors); embeddings must come from it",
    ]
    assert_same_function(load_selector(tmp_path / "a"), public)


def changed(name, **tensors):
    state = public_selector(name).state_dict() | tensors
    return {key: x for key, x in state.items() if x is not None}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (changed("v2", **{"attn_norm.bias": None}), r"Lever-Plus v2, but it also has attn_norm.bias"),
        (changed("v2-layers", **{"attn_norms.2.weight": None}), "also has attn_norms.2.weight"),
        (
            changed("v2-layers", **{"decoder_gru.bias_ih": torch.ones(18)}),
            r"v2 has no decoder_gru.bias_ih. Later Lever-Plus versions \(V4-2 and on\)",
        ),
        (changed("v1", **{"step_emb.weight": torch.ones(2, 8)}), "v1 has no step_emb.weight"),
        (
            changed("v1", **{"cand_proj.4.bias": torch.ones(7)}),
            r"cand_proj.4.bias has shape \(7,\), and in Lever-Plus v1 of its width \(8,\)",
        ),
        (changed("v2", **{"cross_attn.in_proj_weight": torch.ones(17, 6)}), r"in_proj_weight has shape \(17, 6\)"),
        (
            changed("v2", **{"input_proj.weight": torch.ones(8)}),
            r"input_proj.weight has shape \(8,\); expected a matrix",
        ),
        (changed("v2-gated", **{"query_update_gate.bias": None}), "also has query_update_gate.bias"),
        ({"encoder.weight": torch.ones(2)}, r"its tensors \(encoder.weight\) are of no selector that is known"),
        ({f"x{i}": torch.ones(1) for i in range(9)}, r"\(x0, x1, x2, x3, x4, x5 and 3 more\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tensors, message, tmp_path):
    torch.save(tensors, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=rf"a\.pt: .*{message}"):
        convert_checkpoint(tmp_path / "a.pt", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("v1", {"num_attention_heads": 2}, "num_attention_heads=2: Lever-Plus v1 has no attention"),
        ("v2", {"num_attention_heads": 4}, "hidden_dim=6 is not a multiple of num_attention_heads=4"),
        ("v2", {"num_attention_heads": 0}, "num_attention_heads=0: must be at least 1"),
        ("v2", {"logit_temperature": 0.0}, "logit_temperature=0.0: must be above 0"),
        ("v2", {"max_shots": 4}, "max_shots=4 is no option of Lever-Plus"),
    ],
)
def test_options_that_do_not_fit_are_refused(name, options, message, tmp_path):
    path = saved(public_selector(name), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(path, tmp_path / "new", **options)


# ---- the folder that is written ----


def test_an_earlier_model_stays_as_it_is_and_other_files_do_not_matter(tmp_path):
    path, folder = saved(public_selector("v1"), tmp_path / "a.pt"), tmp_path / "new"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    convert_checkpoint(path, folder)
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors", "notes.txt"]
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(ValueError, match=r"new' holds a model \(config.json, model.safetensors\); delete it or name"):
        convert_checkpoint(saved(public_selector("v2"), tmp_path / "b.pt"), folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_nothing_stays_of_a_model_whose_writing_fails(tmp_path, monkeypatch):
    def fail(self, folder):
        (tmp_path / "new").joinpath(folder, "model.safetensors").write_bytes(b"a part")
        raise OSError("no space left on device")

    monkeypatch.setattr(LeverPlusSelector, "save_pretrained", fail)
    with pytest.raises(OSError, match="no space left"):
        convert_checkpoint(saved(public_selector("v1"), tmp_path / "a.pt"), tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


# ---- the command ----


def test_the_command_says_what_it_did(tmp_path, capsys):
    public = public_selector("v2-heads")
    path = saved(public, tmp_path / "a.pt", key="model_state_dict")
    folder = tmp_path / "new"
    assert main(["convert", str(path), "--output_dir", str(folder), "--num_attention_heads", "2"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "recognised: Lever-Plus v2",
        "selector: lever_plus_selector, embeddings: embedding 8, 300 weights",
        "assumed, as the checkpoint does not say: temperature 0.1 (--logit_temperature)",
        str(folder),
    ]
    assert_same_function(load_selector(folder), public)


def test_the_command_refuses_with_one_line(tmp_path, capsys):
    path = saved(public_selector("v1"), tmp_path / "a.pt")
    assert main(["convert", str(path), "--output_dir", str(tmp_path / "a"), "--max_shots", "2"]) == 2
    assert main(["convert", str(tmp_path / "b.pt"), "--output_dir", str(tmp_path / "a")]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("lever-grpo: error: ") and "max_shots=2 is no option of Lever-Plus" in first
    assert second == f"lever-grpo: error: {tmp_path}/b.pt: expected a checkpoint file, found none."
    assert not (tmp_path / "a").exists()


def test_the_code_of_the_documentation_runs(tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parents[2] / "docs" / "convert.md").read_text(encoding="utf-8")
    convert, save = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    public = public_selector("v1")
    saved(public, tmp_path / "trusted.ckpt", key="state_dict", callbacks=Path("a"))  # a path is no plain value
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="holds an object of pathlib"):
        convert_checkpoint("trusted.ckpt", "outputs/lever_plus")
    exec(save, {})
    names: dict = {}
    exec(convert, names)
    assert "recognised: Lever-Plus v1" in capsys.readouterr().out
    assert_same_function(names["selector"], public)
    (command,) = re.findall(r"```bash\nlever-grpo (.*?)\n```", text)
    (tmp_path / "outputs").rename(tmp_path / "earlier")
    assert main(command.split()) == 0
    assert_same_function(load_selector("outputs/lever_plus"), public)
