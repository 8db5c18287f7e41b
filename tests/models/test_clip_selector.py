"""The end-to-end selector against a plain pointer selector that is fed with what CLIP makes of one item at a time."""

import copy

import pytest
import torch
from small_clip import LONGEST, PIXELS, WIDTH, clip_config, coloured_examples, make_clip, make_processor
from transformers import AutoConfig, AutoModel

from lever_grpo import PointerSelector, PointerSelectorConfig
from lever_grpo.data.images import open_image
from lever_grpo.models import PRESETS, ClipSelector, ClipSelectorConfig
from lever_grpo.search.encoders import encode_images, encode_texts


SMALL = {"hidden_dim": 8, "num_attention_heads": 2, "prior_rank": 2, "lora_rank": 2}
MODALITIES = [["image", "text"], ["image"], ["text"]]
IMAGES, TEXTS = 4, 5
NUMBERS = {  # image, text: rows 0 and 1 of the candidates share an image with the first query, row 2 has none
    "query_embeds": torch.tensor([[0, 0], [2, 1]]),
    "candidate_embeds": torch.tensor([[0, 2], [0, 3], [-1, 4], [1, 2]]),
}
INDICES = torch.tensor([[3, 0, 2], [1, 2, 3]])
SEQUENCES = torch.tensor([[[0, 2], [2, 1]], [[1, 0], [2, 0]]])


def make_selector(trained=True, **options) -> ClipSelector:
    """In double precision; `trained` moves every weight that can be."""
    torch.manual_seed(0)
    selector = ClipSelector.from_clip(make_clip(), **{**SMALL, **options}).double().eval()
    if trained:
        with torch.no_grad():
            for parameter in selector.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn_like(parameter))
    return selector


def make_items(modalities=("image", "text"), seed=0) -> dict:
    """Images, and texts of 3 to 7 tokens, of which the last is the end."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(IMAGES, 3, PIXELS, PIXELS, generator=generator, dtype=torch.float64)
    lengths = torch.arange(TEXTS) + 3
    ids = torch.randint(2, 200, (TEXTS, 7), generator=generator)
    ids[torch.arange(TEXTS), lengths - 1] = 1
    mask = (torch.arange(7) < lengths[:, None]).long()
    items = {"pixel_values": pixels} if "image" in modalities else {}
    # padded with the end token, as CLIP's tokenizer does
    return items | ({"input_ids": ids * mask + (1 - mask), "attention_mask": mask} if "text" in modalities else {})


def make_batch(modalities=("image", "text"), **changes) -> dict:
    columns = [("image", "text").index(name) for name in modalities]
    numbers = {name: table[:, columns] for name, table in NUMBERS.items()}
    if columns == [0]:  # rows with one image would be as good as each other
        numbers["candidate_embeds"] = torch.arange(4).unsqueeze(1)
    return {**numbers, "candidate_indices": INDICES, **make_items(modalities), **changes}


def reference_embeds(selector: ClipSelector, numbers: torch.Tensor, items: dict) -> torch.Tensor:
    """By a CLIPModel into whose weights the adapters are added by hand, one item at a time and without padding."""
    model, config = make_clip().double(), selector.config
    adapters = {name: value for name, value in selector.encoders.named_parameters() if "lora_" in name}
    places = {"image": "vision_model", "text": "text_model"}
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, down in adapters.items():
            if "lora_A" in name:
                modality, _, path = name.partition(".")
                assert path.startswith(places[modality])
                up = adapters[name.replace("lora_A", "lora_B")]
                base = path.replace(".lora_A.default", "")
                weights[base].add_(config.lora_alpha / config.lora_rank * up @ down)
        rows = []
        for row in numbers.tolist():
            parts = []
            for modality, item in zip(config.modalities, row, strict=True):
                if item == -1:
                    parts.append(torch.zeros(WIDTH, dtype=torch.float64))
                    continue
                if modality == "image":
                    output = model.get_image_features(items["pixel_values"][item : item + 1])
                else:
                    length = items["attention_mask"][item].sum()
                    output = model.get_text_features(items["input_ids"][item : item + 1, :length])
                embedding = output.pooler_output[0]
                parts.append(embedding / embedding.square().sum().sqrt())
            rows.append(torch.cat(parts))
    return torch.stack(rows)


def plain_selector(selector: ClipSelector) -> PointerSelector:
    """The pointer network alone."""
    features = {name: WIDTH for name in selector.config.modalities}
    options = {name: getattr(selector.config, name) for name in ("hidden_dim", "num_attention_heads", "prior_rank")}
    prior = selector.config.similarity_prior
    plain = PointerSelector(
        PointerSelectorConfig(query_features=features, candidate_features=features, similarity_prior=prior, **options)
    )
    weights = {name: value for name, value in selector.state_dict().items() if not name.startswith("encoders.")}
    plain.double().load_state_dict(weights)
    return plain.eval()


@torch.no_grad()
@pytest.mark.parametrize("modalities", MODALITIES)
@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("rank", [0, 2])
def test_it_is_a_pointer_selector_on_what_clip_makes(modalities, prior, rank):
    selector = make_selector(modalities=modalities, similarity_prior=prior, lora_rank=rank)
    batch = make_batch(modalities)
    items = {name: batch.pop(name) for name in make_items(modalities)}
    embeds = {name: reference_embeds(selector, batch[name], items) for name in NUMBERS}
    plain, shared = plain_selector(selector), {"candidate_indices": INDICES}

    expected = plain(**embeds, **shared, sequences=SEQUENCES, return_step_log_probs=True)
    output = selector(**batch, **items, sequences=SEQUENCES, return_step_log_probs=True)
    torch.testing.assert_close(output.log_probs, expected.log_probs, atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(output.step_log_probs, expected.step_log_probs, atol=1e-9, rtol=1e-7)
    assert output.log_probs.std() > 0.01  # not a constant
    own = {"query_embeds": batch["query_embeds"], "candidate_embeds": batch["candidate_embeds"][INDICES]}
    pools = selector(**own, **items, sequences=SEQUENCES)  # (B, K, M) in the place of (U, M) and indices
    torch.testing.assert_close(pools.log_probs, expected.log_probs, atol=1e-9, rtol=1e-7)
    picks = selector.select(**batch, **items, num_shots=2, num_beams=3, num_return_sequences=2)
    wanted = plain.select(**embeds, **shared, num_shots=2, num_beams=3, num_return_sequences=2)
    assert torch.equal(picks.sequences, wanted.sequences)
    torch.testing.assert_close(picks.scores, wanted.scores, atol=1e-9, rtol=1e-7)


@torch.no_grad()
def test_candidates_can_be_embedded_once():
    selector, batch = make_selector(), make_batch()
    items = {name: batch.pop(name) for name in make_items()}
    embeds = {name: selector.embed(batch[name], **items) for name in NUMBERS}
    parts = embeds["candidate_embeds"].split(WIDTH, dim=-1)
    ones = torch.ones(4, dtype=torch.float64)
    torch.testing.assert_close(parts[1].norm(dim=-1), ones)
    torch.testing.assert_close(parts[0].norm(dim=-1), torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64))
    expected = selector(**batch, **items, sequences=SEQUENCES).log_probs
    encoded = selector.encode_candidates(embeds["candidate_embeds"])
    given = {"query_embeds": embeds["query_embeds"], "candidate_embeds": encoded, "candidate_indices": INDICES}
    torch.testing.assert_close(selector(**given, sequences=SEQUENCES).log_probs, expected, atol=1e-12, rtol=0)
    picks = selector.select(**batch, **items, num_shots=2)
    assert torch.equal(selector.select(**given, num_shots=2).sequences, picks.sequences)
    # embeddings of the right width, which may be of a CLIP without the adapters
    for call in (selector.select, lambda **inputs: selector(**inputs, sequences=SEQUENCES)):
        with pytest.raises(ValueError, match="embeddings would pass its adapters by"):
            call(**embeds, candidate_indices=INDICES)
        with pytest.raises(ValueError, match="embeddings would pass its adapters by"):
            call(**{**batch, **items, "candidate_embeds": embeds["candidate_embeds"]})


@torch.no_grad()
@pytest.mark.parametrize("group", [1, 4])
def test_each_item_is_encoded_once_a_forward_pass(group):
    selector, batch = make_selector(), make_batch()
    seen = []
    selector.encoders["image"].vision_model.embeddings.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(("image", len(args[0] if args else kwargs["pixel_values"]))),
        with_kwargs=True,
    )
    selector.encoders["text"].text_model.embeddings.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(("text", len(kwargs["input_ids"]))), with_kwargs=True
    )
    selector(**batch, sequences=SEQUENCES[:, :1].expand(-1, group, -1))
    assert seen == [("image", IMAGES), ("text", TEXTS)]  # 6 rows, 3 picks of each of 2 pools
    seen.clear()
    selector.select(**batch, num_shots=3, num_beams=2)
    assert seen == [("image", IMAGES), ("text", TEXTS)]


@torch.no_grad()
def test_padding_and_items_of_other_rows_change_nothing():
    selector, batch = make_selector(), make_batch()
    expected = selector(**batch, sequences=SEQUENCES).log_probs
    longer = torch.cat([batch["input_ids"], torch.randint(2, 200, (TEXTS, 9))], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.zeros(TEXTS, 9, dtype=torch.long)], dim=1)
    more = {
        "input_ids": torch.cat([longer, torch.randint(2, 200, (2, 16))]),
        "attention_mask": torch.cat([mask, torch.ones(2, 16, dtype=torch.long)]),
        "pixel_values": torch.cat([batch["pixel_values"], torch.randn(4, 3, PIXELS, PIXELS)]),
    }
    output = selector(**{**batch, **more}, sequences=SEQUENCES).log_probs
    torch.testing.assert_close(output, expected, atol=1e-10, rtol=0)
    order = torch.tensor([4, 2, 0, 1, 3])  # another order of the texts
    moved = {name: batch[name][order] for name in ("input_ids", "attention_mask")}
    for side in NUMBERS:
        moved[side] = torch.stack([batch[side][:, 0], order.argsort()[batch[side][:, 1]]], dim=1)
    torch.testing.assert_close(selector(**{**batch, **moved}, sequences=SEQUENCES).log_probs, expected)


@torch.no_grad()
def test_a_batch_without_images_needs_no_image_encoder():
    selector, batch = make_selector(similarity_prior=True), make_batch()
    without = {name: torch.stack([-torch.ones(len(x), dtype=torch.long), x[:, 1]], 1) for name, x in NUMBERS.items()}
    expected = selector(**{**batch, **without}, sequences=SEQUENCES).log_probs
    selector.encoders["image"].forward = None  # would fail if it were called
    nothing = {"pixel_values": torch.zeros(0, 3, 1, 1)}
    output = selector(**{**batch, **without, **nothing}, sequences=SEQUENCES).log_probs
    assert output.isfinite().all() and torch.equal(output, expected)


# ---- what learns ----


def loss_of(selector, batch):
    weights = torch.tensor([[[1.0, -2.0], [0.5, 1.0]], [[-1.0, 1.5], [2.0, 0.3]]], dtype=torch.float64)
    return (selector(**batch, sequences=SEQUENCES).log_probs * weights).sum()


@pytest.mark.parametrize("modalities", MODALITIES)
@pytest.mark.parametrize("rank", [0, 2])
def test_adapters_and_the_pointer_network_learn_and_clip_stays(modalities, rank):
    selector = make_selector(modalities=modalities, lora_rank=rank, similarity_prior=True)
    assert set(selector.encoders) == set(modalities)
    start = copy.deepcopy(selector.state_dict())
    learning = {name for name, p in selector.named_parameters() if p.requires_grad}
    adapters = {name for name in learning if name.startswith("encoders.")}
    assert all("lora_" in name for name in adapters)
    # two layers, two targets, A and B
    assert len(adapters) == (8 * len(modalities) if rank else 0)
    assert learning - adapters == {name for name in start if not name.startswith("encoders.")}

    optimizer = torch.optim.AdamW(selector.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(selector, make_batch(modalities)).backward()
        assert {name for name, p in selector.named_parameters() if p.grad is not None} == learning
        assert all(p.grad.isfinite().all() for p in selector.parameters() if p.grad is not None)
        optimizer.step()
    moved = {name for name, value in selector.state_dict().items() if not torch.equal(value, start[name])}
    # a shift of all keys shifts all attention scores alike: its gradient is zero, and weight decay all that moves it
    assert moved | {"layers.0.k_proj.bias"} == learning | {"layers.0.k_proj.bias"}


def test_gradients_are_those_of_finite_differences():
    selector, batch = make_selector(), make_batch()
    loss_of(selector, batch).backward()
    checked = [(name, p) for name, p in selector.named_parameters() if "lora_" in name]
    for name, parameter in checked:
        direction, values = torch.randn_like(parameter), []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.add_(step * direction)
                values.append(loss_of(selector, batch))
                parameter.sub_(step * direction)
        numeric = (values[0] - values[1]) / 2e-5
        torch.testing.assert_close((parameter.grad * direction).sum(), numeric, atol=1e-7, rtol=1e-5, msg=name)
    assert sum(float(p.grad.abs().sum()) > 1e-4 for _, p in checked) == len(checked)


def test_gradient_checkpointing_changes_no_gradient():
    selector, batch = make_selector(lora_dropout=0.0, dropout=0.0).train(), make_batch()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            selector.gradient_checkpointing_enable()
        assert selector.encoders["text"].text_model.encoder.layers[0].gradient_checkpointing is checkpointing
        selector.zero_grad()
        loss_of(selector, batch).backward()
        gradients.append({name: p.grad.clone() for name, p in selector.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, msg=name)


def test_bf16_autocast_is_finite_and_near():
    selector, batch = make_selector(similarity_prior=True, prior_scale=3.0).float(), make_batch()
    batch["pixel_values"] = batch["pixel_values"].float()
    expected = selector(**batch, sequences=SEQUENCES).log_probs
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = selector(**batch, sequences=SEQUENCES).log_probs
    output.sum().backward()
    assert output.dtype == torch.float32
    torch.testing.assert_close(output.exp(), expected.exp(), atol=0.1, rtol=0)
    assert all(p.grad.isfinite().all() for p in selector.parameters() if p.grad is not None)


# ---- checkpoints ----


@pytest.mark.parametrize("modalities", MODALITIES)
@pytest.mark.parametrize("rank", [0, 2])
def test_a_saved_selector_comes_back_as_it_was(modalities, rank, tmp_path):
    selector = make_selector(modalities=modalities, lora_rank=rank, similarity_prior=True).float()
    batch = {n: x.float() if x.is_floating_point() else x for n, x in make_batch(modalities).items()}
    selector.save_pretrained(tmp_path)
    torch.manual_seed(99)
    loaded, about = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is ClipSelector and not loaded.training
    assert not any(about[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert loaded.state_dict().keys() == selector.state_dict().keys()
    for name, value in selector.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    with torch.no_grad():
        expected, output = (model(**batch, sequences=SEQUENCES).log_probs for model in (selector, loaded))
    assert torch.equal(output, expected)
    trainable = {name for name, p in selector.named_parameters() if p.requires_grad}
    for again in (loaded, AutoModel.from_pretrained(tmp_path), ClipSelector.from_pretrained(tmp_path)):
        assert {name for name, p in again.named_parameters() if p.requires_grad} == trainable


def test_from_clip_takes_a_folder_or_a_model_and_copies_its_weights(tmp_path):
    clip = make_clip()
    clip.save_pretrained(tmp_path)
    weights = copy.deepcopy(clip.state_dict())
    torch.manual_seed(1)
    selectors = [ClipSelector.from_clip(source, **SMALL) for source in (clip, tmp_path)]
    assert selectors[0].config.clip_name is None and selectors[1].config.clip_name == str(tmp_path)
    for selector in selectors:
        copied = 0
        for encoder in selector.encoders.values():
            for name, parameter in encoder.named_parameters():
                if "lora_B" in name:
                    assert (parameter == 0).all()
                elif "lora_" not in name:
                    assert torch.equal(parameter, weights[name.replace(".base_layer", "")]), name
                    copied += 1
        assert copied == len(weights) - 1  # all but the scale of the contrastive loss
    with torch.no_grad():
        selectors[0].encoders["image"].visual_projection.weight.zero_()
    assert clip.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in clip.state_dict().items())


@torch.no_grad()
def test_untrained_it_sees_what_the_embeddings_of_the_package_hold(tmp_path):
    clip, processor, (examples, _) = make_clip(), make_processor(), coloured_examples()
    clip.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    texts, images = [row.question for row in examples[:4]], [row.image for row in examples[:4]]
    expected = [encode_images(images, tmp_path), encode_texts(texts, tmp_path)]
    items = processor.tokenizer(texts, padding=True, return_tensors="pt")
    pixels = processor.image_processor([open_image(image) for image in images], return_tensors="pt")["pixel_values"]
    selector = ClipSelector.from_clip(tmp_path, **SMALL).eval()
    numbers = torch.arange(4).unsqueeze(1).expand(-1, 2)
    embeds = selector.embed(numbers, pixels, items["input_ids"], items["attention_mask"])
    torch.testing.assert_close(embeds, torch.cat([torch.from_numpy(x) for x in expected], dim=1), atol=1e-5, rtol=1e-4)


# ---- configuration ----


def test_the_preset_is_the_pointer_network_of_v2_on_adapters(tmp_path):
    assert PRESETS["v2_lora"] is ClipSelector
    config = ClipSelectorConfig.from_preset("v2_lora", clip_config=clip_config(), clip_name="some/clip", lora_rank=3)
    v2 = PointerSelectorConfig.from_preset("v2")
    for name in ("encoder", "state_update", "scoring", "num_layers", "num_set_layers", "hidden_dim"):
        assert getattr(config, name) == getattr(v2, name)
    assert config.query_features == config.candidate_features == {"image": WIDTH, "text": WIDTH}
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is ClipSelectorConfig and loaded.clip_config.text_config.max_position_embeddings == LONGEST
    saved = {
        name: value
        for name, value in config.to_dict().items()
        if name not in ("transformers_version", "_name_or_path")
    }
    assert {name: loaded.to_dict()[name] for name in saved} == saved


def test_the_given_configuration_of_clip_is_left_alone():
    given = clip_config()
    config = ClipSelectorConfig(clip_config=given)
    assert config.clip_config.text_config.projection_dim == WIDTH != given.text_config.projection_dim


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modalities": ["sound"]}, r"modalities=\['sound'\]: must be \['image', 'text'\]"),
        ({"modalities": []}, r"modalities=\[\]: must be"),
        ({"modalities": ["text", "image"]}, r"modalities=\['text', 'image'\]: must be"),
        ({"lora_rank": -1}, "lora_rank=-1: must be at least 0"),
        ({"lora_alpha": 0.0}, "lora_alpha=0.0: must be above 0"),
        ({"lora_dropout": 1.0}, r"lora_dropout=1.0: must be in \[0, 1\)"),
        ({"query_features": {"question": 384}}, r"query_features=\{'question': 384\}: this selector sees rows by"),
        ({"hidden_dim": 6}, "hidden_dim=6 is not a multiple"),
    ],
)
def test_a_bad_value_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ClipSelectorConfig(**{"clip_config": clip_config(), **options})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"query_embeds": torch.zeros(2, 1, dtype=torch.long)},
            r"torch.int64 of shape \(2, 1\), expected .* 2 columns",
        ),
        ({"candidate_embeds": NUMBERS["candidate_embeds"][:, :1]}, r"of shape \(4, 1\), expected .* 2 columns, for"),
        ({"candidate_embeds": torch.zeros(4, 2)}, "torch.float32 was given"),
        ({"pixel_values": None}, "are item numbers, and pixel_values is None"),
        ({"input_ids": None}, "are item numbers, and input_ids is None"),
    ],
)
def test_items_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        make_selector()(**{**make_batch(), **change}, sequences=SEQUENCES)
