"""A Lever-LM file from end to end; that the weights are those of the original: test_lever_lm.py."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lever_grpo import EmbeddingStore
from lever_grpo.cli import main
from lever_grpo.convert import convert_checkpoint
from lever_grpo.models import load_selector


ROWS, WIDTH = 7, 8


@pytest.fixture
def lm():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=ROWS + 3, n_embd=WIDTH, n_head=2, n_layer=2, n_positions=12)
    return GPT2LMHeadModel(config).eval()


@pytest.fixture
def path(lm, tmp_path):
    tensors = {f"lever_lm.lm_model.{name}": x for name, x in lm.state_dict().items()}
    torch.save({"state_dict": tensors, "hyper_parameters": {"lr": 1e-4}}, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


@torch.no_grad()
def test_the_embeddings_are_stored_beside_the_selector_that_reads_them(lm, path, tmp_path, capsys):
    folder = tmp_path / "new"
    flags = ["--num_attention_heads", "2", "--query_features", "text", "--max_shots", "3"]
    assert main(["convert", str(path), "--output_dir", str(folder), *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "recognised: Lever-LM" and lines[-1] == str(folder)
    assert "embeddings.safetensors: token, 7 x 8" in lines
    assert "assumed, as the checkpoint does not say: candidate_features none (--candidate_features)" in lines
    assert not any("num_attention_heads" in line or "query_features" in line for line in lines)

    store, selector = EmbeddingStore.open(folder / "embeddings.safetensors"), load_selector(folder)
    candidates = torch.from_numpy(store.gather(range(ROWS), list(selector.config.candidate_features)))
    query = torch.randn(1, WIDTH)
    picks = selector.select(query, candidates, num_shots=3).sequences[0, 0].tolist()
    ids, expected = [ROWS + 1, ROWS + 2], []  # the beginning, the query
    for _ in range(3):
        inputs = lm.transformer.wte(torch.tensor([ids]))
        inputs[0, 1] += query[0]
        logits = lm(inputs_embeds=inputs).logits[0, -1, :ROWS]
        logits[expected] = -torch.inf
        expected.append(int(logits.argmax()))
        ids.append(expected[-1])
    assert picks == expected


def test_options_of_the_other_family_are_refused(path, tmp_path):
    with pytest.raises(
        ValueError, match="logit_temperature=0.5 is no option of Lever-LM, which this is; leave it out"
    ):
        convert_checkpoint(path, tmp_path / "new", logit_temperature=0.5)


def test_what_the_converter_refuses_names_the_file(path, tmp_path):
    with pytest.raises(ValueError, match=r"last\.ckpt: max_shots=11, but the model has 12 positions"):
        convert_checkpoint(path, tmp_path / "new", num_attention_heads=2, max_shots=11)
    assert not (tmp_path / "new").exists()
