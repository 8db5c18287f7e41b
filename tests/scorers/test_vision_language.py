"""A tiny Qwen2.5-VL behind real classes, against a reference that asks one prompt at a time with all logits."""

import io
import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from lever_grpo.data import Example
from lever_grpo.scorers import Prompt, PromptTemplate, ScorerError


# transformers' video processor, without which Qwen's processor cannot be built, needs it
pytest.importorskip("torchvision")

from small_vision_language import build_processor, save_vision_language_model  # noqa: E402

from lever_grpo.scorers.vision_language import WINDOW, VisionLanguageScorer, _batches  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny-vl"
    save_vision_language_model(path)
    return path


@pytest.fixture(scope="module")
def scorer(folder):
    return VisionLanguageScorer.from_pretrained(folder, device="cpu")


def picture(seed, size=(40, 30), kind="PNG"):
    """Noise, encoded."""
    noise = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "two.jpg"
    path.write_bytes(picture(2, (60, 28), "JPEG"))
    return [
        Example(0, "What is it?", ("a cat", "cat"), image=picture(0)),
        Example(1, "Which colour has the car?", ("red",), image=picture(1, (90, 20))),
        Example(2, "How many?", ("2",), image=path),
        Example(3, "Capital of Peru?", ("Lima",)),
        Example(4, "1 + 1?", ("two",)),
        Example(5, "Where?", ("at home, says she",), image=picture(5, (28, 100))),
    ]


@pytest.fixture(scope="module")
def prompts(rows):
    zero, one, two, three, four, five = rows
    return [
        Prompt(zero),
        Prompt(three, (four,)),
        Prompt(zero, (one, two)),
        Prompt(two, (three,)),
        Prompt(three, (five, one)),
        Prompt(five, (zero, four, two)),
        Prompt(four),
        Prompt(zero, (two, one)),
        Prompt(two, (two,)),  # the query itself as a demonstration is one like any other
    ]


def text_of(prompt):
    """The prompt in Qwen's layout, written down independently of any template."""

    def user(example):
        image = "" if example.image is None else "<|vision_start|><|image_pad|><|vision_end|>"
        return f"<|im_start|>user\n{image}{example.question}<|im_end|>\n"

    turns = [f"{user(d)}<|im_start|>assistant\n{d.answers[0]}<|im_end|>\n" for d in prompt.demonstrations]
    return "".join(turns) + user(prompt.query) + "<|im_start|>assistant\n"


def encode(processor, prompt):
    pictures = [example.image for example in (*prompt.demonstrations, prompt.query) if example.image is not None]
    opened = [Image.open(io.BytesIO(p) if isinstance(p, bytes) else p).convert("RGB") for p in pictures]
    return processor(text=[text_of(prompt)], images=[opened] if opened else None, return_tensors="pt")


@torch.no_grad()
def naive(folder, prompts):
    """One prompt at a time, all logits; the answer's tokens one by one."""
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    found = []
    for prompt in prompts:
        inputs = encode(processor, prompt)
        log_probs = []
        for token in processor.tokenizer(prompt.query.answers[0]).input_ids:
            logits = model(**inputs).logits
            log_probs.append(torch.log_softmax(logits[0, -1].double(), -1)[token].item())
            inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[token]])], 1)
            for name in ("attention_mask", "mm_token_type_ids"):
                extra = torch.full((1, 1), int(name == "attention_mask"))
                inputs[name] = torch.cat([inputs[name], extra], 1)
        found.append(log_probs)
    return found


def test_scores_equal_the_naive_reference(folder, scorer, prompts):
    for ours, reference in zip(scorer.score(prompts), naive(folder, prompts), strict=True):
        assert ours.dtype == np.float64
        np.testing.assert_allclose(ours, reference, atol=1e-4, rtol=0)


def test_a_batch_equals_one_at_a_time_in_any_order(scorer, prompts):
    together = scorer.score(prompts)
    for prompt, scores in zip(prompts, together, strict=True):
        np.testing.assert_allclose(scorer.score([prompt])[0], scores, atol=1e-4, rtol=0)
    for scores, backwards in zip(together, scorer.score(prompts[::-1])[::-1], strict=True):
        np.testing.assert_allclose(backwards, scores, atol=1e-4, rtol=0)


def test_without_logits_to_keep_the_scores_are_the_same(scorer, prompts, monkeypatch):
    expected = scorer.score(prompts)
    monkeypatch.setattr(scorer, "_keeps", False)
    for scores, reference in zip(scorer.score(prompts), expected, strict=True):
        np.testing.assert_allclose(scores, reference, atol=1e-5, rtol=0)


def test_only_the_logits_of_answers_are_computed(scorer, prompts):
    seen = []
    hook = scorer.model.get_output_embeddings().register_forward_hook(lambda *args: seen.append(args[2].shape[1]))
    try:
        scorer.score([prompts[0]])
    finally:
        hook.remove()
    assert seen == [len("a cat")]  # one token a byte


def test_images_their_order_and_the_demonstrations_change_the_score(scorer, rows):
    query = rows[0]
    other = Example(0, query.question, query.answers, image=picture(77))
    blind = Example(0, query.question, query.answers)
    variants = [
        Prompt(query),
        Prompt(other),
        Prompt(blind),
        Prompt(query, (rows[1], rows[2])),
        Prompt(query, (rows[2], rows[1])),
    ]
    scores = scorer.score(variants)
    for i, one in enumerate(scores):
        for another in scores[:i]:
            assert np.abs(one - another).max() > 1e-3


def test_equal_prompts_are_computed_once_and_not_shared(scorer, prompts, monkeypatch):
    asked = []
    monkeypatch.setattr(scorer, "_log_probs", lambda jobs: asked.extend(jobs) or [np.zeros(1) for _ in jobs])
    first, second = scorer.score([prompts[0], prompts[0]])
    first += 1
    assert len(asked) == 1 and second.tolist() == [0.0]


def test_more_prompts_than_a_window(scorer, rows):
    many = [Prompt(Example(i, f"{i}?", ("y",), image=rows[i % 3].image)) for i in range(WINDOW + 3)]
    scores = scorer.score(many)
    assert len(scores) == WINDOW + 3
    for i in (0, WINDOW - 1, WINDOW, WINDOW + 2):
        np.testing.assert_allclose(scorer.score([many[i]])[0], scores[i], atol=1e-4, rtol=0)


def test_batches_keep_to_the_budget(scorer, prompts):
    jobs = [scorer._job(prompt, None) for prompt in prompts]
    batches = list(_batches(jobs, 200, 0))
    assert sorted(map(id, jobs)) == sorted(id(job) for batch in batches for job in batch)
    assert any(len(batch) > 1 for batch in batches)
    for batch in batches:
        assert len({job.kind for job in batch}) == 1
        assert len(batch) == 1 or len(batch) * max(job.length for job in batch) <= 200


@pytest.mark.parametrize(
    "broken", [b"no image", picture(0)[:60], picture(0)[:-1000], "missing.png"], ids=["text", "head", "cut", "missing"]
)
def test_a_broken_image_costs_its_prompt_only(scorer, rows, tmp_path, caplog, broken):
    image = tmp_path / broken if isinstance(broken, str) else broken
    bad = Example(42, "What?", ("x",), image=image)
    with caplog.at_level(logging.WARNING):
        found = scorer.score([Prompt(rows[0]), Prompt(bad), Prompt(rows[3], (rows[1], bad)), Prompt(rows[4])])
    assert [scores is None for scores in found] == [False, True, True, False]
    first, second = (record.getMessage() for record in caplog.records)
    assert "query 42" in first and "its image" in first
    assert "query 3 " in second and "demonstration 42" in second
    assert "0x" not in caplog.text
    np.testing.assert_allclose(found[0], scorer.score([Prompt(rows[0])])[0], atol=1e-4, rtol=0)


def test_an_image_that_the_processor_refuses(scorer, caplog):
    thread = Example(7, "What?", ("x",), image=picture(0, (900, 1)))  # wider than 200 times its height
    assert scorer.score([Prompt(thread)]) == [None]
    assert "query 7" in caplog.text and "aspect ratio" in caplog.text


def test_images_of_other_modes_become_rgb(scorer):
    file = io.BytesIO()
    Image.new("P", (30, 30), 5).save(file, "PNG")
    assert scorer.score([Prompt(Example(0, "What?", ("x",), image=file.getvalue()))])[0].shape == (1,)


def test_a_prompt_that_is_too_long(folder, rows, caplog):
    short = Prompt(rows[3])
    length = len(build_processor().tokenizer(text_of(short)).input_ids) + len("Lima")
    for max_length, fits in ((length, True), (length - 1, False)):
        limited = VisionLanguageScorer.from_pretrained(folder, device="cpu", max_length=max_length)
        long, found = limited.score([Prompt(rows[3], (rows[4],)), short])
        assert long is None and (found is not None) == fits
    assert f"{length} tokens with the answer, more than max_length={length - 1}" in caplog.text
    assert VisionLanguageScorer.from_pretrained(folder, device="cpu", max_length=10**6).max_length == 512


def test_an_answer_without_tokens(scorer, rows, monkeypatch, caplog):
    monkeypatch.setattr(scorer, "template", PromptTemplate(question="{question}", answer="{answer}"))
    monkeypatch.setattr(scorer, "tokenizer", lambda *_, **__: type("Encoding", (), {"input_ids": []}))
    assert scorer.score([Prompt(rows[3])]) == [None]
    assert "query 3" in caplog.text and "'Lima' has no tokens" in caplog.text


def test_instruction_and_scored_end_of_turn(folder, scorer, rows):
    plain = VisionLanguageScorer(
        scorer.model,
        scorer.processor,
        PromptTemplate(
            question="Q: {question}",
            answer="A {answer}",
            stop="<|im_end|>",
            instruction="Be brief.",
            score_stop=True,
        ),
    )
    (ours,) = plain.score([Prompt(rows[3], (rows[4],))])
    text = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQ: 1 + 1?<|im_end|>\n<|im_start|>assistant\n"
        "A two<|im_end|>\n<|im_start|>user\nQ: Capital of Peru?<|im_end|>\n<|im_start|>assistant\n"
    )
    tokenizer = scorer.tokenizer
    start, answer = tokenizer(text).input_ids, tokenizer("A Lima<|im_end|>").input_ids
    assert len(answer) == len("A Lima") + 1
    with torch.no_grad():
        logits = scorer.model(input_ids=torch.tensor([start + answer])).logits[0].double().log_softmax(-1)
    expected = [logits[len(start) + i - 1, token].item() for i, token in enumerate(answer)]
    np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def greedy(folder, prompt, steps):
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    inputs, tokens = encode(processor, prompt), []
    while len(tokens) < steps:
        tokens.append(int(model(**inputs).logits[0, -1].argmax()))
        if tokens[-1] == processor.tokenizer.eos_token_id:
            break
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([tokens[-1:]])], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros(1, 1, dtype=int)], 1)
    return processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_answers_are_greedy_whatever_the_checkpoint_says(folder, prompts):
    scorer = VisionLanguageScorer.from_pretrained(folder, device="cpu")
    scorer.model.generation_config.update(repetition_penalty=9.0, do_sample=True, temperature=5.0, max_time=0.0)
    expected = [greedy(folder, prompt, 6) for prompt in prompts]
    assert len(set(expected)) > 2
    assert scorer.answer(prompts, max_new_tokens=6) == expected
    assert scorer.answer(prompts[:1], max_new_tokens=6) == expected[:1]


def test_an_answer_ends_at_stop_and_needs_room(folder, scorer, prompts, rows, caplog):
    (whole,) = scorer.answer(prompts[:1], max_new_tokens=6)
    stop = whole[2]
    stopping = VisionLanguageScorer(
        scorer.model, scorer.processor, PromptTemplate(question="{question}", answer="{answer}", stop=stop)
    )
    assert stopping.answer(prompts[:1], max_new_tokens=6) == [whole.split(stop)[0].strip()]
    assert scorer.answer([Prompt(rows[3])], max_new_tokens=500) == [None]
    assert "query 3" in caplog.text


def test_nan_is_passed_on(folder, prompts):
    scorer = VisionLanguageScorer.from_pretrained(folder, device="cpu")
    torch.nn.init.constant_(scorer.model.get_output_embeddings().weight, float("nan"))
    assert all(np.isnan(scores).all() for scores in scorer.score(prompts[:2]))


def test_a_model_that_fails_names_the_queries(folder, prompts, monkeypatch):
    scorer = VisionLanguageScorer.from_pretrained(folder, device="cpu")

    def forward(**_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(scorer.model, "forward", forward)
    with pytest.raises(ScorerError, match="queries 3, 4: out of memory"):
        scorer.score([prompts[1], prompts[6]])


def test_pixels_pass_to_the_image_processor(folder, rows):
    large = Prompt(Example(0, "?", ("x",), image=picture(0, (200, 200))))
    lengths = [
        VisionLanguageScorer.from_pretrained(folder, device="cpu", max_pixels=n * 28**2)._job(large, None).length
        for n in (1, 4, 9)
    ]
    assert np.diff(lengths).tolist() == [3, 5]  # a token for 28 x 28 pixels
    small = VisionLanguageScorer.from_pretrained(folder, device="cpu", min_pixels=4 * 28**2, max_pixels=9 * 28**2)
    assert small.describe()["image_size"] == {"shortest_edge": 4 * 28**2, "longest_edge": 9 * 28**2}


def test_describe_is_json_without_paths(folder, scorer):
    text = json.dumps(scorer.describe())
    described = json.loads(text)
    assert str(folder.parent) not in text
    assert described["model"] == "tiny-vl" and described["dtype"] == "float32" and described["max_length"] == 512
    assert described["template"]["question"] == "{question}"
    half = VisionLanguageScorer.from_pretrained(folder, device="cpu", dtype="bfloat16", revision="v1")
    assert half.describe()["dtype"] == "bfloat16" and half.describe()["revision"] == "v1"


def test_bfloat16_scores_are_near(folder, scorer, prompts):
    half = VisionLanguageScorer.from_pretrained(folder, device="cpu", dtype="bfloat16")
    for one, other in zip(half.score(prompts), scorer.score(prompts), strict=True):
        np.testing.assert_allclose(one, other, atol=0.5)


def test_bad_settings(folder, scorer):
    with pytest.raises(ValueError, match="token_budget=0"):
        VisionLanguageScorer(scorer.model, scorer.processor, token_budget=0)
    processor = build_processor()
    processor.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        VisionLanguageScorer(scorer.model, processor)


def test_nothing_to_score(scorer):
    assert scorer.score([]) == [] and scorer.answer([]) == []
