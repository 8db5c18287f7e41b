import pytest
import torch
from small_language_models import TOKENIZER
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, LlamaConfig, LlamaForCausalLM

from lever_grpo.models import (
    VisualPrefixConfig,
    VisualPrefixForConditionalGeneration,
    VisualPrefixProcessor,
    VisualPrefixProjector,
)


def language_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, bos_token_id=0, eos_token_id=1, pad_token_id=1, **sizes))


@pytest.fixture
def model() -> VisualPrefixForConditionalGeneration:
    torch.manual_seed(1)
    projector = VisualPrefixProjector(VisualPrefixConfig(feature_width=6, text_width=16, projector_width=8))
    return VisualPrefixForConditionalGeneration.from_parts(language_model(), projector).eval()


IMAGES = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
# image 1, text, image 0 twice, text
IDS = torch.tensor([[52, 53, 7, 8, 50, 51, 50, 51, 9]])


def test_images_stand_where_their_tokens_do(model):
    embed = model.get_input_embeddings()
    soft = model.projector(IMAGES)
    by_hand = torch.cat([soft[1], embed(torch.tensor([7, 8])), soft[0], soft[0], embed(torch.tensor([9]))])[None]
    expected = model.language_model(inputs_embeds=by_hand).logits
    torch.testing.assert_close(model(IDS, IMAGES).logits, expected)
    moved = IMAGES.clone()
    moved[2] += 1  # not in the prompt
    torch.testing.assert_close(model(IDS, moved).logits, expected)
    moved[1] += 1
    assert (model(IDS, moved).logits - expected).abs().max() > 1e-4


def test_text_alone_is_the_language_model(model):
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(model(ids).logits, model.language_model(ids).logits)
    torch.testing.assert_close(model(ids, IMAGES).logits, model.language_model(ids).logits)


@pytest.mark.parametrize("images", [None, IMAGES[:1]])
def test_an_image_that_is_not_there(model, images):
    with pytest.raises(ValueError, match="hold the token 53.*give the features of all images"):
        model(IDS, images)


def test_only_the_projector_learns(model):
    model(IDS, IMAGES, labels=IDS.clamp(max=49)).loss.backward()
    learning = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learning == {f"projector.{name}" for name, _ in model.projector.named_parameters()}
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.projector.parameters())


def test_generation_reads_images(model):
    greedy = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    generated = model.generate(input_ids=IDS, image_features=IMAGES, **greedy)
    ids = IDS
    for _ in range(4):  # without a cache
        ids = torch.cat([ids, model(ids, IMAGES).logits[:, -1:].argmax(-1)], dim=1)
    assert generated.tolist() == ids.tolist()


def test_parts_stay_as_they_are(model):
    text, ids = language_model(), torch.tensor([[3, 4, 5]])
    before = text(ids).logits
    whole = VisualPrefixForConditionalGeneration.from_parts(text.bfloat16(), model.projector)
    assert whole.dtype == torch.bfloat16 and model.projector.dtype == torch.float32
    torch.testing.assert_close(whole.language_model.float()(ids).logits, before, atol=2e-2, rtol=0)


def test_a_projector_alone_is_no_model(model, tmp_path):
    model.projector.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a projector alone"):
        AutoModelForImageTextToText.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="num_image_tokens=0: an image needs at least 1"):
        VisualPrefixConfig(num_image_tokens=0)


def test_save_and_load(model, tmp_path):
    model.projector.feature_mean += 0.5
    expected = model(IDS, IMAGES).logits
    model.save_pretrained(tmp_path / "whole")
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole").eval()
    assert isinstance(whole, VisualPrefixForConditionalGeneration)
    torch.testing.assert_close(whole(IDS, IMAGES).logits, expected)

    model.projector.save_pretrained(tmp_path / "projector")
    assert (tmp_path / "projector" / "model.safetensors").stat().st_size < 20_000
    projector = VisualPrefixProjector.from_pretrained(tmp_path / "projector")
    again = VisualPrefixForConditionalGeneration.from_parts(model.language_model, projector).eval()
    torch.testing.assert_close(again(IDS, IMAGES).logits, expected)
    assert AutoConfig.from_pretrained(tmp_path / "projector").num_image_tokens == 2


def test_widths_must_agree():
    projector = VisualPrefixProjector(VisualPrefixConfig(feature_width=6, text_width=12))
    with pytest.raises(ValueError, match="text_width=12: the language model's embeddings are 16 wide"):
        VisualPrefixForConditionalGeneration.from_parts(language_model(), projector)


class Encoder(VisualPrefixProcessor):
    """Features without an image encoder: what is given as an image."""

    def image_features(self, images, device=None):
        return torch.stack(images)


def test_processor(model, tmp_path):
    processor = Encoder(TOKENIZER, vocab_size=500, num_image_tokens=2)
    inputs = processor(images=list(IMAGES), text=["<image>ab<image>c", "d<image>"])
    a, b, c, d = (TOKENIZER(x, add_special_tokens=False).input_ids[0] for x in "abcd")
    pad = TOKENIZER.pad_token_id
    assert inputs["input_ids"].tolist() == [[500, 501, a, b, 502, 503, c], [pad] * 4 + [d, 504, 505]]
    assert inputs["attention_mask"].tolist() == [[1] * 7, [0] * 4 + [1] * 3]
    assert torch.equal(inputs["image_features"], IMAGES)
    assert set(processor(text="ab")) == {"input_ids", "attention_mask"}
    with pytest.raises(ValueError, match="1 texts with 1 marks '<image>' and 2 images"):
        processor(images=list(IMAGES[:2]), text="<image>a")

    VisualPrefixProcessor(TOKENIZER, 500, 3).save_pretrained(tmp_path)
    VisualPrefixConfig(text_config=model.language_model.config, text_width=16).save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(again, VisualPrefixProcessor)
    assert (again.vocab_size, again.num_image_tokens, again.image_tokens(1)) == (500, 3, [503, 504, 505])
