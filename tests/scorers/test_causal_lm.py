import json
import logging

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_language_models import SIZES, TOKENIZER, VOCAB, byte_tokenizer, lively, llama
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from lever_grpo.data import Example
from lever_grpo.scorers import Prompt, PromptTemplate, ScorerError
from lever_grpo.scorers.causal_lm import CausalLMScorer


FEW = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))


def example(i: int, length: int | None = None) -> Example:
    rng = np.random.default_rng(i)
    words = rng.choice(["cab", "bone", "onyx", "a", "dusk", "é"], size=length or int(rng.integers(1, 6)))
    return Example(i, " ".join(words) + "?", (" ".join(rng.choice(["cat", "bon", "b", "emu"], rng.integers(1, 3))),))


def reference(model, tokenizer, template, prompt: Prompt) -> np.ndarray:
    """One prompt at a time, all logits, no mask, no cache, the pieces' tokens one after the other."""
    pieces = [template.instruction] if template.instruction else []
    for demonstration in prompt.demonstrations:
        pieces.append(
            template.question.replace("{question}", demonstration.question)
            + template.answer.replace("{answer}", demonstration.answers[0])
            + template.stop
            + template.separator
        )
    pieces.append(template.question.replace("{question}", prompt.query.question))
    start = tokenizer("").input_ids
    ids = start + [i for piece in pieces for i in tokenizer(piece, add_special_tokens=False).input_ids]
    text = template.answer.replace("{answer}", prompt.query.answers[0]) + template.stop * template.score_stop
    answer = tokenizer(text, add_special_tokens=False).input_ids
    with torch.no_grad():
        log_probs = model(torch.tensor([ids + answer])).logits[0].double().log_softmax(-1)
    return np.array([log_probs[len(ids) + t - 1, token] for t, token in enumerate(answer)])


def search_prompts(construct_order: str = "left") -> list[Prompt]:
    """What a search asks about two queries whose pools overlap: zero-shot, singles, extensions of the best."""
    prompts = []
    for query, pool in ((100, range(0, 5)), (101, range(2, 7))):
        prompts.append(Prompt(example(query)))
        prompts.extend(Prompt(example(query), (example(i),)) for i in pool)
        for parent in list(pool)[:3]:
            for new in pool:
                pair = (
                    (example(new), example(parent)) if construct_order == "left" else (example(parent), example(new))
                )
                if new != parent:
                    prompts.append(Prompt(example(query), pair))
    return prompts


def assert_scores(scorer: CausalLMScorer, prompts: list[Prompt], atol: float = 1e-4) -> None:
    scores = scorer.score(prompts)
    assert len(scores) == len(prompts)
    for prompt, score in zip(prompts, scores, strict=True):
        expected = reference(scorer.model, scorer.tokenizer, scorer.template, prompt)
        assert score.shape == expected.shape and score.dtype == np.float64
        np.testing.assert_allclose(score, expected, atol=atol, rtol=0)


@pytest.fixture(scope="module")
def model():
    return llama()


@FEW
@given(
    data=st.lists(st.tuples(st.integers(0, 9), st.lists(st.integers(10, 14), max_size=5)), min_size=1, max_size=25),
    budget=st.sampled_from([1, 60, 300, 4096]),
    share=st.booleans(),
)
def test_equal_to_one_prompt_at_a_time(model, data, budget, share):
    """Any mixture of queries and demonstrations, with repetitions, at any budget."""
    scorer = CausalLMScorer(model, TOKENIZER, token_budget=budget, share_prefixes=share)
    assert scorer.share_prefixes == share
    assert_scores(scorer, [Prompt(example(query), tuple(map(example, chosen))) for query, chosen in data])


@pytest.mark.parametrize("order", ["left", "right"])
@pytest.mark.parametrize(
    "template",
    [
        PromptTemplate(),
        PromptTemplate(score_stop=True, separator="", instruction="cab on.\n"),
        PromptTemplate(question="{question}", answer="{answer}", stop="", separator=""),
    ],
)
def test_search(model, order, template):
    assert_scores(CausalLMScorer(model, TOKENIZER, template), search_prompts(order))


def test_without_start_token(model):
    assert_scores(CausalLMScorer(model, byte_tokenizer(adds_start=False)), search_prompts())


@pytest.mark.parametrize(
    ("family", "config", "share"),
    [
        # scales its logits
        (GraniteForCausalLM, GraniteConfig(**SIZES, vocab_size=VOCAB, num_key_value_heads=2, logits_scaling=3), True),
        # caps its logits; every other layer sees 8 tokens only
        (
            Gemma2ForCausalLM,
            Gemma2Config(**SIZES, vocab_size=VOCAB, final_logit_softcapping=2.0, sliding_window=8, head_dim=8,
                         num_key_value_heads=2, query_pre_attn_scalar=8),
            True,
        ),
        # learned positions
        (GPT2LMHeadModel, GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=512), True),
        # no positions at all: it derives them from the mask
        (BloomForCausalLM, BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4), False),
    ],
    ids=lambda x: getattr(x, "__name__", None) or "",
)  # fmt: skip
def test_families(family, config, share):
    for attention in ("eager", "sdpa") if family._supports_sdpa else ("eager",):
        config._attn_implementation = attention
        scorer = CausalLMScorer(lively(family(config)), TOKENIZER, token_budget=200)
        assert scorer.share_prefixes == share
        assert_scores(scorer, search_prompts())


def test_a_model_that_ignores_the_mask_is_found_out(model):
    class Deaf(LlamaForCausalLM):
        def forward(self, *args, attention_mask=None, **options):
            return super().forward(*args, **options)

    deaf = Deaf(model.config)
    deaf.load_state_dict(model.state_dict())
    scorer = CausalLMScorer(deaf, TOKENIZER)
    assert not scorer.share_prefixes
    assert_scores(scorer, search_prompts())


def test_work_is_shared(model, monkeypatch):
    """Tokens that the model reads: equal prompts and equal beginnings once, and logits of answers only."""
    read, outputs = [], []

    def count(_, args, options, output):
        read.append(options["input_ids"].numel())
        outputs.append(output.logits.shape[1])

    prompts = [Prompt(example(100), (example(1), example(i))) for i in range(2, 12)] * 3
    answer = len(TOKENIZER(" " + example(100).answers[0], add_special_tokens=False).input_ids)
    sizes = {}
    for share in (True, False):
        scorer = CausalLMScorer(model, TOKENIZER, token_budget=4096, share_prefixes=share)
        with monkeypatch.context():
            hook = model.register_forward_hook(count, with_kwargs=True)
            scorer.score(prompts)
            hook.remove()
        sizes[share] = sum(read)
        assert sum(outputs) == 10 * answer  # 10 different prompts
        read.clear(), outputs.clear()
    assert sizes[True] < 0.8 * sizes[False]


def test_pieces_are_tokenised_once(model):
    seen = []

    class Counting(PreTrainedTokenizerFast):
        def __call__(self, text, **options):
            seen.extend([text] if isinstance(text, str) else text)
            return super().__call__(text, **options)

    tokenizer = Counting(tokenizer_object=TOKENIZER._tokenizer, bos_token="<s>", eos_token="</s>")
    scorer = CausalLMScorer(model, tokenizer)
    seen.clear()
    scorer.score(search_prompts())
    scorer.score(search_prompts("right"))
    seen = [text for text in seen if text != "Question: "]  # what comes after a demonstration
    assert len(seen) == len(set(seen)) == 2 * 2 + 7  # queries, answers; demonstrations


def test_line_breaks_as_in_the_whole_text(model):
    """This tokenizer, as GPT-2's, has two tokens for an empty line in front of a word, and one at a text's end."""
    tokenizer = byte_tokenizer(words=True)
    assert len(tokenizer("a\n\nQ").input_ids) == len(tokenizer("a\n\n").input_ids) + 2
    scorer = CausalLMScorer(model, tokenizer, PromptTemplate(instruction="On cats.\n\n"))
    prompts = search_prompts()
    for prompt, score in zip(prompts, scorer.score(prompts), strict=True):
        ids = tokenizer(scorer.template.text(list(prompt.demonstrations), prompt.query)).input_ids
        answer = tokenizer(scorer.template.of_answer(prompt.query), add_special_tokens=False).input_ids
        with torch.no_grad():
            log_probs = model(torch.tensor([ids + answer])).logits[0].double().log_softmax(-1)
        expected = [log_probs[len(ids) + t - 1, token] for t, token in enumerate(answer)]
        np.testing.assert_allclose(score, expected, atol=1e-4, rtol=0)


CLOSED = ("cat", "bon", "emu", "yak")


def closed_prompts() -> list[Prompt]:
    queries = [Example(200 + i, f"what is {i}", (CLOSED[i % 4],)) for i in range(6)]
    return [Prompt(query, tuple(map(example, range(shots)))) for query in queries for shots in (0, 1, 3)]


@pytest.mark.parametrize("share", [True, False])
def test_closed_answers(model, share):
    scorer = CausalLMScorer(model, TOKENIZER, answers=CLOSED, share_prefixes=share)
    head, prompts = model.lm_head, closed_prompts()
    first = [TOKENIZER(" " + answer, add_special_tokens=False).input_ids[0] for answer in CLOSED]
    best = []
    for prompt, score in zip(prompts, scorer.score(prompts), strict=True):
        text = scorer.template.text(list(prompt.demonstrations), prompt.query)
        with torch.no_grad():
            logits = model(torch.tensor([tokens_of(prompt)])).logits[0, -1, first].double()
        assert text and score.shape == (1,)
        expected = logits.log_softmax(-1)[CLOSED.index(prompt.query.answers[0])].item()
        assert score[0] == pytest.approx(expected, abs=1e-4)
        best.append(CLOSED[int(logits.argmax())])
    assert scorer.answer(prompts) == best and len(set(best)) > 1
    assert model.lm_head is head and not head._forward_pre_hooks


def test_scored_prompts_of_a_closed_set_are_not_computed_again(model, monkeypatch):
    scorer, prompts = CausalLMScorer(model, TOKENIZER, answers=CLOSED), closed_prompts()
    fresh = CausalLMScorer(model, TOKENIZER, answers=CLOSED).answer(prompts)
    scorer.score(prompts[1:])
    asked, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda **inputs: asked.append(inputs["input_ids"]) or forward(**inputs))
    assert scorer.answer(prompts) == fresh
    (ids,) = asked
    assert ids.tolist() == [tokens_of(prompts[0])]


def tokens_of(prompt: Prompt) -> list[int]:
    template = PromptTemplate()
    pieces = [template.text([demonstration], Example(0, "", ("x",))) for demonstration in prompt.demonstrations]
    pieces = [piece.removesuffix("Question: \nAnswer:") for piece in pieces]
    pieces.append(template.text([], prompt.query))
    return [0, *(i for piece in pieces for i in TOKENIZER(piece, add_special_tokens=False).input_ids)]


def test_closed_answers_must_differ(model):
    with pytest.raises(ValueError, match="'cat' and 'cow' begin with the same token"):
        CausalLMScorer(model, TOKENIZER, answers=["cat", "bon", "cow"])
    with pytest.raises(ValueError, match="answers is empty"):
        CausalLMScorer(model, TOKENIZER, answers=[])


def test_what_cannot_be_asked(model, caplog):
    scorer = CausalLMScorer(model, TOKENIZER, max_length=60)
    short, long = Prompt(Example(7, "a", ("b",))), Prompt(Example(8, "on" * 60, ("b",)))
    with caplog.at_level(logging.WARNING, "lever_grpo"):
        scores = scorer.score([long, short, long])
        assert list(scorer.problems) == [long] and scorer.problems[long].endswith("more than max_length=60")
        answers = scorer.answer([long, short], max_new_tokens=2)
    assert [score is None for score in scores] == [True, False, True]
    assert answers[0] is None and isinstance(answers[1], str)
    assert "query 8 was not asked: " in caplog.text and "max_length=60" in caplog.text
    assert "query 7" not in caplog.text

    caplog.clear()
    assert CausalLMScorer(model, TOKENIZER, answers=CLOSED).score([short]) == [None]
    assert "query 7 was not asked: the answer 'b' is not one of" in caplog.text

    caplog.clear()
    bare = PromptTemplate(question="{question}")
    no_start = CausalLMScorer(model, byte_tokenizer(adds_start=False), bare)
    assert no_start.score([Prompt(Example(9, "", ("b",)))]) == [None]
    assert "query 9 was not asked: the prompt has no tokens" in caplog.text
    assert scorer.score([]) == [] and scorer.answer([]) == [] and scorer.problems == {}


def test_the_model_s_own_limit():
    scorer = CausalLMScorer(llama(max_position_embeddings=48), TOKENIZER, max_length=500)
    query = Example(3, "a" * 40, ("b",))
    assert scorer.max_length == 48 and scorer.score([Prompt(query)]) == [None]
    exact = Example(4, "a" * (48 - 1 - len("Question: \nAnswer:") - 1), ("b",))  # start, one token of the answer
    assert TOKENIZER("Question: \nAnswer:", add_special_tokens=False).input_ids != []
    fits = len(tokens_of(Prompt(exact))) + 1 <= 48
    assert (scorer.score([Prompt(exact)])[0] is not None) == fits


def test_answer_is_greedy_and_stops():
    model = llama()
    free = CausalLMScorer(model, TOKENIZER, PromptTemplate(stop="")).answer([Prompt(example(i)) for i in range(12)])
    stop = next(letter for letter in "".join(free) if letter.isascii() and letter.isprintable())
    template = PromptTemplate(stop=stop)
    scorer = CausalLMScorer(model, TOKENIZER, template, token_budget=150)
    model.generation_config.repetition_penalty = 3.0  # a checkpoint's own settings must not matter
    prompts = [Prompt(example(i), tuple(map(example, range(20, 20 + i % 4)))) for i in range(12)]
    expected, stopped = [], 0
    for prompt in prompts:
        ids = [0]
        for demonstration in prompt.demonstrations:
            ids += TOKENIZER(template.of_demonstration(demonstration), add_special_tokens=False).input_ids
        ids += TOKENIZER(template.of_query(prompt.query), add_special_tokens=False).input_ids
        start = len(ids)
        for _ in range(12):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == 1 or stop in TOKENIZER.decode(ids[start:]):
                stopped += 1
                break
        expected.append(TOKENIZER.decode(ids[start:], skip_special_tokens=True).split(stop)[0].strip())
    assert scorer.answer(prompts, max_new_tokens=12) == expected
    assert 0 < stopped < len(prompts)


@pytest.mark.parametrize(
    "setting",
    [
        {"no_repeat_ngram_size": 1},
        {"encoder_repetition_penalty": 9.0},
        {"suppress_tokens": [TOKENIZER.convert_tokens_to_ids(letter) for letter in "abcdeno"]},
        {"forced_eos_token_id": 1, "max_length": 40},
        {"max_time": 0.0},
        {"num_return_sequences": 2, "num_beams": 2},
        {"stop_strings": ["a"]},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"return_dict_in_generate": True},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_answers_do_not_depend_on_the_checkpoint_s_generation_settings(setting):
    scorer = CausalLMScorer(llama(), TOKENIZER, PromptTemplate(stop=""))
    prompts = [Prompt(example(i)) for i in range(12)]
    expected = scorer.answer(prompts, max_new_tokens=12)
    scorer.model.generation_config.update(**setting)
    kept = scorer.model.generation_config.to_dict()
    assert scorer.answer(prompts, max_new_tokens=12) == expected
    assert scorer.model.generation_config.to_dict() == kept  # the model is the caller's


def test_the_end_token_is_the_checkpoint_s():
    scorer = CausalLMScorer(llama(), TOKENIZER, PromptTemplate(stop=""))
    prompts = [Prompt(example(i)) for i in range(12)]
    whole = scorer.answer(prompts, max_new_tokens=12)
    end = next(letter for letter in "".join(whole) if letter.isascii() and letter.isprintable())
    scorer.model.generation_config.eos_token_id = [1, TOKENIZER.convert_tokens_to_ids(end)]
    ended = [text.split(end)[0] + end * (end in text) for text in whole]
    assert scorer.answer(prompts, max_new_tokens=12) == [text.strip() for text in ended] != whole


def test_nan_is_passed_on():
    model = llama()
    model.model.norm.weight.data[0] = float("nan")
    assert np.isnan(CausalLMScorer(model, TOKENIZER).score([Prompt(example(0))])[0]).all()


def test_failure_names_the_queries(model, monkeypatch):
    scorer = CausalLMScorer(model, TOKENIZER)

    def fail(*args, **options):
        raise torch.OutOfMemoryError("out of memory")

    head = model.lm_head
    monkeypatch.setattr(model.model, "forward", fail)
    for ask in (scorer.score, scorer.answer, CausalLMScorer(model, TOKENIZER, answers=CLOSED).answer):
        with pytest.raises(ScorerError, match="queries 3, 14: out of memory"):
            ask([Prompt(example(14)), Prompt(example(3))])
    assert model.lm_head is head and not head._forward_pre_hooks


def test_half_precision(model):
    half = llama().to(torch.bfloat16)
    scorer = CausalLMScorer(half, TOKENIZER)
    assert_scores(scorer, search_prompts(), atol=0.3)


def test_from_a_folder(model, tmp_path):
    model.save_pretrained(tmp_path / "tiny")
    TOKENIZER.save_pretrained(tmp_path / "tiny")
    options = {"token_budget": 100, "max_length": 300, "template": PromptTemplate(score_stop=True)}
    scorer = CausalLMScorer.from_pretrained(tmp_path / "tiny", dtype="float32", device="cpu", revision="v1", **options)
    prompts = search_prompts()
    expected = CausalLMScorer(model, TOKENIZER, PromptTemplate(score_stop=True)).score(prompts)
    for ours, theirs in zip(scorer.score(prompts), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)

    described = json.loads(json.dumps(scorer.describe()))
    assert described["model"] == "tiny" and described["revision"] == "v1" and described["dtype"] == "float32"
    assert described["parameters"] == sum(p.numel() for p in model.parameters())
    assert described["template"]["score_stop"] is True and described["max_length"] == 300
    assert str(tmp_path) not in json.dumps(described)


@pytest.mark.parametrize("options", [{"token_budget": 0}, {"max_length": -1}])
def test_wrong_options(model, options):
    with pytest.raises(ValueError, match="at least 1"):
        CausalLMScorer(model, TOKENIZER, **options)


def test_no_head(model):
    with pytest.raises(ValueError, match="no language-model head"):
        CausalLMScorer(model.model, TOKENIZER)
