import math
import pickle

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from lever_grpo.data import BeamDataError, DataCollatorForBeams, EmbeddingStore, split_by_query
from lever_grpo.data.collator import LazyDataset, collate_groups


QUESTION = np.arange(40, dtype=np.float16).reshape(20, 2)
ANSWER = -np.arange(20, dtype=np.float16).reshape(20, 1)
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
        "query_id": 8,
        "candidate_ids": [9, 2],
        "sequences": [[1]],
        "scores": [0.5],
        "survived": [False],
        "columns": {"correct": None},
    },
]


@pytest.fixture
def collate():
    store = EmbeddingStore({"question": QUESTION, "answer": ANSWER})
    return DataCollatorForBeams(store, ["question"], ["question", "answer"])


def test_batch_holds_every_group(collate):
    batch = collate(ROWS)
    assert batch["query_ids"].tolist() == [7, 8]
    assert batch["query_embeds"].dtype == torch.float32 and batch["query_embeds"].tolist() == [[14, 15], [16, 17]]
    assert batch["candidate_embeds"].shape == (4, 3)  # 9 is in both pools and is looked up once
    for b, row in enumerate(ROWS):
        k, g = len(row["candidate_ids"]), len(row["sequences"])
        assert batch["candidate_mask"][b].tolist() == [True] * k + [False] * (3 - k)
        pool = batch["candidate_embeds"][batch["candidate_indices"][b, :k]]
        assert pool[:, 0].tolist() == [2 * i for i in row["candidate_ids"]]
        assert pool[:, 2].tolist() == [-i for i in row["candidate_ids"]]
        for j, sequence in enumerate(row["sequences"]):
            assert batch["sequences"][b, j][batch["sequence_mask"][b, j]].tolist() == sequence
        assert batch["sequence_mask"][b].sum(-1).tolist() == [len(s) for s in row["sequences"]] + [0] * (3 - g)
        assert batch["rewards"]["score"][b].tolist() == row["scores"] + [0.0] * (3 - g)
        assert batch["survived"][b].tolist() == row["survived"] + [False] * (3 - g)
    assert batch["sequences"].dtype == batch["candidate_indices"].dtype == torch.int64
    assert batch["rewards"]["score"].dtype == torch.float32


def test_padding_is_zero(collate):
    batch = collate(ROWS)
    assert batch["sequences"][~batch["sequence_mask"]].eq(0).all()
    assert batch["candidate_indices"][~batch["candidate_mask"]].eq(0).all()


def test_an_unknown_reward_is_nan_and_padding_is_zero(collate):
    correct = collate(ROWS)["rewards"]["correct"].tolist()
    assert correct[0][0] == 1.0 and math.isnan(correct[0][1]) and correct[0][2] == 0.0
    assert math.isnan(correct[1][0]) and correct[1][1:] == [0.0, 0.0]


def test_a_group_is_the_same_alone_and_in_a_batch(collate):
    alone, both = collate(ROWS[1:]), collate(ROWS)
    assert alone["sequences"].tolist() == [[[1]]] and both["sequences"][1, 0].tolist() == [1, 0]
    pool = lambda batch, b: batch["candidate_embeds"][batch["candidate_indices"][b, :2]]  # noqa: E731
    assert torch.equal(pool(alone, 0), pool(both, 1))


def test_loader_with_workers_and_pickle(tmp_path):
    np.save(tmp_path / "question.npy", QUESTION)
    collate = DataCollatorForBeams(EmbeddingStore.open(tmp_path / "question.npy"), ["question"], ["question"])
    assert pickle.loads(pickle.dumps(collate))(ROWS)["query_ids"].tolist() == [7, 8]
    loader = DataLoader(Dataset.from_list(ROWS), batch_size=1, collate_fn=collate, num_workers=1)
    assert [batch["query_ids"].item() for batch in loader] == [7, 8]


@pytest.mark.parametrize(
    "dataset",
    [
        Dataset.from_list(ROWS),
        Dataset.from_list([*ROWS, *ROWS]).select([3, 0]),  # an index between row and place
        Dataset.from_list([{name: row[name] for name in ROWS[0] if name != "survived"} for row in ROWS]),
        Dataset.from_list([{**ROWS[0], "columns": None}, {**ROWS[1], "columns": {"correct": [0.25]}}]),
        Dataset.from_list([{**row, "survived": None} for row in ROWS]),
    ],
    ids=["as it is", "selected", "no survived", "no columns in a row", "null survived"],
)
def test_rows_in_arrow_give_the_same_batch_as_dicts(dataset):
    rows = LazyDataset(dataset).__getitems__([1, 0])
    plain = [dataset[1], dataset[0]]
    assert [dict(row) for row in rows] == plain and len(rows) == 2
    for row in plain:
        row["columns"] = row["columns"] or {"correct": None}
    (groups, ids), (expected, expected_ids) = collate_groups(rows), collate_groups(plain)
    assert ids.tolist() == expected_ids.tolist()
    groups, expected = ({**found.pop("rewards"), **found} for found in (groups, expected))
    assert groups.keys() == expected.keys()
    for name, value in expected.items():
        assert groups[name].dtype == value.dtype
        torch.testing.assert_close(groups[name], value, rtol=0, atol=0, equal_nan=True)


def test_bad_rows_in_arrow_are_named():
    bad = [{**ROWS[0], "sequences": [[0, 5], [1], [2]]}, {**ROWS[1], "scores": [1.0, 2.0]}]
    bad += [{**ROWS[0], "candidate_ids": []}, {**ROWS[1], "scores": [-1e300]}]
    rows = LazyDataset(Dataset.from_list(bad))
    for index, match in enumerate(["query 7.*pool of 3.*5", "query 8.*expected 1 values of 'scores'.*found 2"]):
        with pytest.raises(BeamDataError, match=match):
            collate_groups(rows.__getitems__([index]))
    with pytest.raises(BeamDataError, match="query 7: expected at least one candidate"):
        collate_groups(rows.__getitems__([2]))
    with pytest.raises(BeamDataError, match="query 8: expected 'scores' in the range of float32.*-1e[+]300"):
        collate_groups(rows.__getitems__([3]))


def test_widths_say_what_lies_side_by_side(collate):
    assert collate.query_widths == {"question": 2} and collate.candidate_widths == {"question": 2, "answer": 1}


def test_bad_input_is_named(collate):
    with pytest.raises(BeamDataError, match="query 7.*pool of 3.*5"):
        collate([{**ROWS[0], "sequences": [[0, 5], [1], [2]]}])
    with pytest.raises(BeamDataError, match="query 8.*expected 1 values of 'scores'.*found 2"):
        collate([{**ROWS[1], "scores": [1.0, 2.0]}])
    with pytest.raises(BeamDataError, match="found 1 others: 99"):
        collate([{**ROWS[1], "query_id": 99}])
    with pytest.raises(BeamDataError, match="audio"):
        DataCollatorForBeams(collate.store, ["audio"], ["question"])


# ---------------------------------------------------------------- splits


def groups(n=30):
    return Dataset.from_dict({"query_id": [q for q in range(n) for _ in range(1 + q % 3)]})


def test_split_never_separates_a_query():
    parts = split_by_query(groups(), test_size=0.2, seed=3)
    train, test = set(parts["train"]["query_id"]), set(parts["test"]["query_id"])
    assert not train & test and len(test) == 6 and train | test == set(range(30))
    assert len(parts["train"]) + len(parts["test"]) == len(groups())


def test_split_is_seeded_random_and_blind_to_row_order():
    chosen = lambda dataset, seed: set(split_by_query(dataset, 6, seed)["test"]["query_id"])  # noqa: E731
    assert chosen(groups(), 0) == chosen(groups().shuffle(seed=5), 0) != chosen(groups(), 1)
    assert chosen(groups(), 0) not in ({0, 1, 2, 3, 4, 5}, {24, 25, 26, 27, 28, 29})


@pytest.mark.parametrize("size", [0, 30, 0.0, 1.0, -1, 0.01])
def test_split_must_leave_both_sides(size):
    with pytest.raises(ValueError, match="both sides"):
        split_by_query(groups(), size)
