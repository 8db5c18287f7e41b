import json

import pytest
from transformers import AutoConfig

from lever_grpo import PointerSelectorConfig


def test_presets_say_encoder_and_state_update_and_keep_what_is_given():
    kinds = {name: PointerSelectorConfig.from_preset(name) for name in PointerSelectorConfig.presets}
    assert {name: (config.encoder, config.state_update) for name, config in kinds.items()} == {
        "prior": ("none", "gated"),
        "v1": ("bi_encoder", "additive"),
        "v2": ("cross_attention", "gated"),
        "v3": ("cross_attention", "gated"),
    }
    config = PointerSelectorConfig.from_preset("v1", embed_dim=12, state_update="gated", dropout=0.0)
    assert (config.encoder, config.state_update, config.embed_dim, config.dropout) == ("bi_encoder", "gated", 12, 0.0)


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="preset='v9' is unknown; the presets are prior, v1, v2, v3"):
        PointerSelectorConfig.from_preset("v9")


def test_one_unnamed_feature_has_the_width_embed_dim():
    config = PointerSelectorConfig(embed_dim=12)
    assert config.query_features == config.candidate_features == {"embedding": 12}
    assert config.prior_pairs == {"embedding:embedding": 1.0}


def test_by_default_the_prior_mixes_shared_features_equally_and_has_the_other_pairs_at_zero():
    config = PointerSelectorConfig(
        query_features={"text": 4, "image": 3, "topic": 2}, candidate_features={"image": 3, "text": 4, "answer": 4}
    )
    assert config.prior_pairs == {"text:text": 0.5, "text:answer": 0.0, "image:image": 0.5}


def test_a_saved_config_comes_back_with_its_features_in_order(tmp_path):
    config = PointerSelectorConfig.from_preset(
        "v1",
        query_features={"question": 4, "image": 3},
        candidate_features={"question": 4, "image": 3, "answer": 4},
        similarity_prior=True,
        prior_pairs={"question:question": 1.0, "image:image": 0.5, "question:answer": 0.0},
        num_set_layers=2,
        prior_scale=7.0,
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is PointerSelectorConfig
    saved, back = config.to_dict(), loaded.to_dict()
    assert {name: back[name] for name in saved if name != "_name_or_path"} == {
        name: value for name, value in saved.items() if name != "_name_or_path"
    }
    # the order is that of the embeddings' columns and of the prior's weights: dict equality would not see it change
    for name in ("query_features", "candidate_features", "prior_pairs"):
        assert list(getattr(loaded, name).items()) == list(getattr(config, name).items())
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "pointer_selector"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "lstm"}, "encoder='lstm': must be one of none, bi_encoder, cross_attention"),
        ({"encoder": "none"}, "encoder='none' leaves the prior alone to decide; set similarity_prior=True"),
        ({"state_update": "sum"}, "state_update='sum': must be one of additive, gated"),
        ({"hidden_dim": 6}, "hidden_dim=6 is not a multiple of num_attention_heads=4"),
        ({"hidden_dim": 0}, "hidden_dim=0"),
        ({"num_attention_heads": 0}, "num_attention_heads=0: must be at least 1"),
        ({"num_layers": -1}, "num_layers=-1: must be at least 0"),
        ({"num_set_layers": -1}, "num_set_layers=-1: must be at least 0"),
        ({"prior_rank": -1}, "prior_rank=-1: must be at least 0"),
        ({"dropout": 1.0}, r"dropout=1.0: must be in \[0, 1\)"),
        ({"dropout": -0.1}, r"dropout=-0.1: must be in \[0, 1\)"),
        ({"prior_dropout": 1.0}, r"prior_dropout=1.0: must be in \[0, 1\)"),
        ({"prior_scale": 0.0}, "prior_scale=0.0: must be above 0"),
        ({"embed_dim": 0}, r"query_features\['embedding'\]=0: a width is at least 1"),
        ({"candidate_features": {"text": 0}}, r"candidate_features\['text'\]=0"),
        ({"query_features": {"a:b": 2}}, "query_features has the name 'a:b'"),
        ({"candidate_features": {"a.b": 2}}, "candidate_features has the name 'a.b'"),
        (
            {"similarity_prior": True, "query_features": {"a": 2}, "candidate_features": {"b": 2}},
            r"share no feature of one width \(\{'a': 2\} and \{'b': 2\}\)",
        ),
        (
            {"similarity_prior": True, "query_features": {"a": 2}, "candidate_features": {"a": 3}},
            "share no feature of one",
        ),
        ({"similarity_prior": True, "prior_pairs": {"embedding": 1.0}}, "prior_pairs has 'embedding' with widths"),
        (
            {
                "similarity_prior": True,
                "query_features": {"a": 2},
                "candidate_features": {"b": 3},
                "prior_pairs": {"a:b": 1.0},
            },
            "prior_pairs has 'a:b' with widths 2 and 3",
        ),
        ({"similarity_prior": True, "prior_pairs": {"embedding:image": 1.0}}, "widths 768 and None"),
    ],
)
def test_a_bad_value_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PointerSelectorConfig(**options)


def test_pairs_are_not_judged_without_a_prior():
    PointerSelectorConfig(query_features={"a": 2}, candidate_features={"b": 3})
