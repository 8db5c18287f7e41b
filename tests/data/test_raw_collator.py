import pickle

import pytest
import torch
from datasets import Dataset
from small_clip import LONGEST, PIXELS, make_processor, png
from torch.utils.data import DataLoader

from lever_grpo.data import BeamDataError, DataCollatorForBeams, DataCollatorForRawBeams, EmbeddingStore, Example
from lever_grpo.data.images import open_image


RED, BLUE, GREEN = png(1, 0, 0), png(0, 0, 1), png(0, 1, 0)
EXAMPLES = [
    Example(3, "what colour?", ("red", "crimson"), image=RED),
    Example(4, "what colour?", ("blue",), image=BLUE),
    Example(7, "what is it?", ("red",), image=RED),
    Example(8, "which is {answer}?", ("it",)),
    Example(9, "what is it?", ("grass",), image=GREEN),
]
ROWS = [
    {
        "query_id": 7,
        "candidate_ids": [3, 9, 4],
        "sequences": [[2, 0], [1], [0, 1]],
        "scores": [-1.0, -2.0, -3.0],
        "survived": [True, False, True],
        "columns": {"correct": [1.0, None, 0.0]},
    },
    {
        "query_id": 9,
        "candidate_ids": [8, 7, 3],
        "sequences": [[1]],
        "scores": [0.5],
        "survived": [False],
        "columns": {"correct": None},
    },
]
# query 7, query 9, candidates 3, 4, 7, 8, 9
TEXTS = ["what is it?", "what is it?", "what colour? red", "what colour? blue", "what is it? red", None, None]
TEXTS[5:] = ["which is it? it", "what is it? grass"]
PICTURES = [RED, GREEN, RED, BLUE, RED, None, GREEN]


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def text_of(processor, ids, mask):
    return processor.tokenizer.decode(ids[mask.bool()], skip_special_tokens=True)


def numbers_of(batch):
    return torch.cat([batch["query_embeds"], batch["candidate_embeds"]])


def test_every_row_has_its_own_image_and_text(processor):
    batch = DataCollatorForRawBeams(EXAMPLES, processor)(ROWS)
    numbers, items = numbers_of(batch), batch["items"]
    assert batch["query_embeds"].shape == (2, 2) and batch["candidate_embeds"].shape == (5, 2)
    assert numbers.dtype == torch.int64
    for (image, text), wanted, picture in zip(numbers.tolist(), TEXTS, PICTURES, strict=True):
        assert text_of(processor, items["input_ids"][text], items["attention_mask"][text]) == wanted
        if picture is None:
            assert image == -1
        else:
            pixels = processor.image_processor(open_image(picture), return_tensors="pt")["pixel_values"][0]
            assert torch.equal(items["pixel_values"][image], pixels)


def test_each_image_and_each_text_is_there_once(processor):
    items = DataCollatorForRawBeams(EXAMPLES, processor)(ROWS)["items"]
    assert items["pixel_values"].shape == (3, 3, PIXELS, PIXELS)  # of 6 rows with images
    # row 7 is a query and a candidate, and its answer is in the candidate's text alone; the queries ask the same
    assert len(items["input_ids"]) == len(items["attention_mask"]) == len(set(TEXTS)) == 6


def test_groups_are_those_of_the_collator_of_embeddings(processor):
    raw = DataCollatorForRawBeams(EXAMPLES, processor)(ROWS)
    store = EmbeddingStore({"id": torch.arange(10, dtype=torch.float32).unsqueeze(1).numpy()})
    plain = DataCollatorForBeams(store, ["id"], ["id"])(ROWS)
    assert raw.keys() - plain.keys() == {"items"} and not plain.keys() - raw.keys()
    for name in plain.keys() - {"query_embeds", "candidate_embeds", "rewards"}:
        assert torch.equal(raw[name], plain[name]), name
    for name, values in plain["rewards"].items():
        assert torch.equal(raw["rewards"][name].nan_to_num(-9), values.nan_to_num(-9))
    # the same rows in the same places: a candidate's text by its id
    by_id = {row.id: f"{row.question} {row.answers[0]}" for row in EXAMPLES} | {8: "which is it? it"}
    for number, row in zip(raw["candidate_embeds"][:, 1], plain["candidate_embeds"][:, 0].tolist(), strict=True):
        items = raw["items"]
        assert text_of(processor, items["input_ids"][number], items["attention_mask"][number]) == by_id[int(row)]


@pytest.mark.parametrize("modality", ["image", "text"])
def test_one_modality_has_one_column_and_its_items_alone(processor, modality):
    rows = [{**ROWS[0]}]  # all of its rows have images
    both, one = (DataCollatorForRawBeams(EXAMPLES, processor, m)(rows) for m in (("text", "image"), (modality,)))
    column = ["image", "text"].index(modality)  # the order of the columns is always this one
    assert torch.equal(numbers_of(one), numbers_of(both)[:, [column]])
    assert set(one["items"]) == ({"pixel_values"} if modality == "image" else {"input_ids", "attention_mask"})
    for name, values in one["items"].items():
        assert torch.equal(values, both["items"][name])


def test_a_batch_without_images_has_none(processor):
    texts = [Example(row.id, row.question, row.answers) for row in EXAMPLES]
    batch = DataCollatorForRawBeams(texts, processor)(ROWS)
    assert batch["items"]["pixel_values"].shape[0] == 0 and (numbers_of(batch)[:, 0] == -1).all()


def test_templates_make_the_texts(processor):
    templates = {"query_template": "Q: {question}", "candidate_template": "{answer}! {question}"}
    batch = DataCollatorForRawBeams(EXAMPLES, processor, ["text"], **templates)(ROWS[:1])
    texts = [
        text_of(processor, *pair)
        for pair in zip(batch["items"]["input_ids"], batch["items"]["attention_mask"], strict=True)
    ]
    assert texts == ["Q: what is it?", "red! what colour?", "blue! what colour?", "grass! what is it?"]


def test_texts_are_padded_on_the_right_and_long_ones_are_cut_with_a_warning(processor):
    long = [*EXAMPLES[:-1], Example(9, "word " * 30, ("grass",), image=GREEN)]
    with pytest.warns(UserWarning, match=f"longer than max_length={LONGEST} tokens and are cut"):
        items = DataCollatorForRawBeams(long, processor)(ROWS)["items"]
    assert items["input_ids"].shape[1] == LONGEST
    mask = items["attention_mask"]
    assert (mask.diff(dim=1) <= 0).all() and mask[:, 0].all() and not mask.all()
    ends = items["input_ids"].gather(1, mask.sum(1, keepdim=True) - 1)
    assert (ends == processor.tokenizer.eos_token_id).all()  # the end is kept, also of what is cut
    short = DataCollatorForRawBeams(EXAMPLES, processor, max_length=30)(ROWS)["items"]["input_ids"]
    assert short.shape[1] < 30


def test_files_are_opened_and_a_broken_image_is_named(processor, tmp_path):
    (tmp_path / "red.png").write_bytes(RED)
    (tmp_path / "broken.png").write_bytes(BLUE[:40])
    from_file = [Example(row.id, row.question, row.answers, row.image and tmp_path / "red.png") for row in EXAMPLES]
    pixels = DataCollatorForRawBeams(from_file, processor)(ROWS)["items"]["pixel_values"]
    expected = processor.image_processor(open_image(RED), return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, expected)  # one file, one image
    for broken in (tmp_path / "broken.png", tmp_path / "missing.png", b"no image", BLUE[:-30]):
        rows = [*EXAMPLES[:1], Example(4, "what colour?", ("blue",), broken), *EXAMPLES[2:]]
        with pytest.raises(BeamDataError, match="row 4: its image cannot be decoded"):
            DataCollatorForRawBeams(rows, processor)(ROWS)


def test_loader_with_workers_and_pickle(processor):
    collate = DataCollatorForRawBeams(EXAMPLES, processor)
    assert pickle.loads(pickle.dumps(collate))(ROWS)["query_ids"].tolist() == [7, 9]
    loader = DataLoader(Dataset.from_list(ROWS), batch_size=2, collate_fn=collate, num_workers=1)
    (batch,) = loader
    assert torch.equal(batch["items"]["input_ids"], collate(ROWS)["items"]["input_ids"])


def test_bad_input_is_named(processor):
    with pytest.raises(BeamDataError, match="not among the 3 examples: 3, 4"):
        DataCollatorForRawBeams(EXAMPLES[2:], processor)(ROWS)
    with pytest.raises(BeamDataError, match=r"rows \[8\] have no image"):
        DataCollatorForRawBeams(EXAMPLES, processor, ["image"])(ROWS)
    with pytest.raises(BeamDataError, match="query 7.*pool of 3.*5"):
        DataCollatorForRawBeams(EXAMPLES, processor)([{**ROWS[0], "sequences": [[0, 5], [1], [2]]}])
    with pytest.raises(ValueError, match="an id twice"):
        DataCollatorForRawBeams(EXAMPLES + EXAMPLES[:1], processor)
    with pytest.raises(ValueError, match=r"modalities=\['sound'\]: must be 'image', 'text' or both"):
        DataCollatorForRawBeams(EXAMPLES, processor, ["sound"])
    with pytest.raises(ValueError, match=r"query_template='\{answer\}' holds \{answer\}, which a query does not show"):
        DataCollatorForRawBeams(EXAMPLES, processor, query_template="{answer}")
    endless = make_processor()
    endless.tokenizer.model_max_length = int(1e30)
    with pytest.raises(ValueError, match="max_length=None, and the tokenizer has no limit either"):
        DataCollatorForRawBeams(EXAMPLES, endless)
