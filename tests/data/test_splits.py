"""What is judged on leaves the training pools; what belongs together stays together."""

import pytest
from datasets import Dataset

from lever_grpo.data import drop_candidates, keep_sources, split_by_query


def dataset() -> Dataset:
    return Dataset.from_list(
        [
            {
                "query_id": 0, "candidate_ids": [10, 11, 12], "sequences": [[0, 1], [1, 2], [2, 0]],
                "scores": [1.0, 2.0, 3.0], "shot_scores": [[0.5, 0.5], [1.0, 1.0], [2.0, 1.0]],
                "survived": [True, False, True], "source": ["a", "b", "c"], "columns": {"x": [0.1, 0.2, 0.3]},
            },
            {
                "query_id": 1, "candidate_ids": [10, 20], "sequences": [[0, 1], [1, 0]], "scores": [4.0, 5.0],
                "shot_scores": [[], []], "survived": [True, True], "source": ["d", "e"], "columns": {"x": [0.4, 0.5]},
            },
        ]
    )  # fmt: skip


def test_sequences_go_with_their_source():
    kept = keep_sources(dataset(), ["c", "a"])
    assert kept["query_id"][:] == [0]  # the other group has no sequence left
    assert kept[0] == {
        "query_id": 0, "candidate_ids": [10, 11, 12], "sequences": [[0, 1], [2, 0]], "scores": [1.0, 3.0],
        "shot_scores": [[0.5, 0.5], [2.0, 1.0]], "survived": [True, True], "source": ["a", "c"],
        "columns": {"x": [0.1, 0.3]},
    }  # fmt: skip
    assert keep_sources(dataset(), "abcde").to_list() == dataset().to_list()


def test_unknown_sources_are_named():
    with pytest.raises(
        ValueError, match=r"no sequence of the log comes from 'random'; it has 'a', 'b', 'c', 'd', 'e'"
    ):
        keep_sources(dataset(), ["a", "random"])


def test_sequences_go_with_their_candidate_and_positions_are_renumbered():
    cleaned = drop_candidates(dataset(), ids=[10])
    assert cleaned["query_id"][:] == [0]  # the other group has no sequence left
    assert cleaned[0] == {
        "query_id": 0, "candidate_ids": [11, 12], "sequences": [[0, 1]], "scores": [2.0], "shot_scores": [[1.0, 1.0]],
        "survived": [False], "source": ["b"], "columns": {"x": [0.2]},
    }  # fmt: skip


def test_all_columns_of_sequences_go_with_them():
    marks = {
        "estimated": [[True, False, True], [False, True]],
        "ref_log_probs": [[[1.0], [2.0], [3.0]], [[4.0], [5.0]]],
    }
    rows = [row | {name: values[i] for name, values in marks.items()} for i, row in enumerate(dataset())]
    (cleaned,) = drop_candidates(Dataset.from_list(rows), ids=[10])
    assert cleaned["estimated"] == [False] and cleaned["ref_log_probs"] == [[2.0]]


def test_ids_that_no_pool_holds_change_nothing():
    before = dataset()
    assert drop_candidates(before, ids=[99]).to_list() == before.to_list()
    assert drop_candidates(before).to_list() == before.to_list()


def test_candidates_about_the_querys_thing_go():
    entities = {0: "cat", 12: "cat", 1: "dog", 10: "dog", 20: "cow"}
    cleaned = drop_candidates(dataset(), entities=entities)
    assert cleaned["query_id"][:] == [0]  # query 1 lost 10, and with it both sequences
    assert cleaned[0]["candidate_ids"] == [10, 11] and cleaned[0]["sequences"] == [[0, 1]]


def test_rows_that_are_about_nothing_else_stay():
    # neither the query nor a candidate has an entity: that is not the same thing
    assert drop_candidates(dataset(), entities={10: "dog"}).to_list() == dataset().to_list()


def test_queries_of_one_thing_stay_on_one_side():
    rows = Dataset.from_dict({"query_id": list(range(40))})
    entities = {i: f"thing {i // 4}" for i in range(40)}
    for seed in range(5):
        parts = split_by_query(rows, 0.3, seed, entities)
        sides = [{entities[i] for i in part["query_id"]} for part in (parts["train"], parts["test"])]
        assert not sides[0] & sides[1] and len(sides[1]) == 3
        assert len(parts["train"]) + len(parts["test"]) == 40
    again = split_by_query(rows, 0.3, 0, entities)
    assert again["test"]["query_id"][:] == split_by_query(rows, 0.3, 0, entities)["test"]["query_id"][:]


def test_one_thing_cannot_be_split():
    rows = Dataset.from_dict({"query_id": list(range(10))})
    with pytest.raises(ValueError, match="takes all 10 queries, as those about one thing"):
        split_by_query(rows, 0.3, 0, dict.fromkeys(range(10), "cat"))


@pytest.mark.parametrize("size", [0.0, 1.0, 40, 0])
def test_both_sides_must_have_queries(size):
    with pytest.raises(ValueError, match="test_size must leave queries on both sides"):
        split_by_query(Dataset.from_dict({"query_id": list(range(40))}), size)
