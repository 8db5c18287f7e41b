"""The page's numbers are those of the selectors, the baselines and the frozen model."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from small_clip import make_clip, make_processor

from lever_grpo.data import EmbeddingStore, load_beams, load_examples
from lever_grpo.demo import DemoArguments, Session, parse_demo
from lever_grpo.demo.view import render
from lever_grpo.inference import DemonstrationSelector, random_picks
from lever_grpo.models import ClipSelector, PointerSelector, PointerSelectorConfig, load_selector
from lever_grpo.scorers import Prompt


METHODS = ["random", "similarity", "sft", "grpo"]


@pytest.fixture(scope="module")
def session(task, scorer):
    return Session(DemoArguments(**task), scorer)


def choices(shown):
    return {choice.method: choice for choice in shown.choices}


@pytest.mark.parametrize("shots", [1, 2])
def test_picks_are_those_of_selectors_and_baselines(session, task, shots):
    rows = load_examples(task["task_file"])
    vectors = load_file(task["embeddings"])
    dataset = load_beams(task["log"])
    drawn = random_picks(dataset, shots, seed=0).tolist()
    assert session.query_ids == list(dataset["query_id"])
    for place, record in enumerate(dataset):
        shown = session.held_out(record["query_id"], shots)
        found, pool = choices(shown), [rows[i] for i in record["candidate_ids"]]
        assert list(found) == METHODS and list(shown.pool) == pool and shown.query == rows[record["query_id"]]
        assert list(found["random"].picks) == drawn[place]
        unit = vectors["question"].astype(np.float64)
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        nearest = np.argsort(-(unit[record["candidate_ids"]] @ unit[record["query_id"]]), kind="stable")
        assert list(found["similarity"].picks) == nearest[:shots].tolist()
        for name in ("sft", "grpo"):
            selector = DemonstrationSelector.from_pretrained(task[name])
            selector.set_candidates(pool, EmbeddingStore({k: v[record["candidate_ids"]] for k, v in vectors.items()}))
            query = EmbeddingStore({"question": vectors["question"][[record["query_id"]]]})
            (expected,) = selector.select([shown.query], shots, pool_size=len(pool), embeddings=query)
            assert found[name].demonstrations == expected.demonstrations
        for choice in found.values():  # the first pick stands next to the query
            assert choice.demonstrations == tuple(pool[i] for i in reversed(choice.picks))


def test_a_selector_sees_the_embeddings_of_its_own_config(task, tmp_path):
    vectors = load_file(task["embeddings"])
    own = {"answer": 3, "question": vectors["question"].shape[1]}  # not the order of the task's arguments
    torch.manual_seed(3)
    config = PointerSelectorConfig(
        query_features={"question": own["question"]}, candidate_features=own, hidden_dim=16, dropout=0.0
    )
    PointerSelector(config).save_pretrained(tmp_path)
    session = Session(DemoArguments(**task | {"sft": str(tmp_path)}))
    selector = DemonstrationSelector.from_pretrained(tmp_path)
    for query in session.query_ids:
        shown = session.held_out(query, 2)
        store = EmbeddingStore({name: array[[row.id for row in shown.pool]] for name, array in vectors.items()})
        selector.set_candidates(list(shown.pool), store)
        asked = EmbeddingStore({"question": vectors["question"][[query]]})
        (expected,) = selector.select([shown.query], 2, pool_size=len(shown.pool), embeddings=asked)
        assert choices(shown)["sft"].demonstrations == expected.demonstrations
    assert len(choices(session.typed("which colour?", 2))["sft"].picks) == 2


def test_log_probs_are_the_models_own(session, task):
    vectors = {name: torch.from_numpy(array).float() for name, array in load_file(task["embeddings"]).items()}
    record = load_beams(task["log"])[2]
    shown = session.held_out(2, 2)
    pool = record["candidate_ids"]
    inputs = vectors["question"][[2]], torch.cat([vectors["question"][pool], vectors["answer"][pool]], dim=1)[None]
    for name in ("sft", "grpo"):
        selector = load_selector(task[name]).eval()
        for choice in shown.choices:
            with torch.no_grad():
                out = selector(*inputs, sequences=torch.tensor([[choice.picks]]), return_step_log_probs=True)
            expected = out.log_probs[out.step_mask].numpy()
            np.testing.assert_allclose(choice.log_probs[name], expected, rtol=1e-5)
            # the selector that may stop is asked once more: its sequences may be longer than two
            assert len(choice.log_probs[name]) == len(choice.picks) + (name == "grpo")
            np.testing.assert_allclose(shown.first[name], out.step_log_probs[0, 0, 0, : len(pool)], rtol=1e-5)
        np.testing.assert_allclose(np.exp(shown.first[name]).sum(), 1.0, rtol=1e-5)
    greedy = choices(shown)["sft"]
    assert greedy.picks[0] == int(np.argmax(shown.first["sft"]))


def test_answers_are_the_models_own(session, scorer):
    shown = session.held_out(0, 2)
    for choice in shown.choices:
        prompt = Prompt(shown.query, choice.demonstrations)
        assert choice.answer == scorer.answer([prompt])[0]
        assert choice.answer_log_prob == pytest.approx(scorer.score([prompt])[0].mean(), rel=1e-5)
        assert choice.accuracy == float(choice.answer == shown.query.answers[0])


def test_typed_queries_are_embedded_and_have_a_pool(session, task, scorer):
    assert session.no_typed_queries is None and not session.sees_images
    shown = session.typed(" which colour? ", 2)
    rows, vectors = load_examples(task["task_file"]), load_file(task["embeddings"])
    in_pools = sorted({i for pool in load_beams(task["log"])["candidate_ids"] for i in pool})
    checkpoint = DemonstrationSelector.from_pretrained(Path(task["log"]).parent / "encoded")
    checkpoint.set_candidates(
        [rows[i] for i in in_pools], EmbeddingStore({k: v[in_pools] for k, v in vectors.items()})
    )
    made = EmbeddingStore({"question": checkpoint.encode("question", [shown.query])})
    (expected,) = checkpoint.select([shown.query], 2, pool_size=6, embeddings=made)
    assert shown.query.question == "which colour?" and not shown.answer_known
    assert shown.pool == expected.pool and len(shown.pool) == 6
    sft = choices(shown)["sft"]
    assert sft.demonstrations == expected.demonstrations
    assert sum(sft.log_probs["sft"]) == pytest.approx(expected.log_prob, rel=1e-4)
    assert sft.answer == scorer.answer([Prompt(shown.query, expected.demonstrations)])[0]
    assert sft.accuracy is None and sft.answer_log_prob is None
    assert choices(shown)["similarity"].picks == (0, 1)  # the pool is in this order
    with pytest.raises(ValueError, match="blank"):
        session.typed("  ", 2)


@pytest.fixture(scope="module", autouse=True)
def encoded(task):
    """A checkpoint that has its encoders with it."""
    folder = Path(task["log"]).parent
    shutil.copytree(folder / "sft", folder / "encoded")
    for name in ("encoders.json", "encoders.safetensors"):
        shutil.copy(folder / name, folder / "encoded")


def test_encoders_of_the_checkpoint_will_do(task, tmp_path):
    shutil.copy(task["embeddings"], tmp_path / "rows.safetensors")
    elsewhere = task | {"embeddings": str(tmp_path / "rows.safetensors")}
    closed = Session(DemoArguments(**elsewhere))
    assert closed.no_typed_queries.startswith("neither a selector nor the task says how question are made of rows")
    with pytest.raises(ValueError, match="cannot be typed: neither"):
        closed.typed("which?", 1)
    assert len(closed.held_out(0, 1).choices) == 4  # and these go on
    encoded = str(Path(task["log"]).parent / "encoded")
    assert Session(DemoArguments(**elsewhere | {"sft": encoded})).no_typed_queries is None
    # embeddings that these encoders do not make
    other = {name: array[::-1].copy() for name, array in load_file(task["embeddings"]).items()}
    save_file(other, str(tmp_path / "rows.safetensors"))
    mixed_up = Session(DemoArguments(**elsewhere | {"sft": encoded}))
    assert "makes other embeddings than the task's" in mixed_up.no_typed_queries


def test_a_selector_that_sees_the_rows(task, tmp_path):
    torch.manual_seed(0)
    ClipSelector.from_clip(make_clip(), modalities=["text"], hidden_dim=16).save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    session = Session(DemoArguments(**task | {"grpo": str(tmp_path)}))
    picker = DemonstrationSelector.from_pretrained(tmp_path)
    for shown in (session.held_out(2, 2), session.typed("which colour?", 2)):
        picker.set_candidates(shown.pool)
        (expected,) = picker.select([shown.query], 2, pool_size=len(shown.pool))
        found = choices(shown)["grpo"]
        assert found.demonstrations == expected.demonstrations
        assert sum(found.log_probs["grpo"]) == pytest.approx(expected.log_prob, abs=1e-4)
        assert np.exp(shown.first["grpo"]).sum() == pytest.approx(1.0, abs=1e-5)


def test_other_baselines(task, scorer):
    session = Session(DemoArguments(**task | {"baselines": ["zero_shot", "mmr", "oracle"]}), scorer)
    found = choices(session.held_out(0, 2))
    assert list(found) == ["zero_shot", "mmr", "sft", "grpo", "oracle"]
    assert found["zero_shot"].picks == () and found["zero_shot"].log_probs == {"sft": (), "grpo": ()}
    assert found["oracle"].picks == (5, 0)
    assert "oracle" not in choices(session.typed("which?", 2))  # no log has it


def test_without_a_model(task):
    shown = Session(DemoArguments(**task)).held_out(1, 2)
    assert all(choice.answer is None and choice.accuracy is None for choice in shown.choices)
    assert "answers" not in render(shown, asked=False)


def test_a_model_that_cannot_be_asked(task):
    class Silent:
        def score(self, prompts):
            return [None] * len(prompts)

        def answer(self, prompts, max_new_tokens=10):
            return [None] * len(prompts)

    shown = Session(DemoArguments(**task), Silent()).held_out(1, 2)
    assert all(choice.answer is None and choice.accuracy is None for choice in shown.choices)
    assert render(shown, asked=True).count("could not be asked") == 4


def test_what_does_not_fit_is_named(session, task, tmp_path):
    with pytest.raises(ValueError, match="no such query"):
        session.held_out(23, 1)
    with pytest.raises(ValueError, match="num_shots=7 must be from 1 to 6"):
        session.held_out(0, 7)
    save_file({"question": load_file(task["embeddings"])["question"]}, tmp_path / "rows.safetensors")
    other = {"candidate_features": ["question"], "embeddings": str(tmp_path / "rows.safetensors")}
    with pytest.raises(ValueError, match="selector sft reads 'answer'"):  # at the start, not at the first press
        Session(DemoArguments(**task | other))


def test_arguments(task):
    assert DemoArguments(selectors=["rce=a"], grpo="b").seeds_of == {"grpo": ["b"]}
    assert DemoArguments(selectors=["rce=a"]).seeds_of == {"rce": ["a"]}
    with pytest.raises(ValueError, match="port=0 must be"):
        DemoArguments(port=0)
    recipe = Path(__file__).resolve().parents[2] / "recipes" / "evaluate_supersense.yaml"
    arguments = parse_demo(["--config", str(recipe), "--grpo", "x", "--port", "7999", "--ask", "false"])
    assert arguments.seeds_of == {"grpo": ["x"]} and arguments.task == "supersense" and arguments.port == 7999
    assert not arguments.ask and not arguments.share and arguments.host == "127.0.0.1"
