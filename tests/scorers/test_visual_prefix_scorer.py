import io
import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from small_language_models import TOKENIZER, lively, llama

from lever_grpo.data import Example
from lever_grpo.data.records import BeamDataError
from lever_grpo.models import (
    VisualPrefixConfig,
    VisualPrefixForConditionalGeneration,
    VisualPrefixProcessor,
    VisualPrefixProjector,
)
from lever_grpo.scorers import Prompt, PromptTemplate, VisualPrefixScorer
from lever_grpo.scorers.visual_prefix import PACKAGED_PROJECTOR


TEMPLATE = PromptTemplate(question="{question}", separator="")
COLOURS = ["red", "green", "blue", "teal"]


class MeanColour(VisualPrefixProcessor):
    """An image's features are its mean colour."""

    calls = 0

    def image_features(self, images, device=None):
        self.calls += 1
        rows = []
        for image in images:
            try:
                pixels = np.asarray(Image.open(io.BytesIO(image) if isinstance(image, bytes) else image))
            except OSError as error:
                raise BeamDataError(f"1 image cannot be decoded: {error}") from error
            rows.append(torch.tensor(pixels.reshape(-1, 3).mean(0) / 255).float())
        return torch.stack(rows)


def png(colour: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (2, 2), colour).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = VisualPrefixConfig(feature_width=3, text_width=32, projector_width=8)
    model = VisualPrefixForConditionalGeneration.from_parts(llama(), VisualPrefixProjector(config))
    lively(model.projector)
    return model


def test_packaged_projector():
    projector = VisualPrefixProjector.from_pretrained(PACKAGED_PROJECTOR, dtype=torch.float32)
    assert (projector.config.feature_width, projector.config.text_width) == (1280, 576)
    features = torch.nn.functional.normalize(torch.randn(2, 1280), dim=-1)
    soft = projector(features)
    assert soft.shape == (2, 4, 576) and soft.isfinite().all() and not torch.equal(soft[0], soft[1])
    report = json.loads((PACKAGED_PROJECTOR / "worth_of_images.json").read_text())
    assert report["true"] - report["swapped"] >= 0.15


def scorer_of(model, template=TEMPLATE, **options) -> VisualPrefixScorer:
    return VisualPrefixScorer(model, MeanColour(TOKENIZER, len(TOKENIZER)), template, **options)


def row(i: int, image=True) -> Example:
    picture = png(COLOURS[i % 4]) if image else None
    return Example(i, f"what colour {i}?", (["cat", "bon", "emu"][i % 3],), image=picture)


def reference(model, prompt: Prompt, answers: list[int] | None = None) -> np.ndarray:
    """Embeddings laid side by side, one prompt at a time."""
    embed = model.get_input_embeddings()
    pieces = [*((shot, f"{shot.question} {shot.answers[0]}\n") for shot in prompt.demonstrations)]
    pieces.append((prompt.query, prompt.query.question))
    embeds = [embed(torch.tensor([0]))]
    for example, text in pieces:
        if example.image is not None:
            embeds.append(model.projector(MeanColour(TOKENIZER, len(TOKENIZER)).image_features([example.image]))[0])
        embeds.append(embed(torch.tensor(TOKENIZER(text, add_special_tokens=False).input_ids)))
    answer = answers or TOKENIZER(" " + prompt.query.answers[0], add_special_tokens=False).input_ids
    embeds.append(embed(torch.tensor(answer)))
    with torch.no_grad():
        log_probs = model.language_model(inputs_embeds=torch.cat(embeds)[None]).logits[0].double().log_softmax(-1)
    before = len(log_probs) - len(answer) - 1
    return np.array([log_probs[before + t, token] for t, token in enumerate(answer)])


PROMPTS = [
    Prompt(row(9), tuple(row(i, image=i != 2) for i in pair))
    for pair in [(), (0,), (1,), (2,), (0, 1), (1, 0), (2, 1), (3, 1), (0, 0)]
] + [Prompt(row(10, image=False), (row(3), row(1))), Prompt(row(11), (row(5),))]


@pytest.mark.parametrize("share", [True, False])
def test_scores(model, share):
    scorer = scorer_of(model, share_prefixes=share)
    assert scorer.share_prefixes is share
    for prompt, score in zip(PROMPTS, scorer.score(PROMPTS), strict=True):
        np.testing.assert_allclose(score, reference(model, prompt), atol=1e-4)


def test_the_image_counts(model):
    scorer = scorer_of(model)
    other = Example(9, row(9).question, row(9).answers, image=png("white"))
    own, swapped, none = scorer.score([Prompt(row(9)), Prompt(other), Prompt(row(9, image=False))])
    assert len({round(float(score[0]), 4) for score in (own, swapped, none)}) == 3


def test_answers(model):
    scorer = scorer_of(model)
    for prompt, answer in zip(PROMPTS, scorer.answer(PROMPTS, max_new_tokens=3), strict=True):
        (alone,) = scorer_of(model).answer([prompt], max_new_tokens=3)
        assert answer == alone
    closed = scorer_of(model, answers=["cat", "bon", "emu"])
    scores, answers = closed.score(PROMPTS), closed.answer(PROMPTS)
    assert scorer_of(model, answers=["cat", "bon", "emu"]).answer(PROMPTS) == answers
    first = [TOKENIZER(f" {x}", add_special_tokens=False).input_ids[0] for x in ("cat", "bon", "emu")]
    for prompt, score, answer in zip(PROMPTS, scores, answers, strict=True):
        logits = torch.tensor([float(reference(model, prompt, answers=[token])[0]) for token in first])
        assert answer == ("cat", "bon", "emu")[int(logits.argmax())]
        chosen = ("cat", "bon", "emu").index(prompt.query.answers[0])
        assert score[0] == pytest.approx(float(logits.log_softmax(0)[chosen]), abs=1e-4)


def test_an_image_is_encoded_once(model):
    scorer = scorer_of(model)
    scorer.score(PROMPTS)
    assert scorer.processor.calls == 1 and len(scorer._features) == 3  # the colours of rows 0, 1 and 3
    scorer.score(PROMPTS)
    assert scorer.processor.calls == 1


def test_broken_images(model, tmp_path, caplog):
    scorer = scorer_of(model)
    broken = Example(20, "a", ("cat",), image=b"no image")
    missing = Example(21, "a", ("cat",), image=tmp_path / "gone.png")
    prompts = [Prompt(row(1)), Prompt(broken), Prompt(row(2), (missing,)), Prompt(row(1), (row(3),))]
    with caplog.at_level(logging.WARNING, "lever_grpo"):
        scores = scorer.score(prompts)
    assert [score is None for score in scores] == [False, True, True, False]
    assert "query 20 was not asked: the images of [20]" in caplog.text
    assert "query 2 was not asked: the images of [21]" in caplog.text
    assert scorer.problems[prompts[1]] == "the images of [20] cannot be read"
    np.testing.assert_allclose(scores[0], reference(model, prompts[0]), atol=1e-4)


def test_what_was_seen_before_does_not_matter(model):
    fresh, worn = scorer_of(model), scorer_of(model)
    worn.score([Prompt(row(3), (row(1),)), Prompt(row(2))])
    for one, other in zip(fresh.score(PROMPTS), worn.score(PROMPTS), strict=True):
        assert one.tolist() == other.tolist()


def test_half_precision(model):
    expected = scorer_of(model).score(PROMPTS)
    model.language_model.bfloat16()
    scorer = scorer_of(model)
    assert scorer.share_prefixes and scorer.describe()["dtype"] == "bfloat16"
    for one, other in zip(scorer.score(PROMPTS), expected, strict=True):
        np.testing.assert_allclose(one, other, atol=0.3)


def test_parts_must_fit(model):
    with pytest.raises(ValueError, match="vocab_size=300 and num_image_tokens=2, the model needs 265 and 2"):
        VisualPrefixScorer(model, MeanColour(TOKENIZER, 300), TEMPLATE)

    class Wide(MeanColour):
        def image_features(self, images, device=None):
            return torch.zeros(len(images), 5)

    with pytest.raises(ValueError, match="features 5 wide, and the projector reads 3"):
        VisualPrefixScorer(model, Wide(TOKENIZER, len(TOKENIZER)), TEMPLATE).score(PROMPTS)


def test_from_pretrained(model, tmp_path):
    expected = scorer_of(model).score([PROMPTS[-2]])
    model.language_model.save_pretrained(tmp_path / "text")
    TOKENIZER.save_pretrained(tmp_path / "text")
    model.projector.save_pretrained(tmp_path / "projector")
    options = {"dtype": "float32", "template": TEMPLATE}
    scorer = VisualPrefixScorer.from_pretrained(tmp_path / "text", projector=tmp_path / "projector", **options)
    scorer.processor.image_features = MeanColour(TOKENIZER, 1).image_features
    np.testing.assert_allclose(scorer.score([PROMPTS[-2]]), expected, atol=1e-5)


def test_describe_knows_the_projector(model):
    about = scorer_of(model).describe()
    assert about["backend"] == "visual_prefix" and about["image_encoder"] == "efficientnet-lite0"
    with torch.no_grad():
        model.projector.feature_mean += 1
    assert scorer_of(model).describe()["projector_sha256"] != about["projector_sha256"]
