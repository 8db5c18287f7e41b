"""A small task that can be embedded anew, two selectors on it, and a tiny language model that answers."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from small_language_models import TOKENIZER, llama

from lever_grpo import PointerSelector, PointerSelectorConfig
from lever_grpo.data import Example
from lever_grpo.scorers import PromptTemplate
from lever_grpo.scorers.causal_lm import CausalLMScorer
from lever_grpo.search.features import FeatureEncoder, FeatureMap, load_encoders, save_encoders


ROWS, QUERIES, POOL, WIDTH = 24, 4, 6, 8
HOSTILE = "</p><img src=x onerror=\"document.title='broken'\"><script>alert(1)</script> {{ 7 * 7 }} ${value} &amp;"
COLOURS = ("red", "green", "blue")


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> dict:
    """Arguments of a task. Queries are the first rows, pools are of the others; some texts are hostile."""
    folder = tmp_path_factory.mktemp("demo")
    questions = [HOSTILE if i in (1, 12) else f"colour {i}?" for i in range(ROWS)]
    rows = [{"id": i, "question": text, "answers": [COLOURS[i % 3]]} for i, text in enumerate(questions)]
    rows[5]["answers"] = ["<i>blue</i>"]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    llama().save_pretrained(folder / "llama")
    TOKENIZER.save_pretrained(folder / "llama")
    encoder = FeatureEncoder("hidden_states", "{question}", str(folder / "llama"), layers=(1, 2))
    raw = encoder([Example(i, text, ("?",)) for i, text in enumerate(questions)])
    # as checkpoints have it: directions are kept in float16, and embeddings are made with these
    save_encoders(folder, {"question": encoder}, {"question": FeatureMap.fit(raw, width=WIDTH, standardise=True)})
    embeddings = {"question": load_encoders(folder)[1]["question"](raw).astype(np.float16)}
    embeddings["answer"] = np.random.default_rng(1).standard_normal((ROWS, 3)).astype(np.float16)
    save_file(embeddings, str(folder / "rows.safetensors"))
    with open(folder / "log.jsonl", "w") as log:
        for query in range(QUERIES):
            pool = [QUERIES + (query + 7 * i) % (ROWS - QUERIES) for i in range(POOL)]
            pairs = [[i, j] for i in range(POOL) for j in range(POOL) if i != j]
            record = {"query_id": query, "candidate_ids": pool, "sequences": pairs}
            log.write(json.dumps(record | {"scores": [float(i - j) for i, j in pairs]}) + "\n")
    widths = {"query_features": {"question": WIDTH}, "candidate_features": {"question": WIDTH, "answer": 3}}
    for seed, name in enumerate(("sft", "grpo")):
        torch.manual_seed(seed)
        config = PointerSelectorConfig(**widths, hidden_dim=16, dropout=0.0, stop=name == "grpo", max_shots=4)
        PointerSelector(config).save_pretrained(folder / name)
    return {
        "task_file": str(folder / "rows.jsonl"),
        "log": str(folder / "log.jsonl"),
        "embeddings": str(folder / "rows.safetensors"),
        "query_features": ["question"],
        "candidate_features": ["question", "answer"],
        "num_shots": [1, 2],
        "sft": str(folder / "sft"),
        "grpo": str(folder / "grpo"),
        "model": str(folder / "llama"),
        "answers": [*COLOURS, "<i>blue</i>"],
        "question_template": "{question}: ",
        "answer_template": "{answer}",
        "separator": "",
        "device": "cpu",
    }


@pytest.fixture(scope="module")
def scorer():
    """The model that the task's arguments name, made without them."""
    template = PromptTemplate(question="{question}: ", answer="{answer}", stop="\n", separator="")
    return CausalLMScorer(llama(), TOKENIZER, template, answers=[*COLOURS, "<i>blue</i>"])
