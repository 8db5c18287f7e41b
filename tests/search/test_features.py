"""Embeddings by what is written down of them: the same for new rows, saved and loaded."""

import json

import numpy as np
import pytest
import torch
from small_language_models import TOKENIZER, llama

from lever_grpo.data import Example
from lever_grpo.search.features import (
    ENCODERS_FILE,
    FeatureEncoder,
    FeatureMap,
    encode_hidden_states,
    load_encoders,
    save_encoders,
)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    llama().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


def test_map_by_hand():
    raw = np.array([[[1.0, 3.0], [2.0, 0.0]], [[3.0, 3.0], [0.0, 1.0]]])
    fitted = FeatureMap.fit(raw, standardise=True)
    np.testing.assert_allclose(fitted.shift, [[2.0, 3.0], [1.0, 0.5]])
    np.testing.assert_allclose(fitted.scale, [[1.0, 1e-3], [1.0, 0.5]])
    # parts (-1, 0) and (1, -1), each of unit length, then together
    expected = np.array([-1.0, 0.0, 0.5**0.5, -(0.5**0.5)]) / 2**0.5
    np.testing.assert_allclose(fitted(raw)[0], expected)


def test_map_keeps_cosines_on_its_directions():
    rng = np.random.default_rng(0)
    raw = rng.standard_normal((60, 1, 3)) @ rng.standard_normal((3, 12)) + 5
    whole, fitted = FeatureMap.fit(raw), FeatureMap.fit(raw, width=3)
    np.testing.assert_allclose(fitted(raw) @ fitted(raw).T, whole(raw) @ whole(raw).T, atol=1e-9)
    largest = fitted.directions[np.arange(3), np.abs(fitted.directions).argmax(1)]
    assert (largest > 0).all()  # signs are not left to the machine


def test_hidden_states_one_by_one(language_model):
    texts = ["a", "a cat on a can", "bee"]
    states = encode_hidden_states(texts, (1, 2), language_model, batch_size=2)
    assert states.shape == (3, 2, 32)
    network = llama()
    for text, found in zip(texts, states, strict=True):
        ids = TOKENIZER(text, return_tensors="pt").input_ids
        with torch.no_grad():
            layers = network.model(ids, output_hidden_states=True).hidden_states
        np.testing.assert_allclose(found[0], layers[1][0, 1:].mean(0).numpy(), atol=1e-5)
        np.testing.assert_allclose(found[1], layers[2][0, -1].numpy(), atol=1e-5)


def test_saved_and_loaded(tmp_path, language_model):
    rows = [Example(i, text, (text[::-1],)) for i, text in enumerate(["abc", "cab", "bcd", "dab", "add"])]
    encoders = {
        "hidden": FeatureEncoder("hidden_states", "{question} {answer}", language_model, layers=(1, 2)),
        "question": FeatureEncoder("text"),
    }
    raw = encoders["hidden"](rows)
    maps = {"hidden": FeatureMap.fit(raw, width=3, standardise=True)}
    save_encoders(tmp_path, encoders, maps)
    loaded, loaded_maps = load_encoders(tmp_path)
    assert loaded == encoders and loaded_maps.keys() == {"hidden"}
    np.testing.assert_allclose(loaded_maps["hidden"](loaded["hidden"](rows)), maps["hidden"](raw), atol=3e-3)
    assert load_encoders(tmp_path / "nothing") == ({}, {})
    assert encoders["hidden"].of_answer and not encoders["question"].of_answer


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"question": {"kind": "smell"}}, "kind='smell' must be one of"),
        ({"question": {"kind": "text", "template": "?"}}, "must hold"),
        ({"question": {"kind": "text", "layers": [1]}}, "others none"),
        ({"question": {"kind": "hidden_states"}}, "hidden states have layers"),
        ({"question": {"kind": "text", "code": "x"}}, "unknown keys \\['code'\\]"),
        ({"question": 3}, "expected encoders by name"),
        ([], "expected encoders by name"),
    ],
)
def test_bad_files(tmp_path, about, message):
    (tmp_path / ENCODERS_FILE).write_text(json.dumps(about))
    with pytest.raises(ValueError, match=f"encoders.json.*{message}|{message}"):
        load_encoders(tmp_path)


def test_row_without_an_image():
    with pytest.raises(ValueError, match=r"rows \[4\] have no image"):
        FeatureEncoder("image")([Example(4, "?", ("a",))])
