"""Every trap of the beam log formats, each on a file of a few records."""

import gzip
import json
import logging
import math

import pytest

from lever_grpo.data import BeamDataError, load_beams, log_metadata, parse_log_name, to_prompt_order, to_search_order


NAME = (
    "vqa-okvqa-flamingo_3B-RandSampler-scorer:infoscore-construct_order:{order}-beam_size:5-{shots}:2"
    "-candidate_num:64-sample_num:800.json"
)
POOL = [10, 11, 12, 13]


def lever_lm(**changes):
    record = {
        "id_list": [[11, 10, 7], [12, 10, 7], [10, 13, 7]],
        "score_list": [0.1, 0.4, 0.2],
        "shot_scores": [[0.3, 0.1], [0.3, 0.4], [0.2, 0.2]],
        "candidate_ids": POOL,
    }
    record.update(changes)
    return {key: value for key, value in record.items() if value is not None}


def pointer(pointer=(0, 1), pointer_global=(10, 11), **fields):
    entry = {"pointer": list(pointer), "pointer_global": pointer_global and list(pointer_global), "gen_method": "beam"}
    entry.update({"vqa_correct": 1, "vqa_acc_score": 0.5, "beam_score": 0.04, "vqa_eval_mode": "vqa"}, **fields)
    return {key: value for key, value in entry.items() if value is not None}


def scored(*sequences, **fields):
    return {"query_id": 7, "pool": POOL, "zero_shot": -2.0, "sequences": list(sequences), **fields}


@pytest.fixture
def load(tmp_path):
    def load(content, name="log.json", **options):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return load_beams(path, cache_dir=tmp_path / "cache", **options)

    return load


def ids(row):
    """Sequences of a row as row ids, in search order."""
    return [[row["candidate_ids"][p] for p in sequence] for sequence in row["sequences"]]


# ---------------------------------------------------------------- formats 1 and 2


@pytest.mark.parametrize("order", ["left", "right"])
def test_lever_lm_ids_are_prepended_and_end_with_the_query(load, order):
    row = load({"7": lever_lm()}, NAME.format(order=order, shots="few_shot"), construct_order=order)[0]
    assert row["query_id"] == 7
    assert ids(row) == [[10, 11], [10, 12], [13, 10]]  # the file holds reversed search order in both cases
    assert row["survived"] == [True] * 3 and row["source"] == ["search"] * 3
    assert math.isnan(row["zero_shot"])


def test_prompt_order_follows_construct_order():
    assert to_prompt_order([10, 11], "left") == [11, 10]
    assert to_prompt_order([10, 11], "right") == [10, 11]
    for order in ("left", "right"):
        assert to_search_order(to_prompt_order([3, 1, 2], order), order) == [3, 1, 2]
    with pytest.raises(ValueError, match="'up'"):
        to_prompt_order([1], "up")


def test_score_is_the_cumulative_gain_and_order_is_kept(load):
    row = load({"7": lever_lm()})[0]
    assert row["scores"] == pytest.approx([0.4, 0.7, 0.4])  # not sorted, not the last step
    assert row["shot_scores"] == [[0.3, 0.1], [0.3, 0.4], [0.2, 0.2]]
    assert not row["notes"]["marginal"]


def test_marginal_scores_are_kept_and_warned_of_once_with_the_count(load, caplog):
    log = {str(q): lever_lm(shot_scores=None, id_list=[[11, 10, q], [10, 11, q], [12, 10, q]]) for q in (7, 8)}
    with caplog.at_level(logging.WARNING):
        groups = load(log)
    assert groups[0]["scores"] == [0.1, 0.4, 0.2] and groups[0]["shot_scores"] == [[], [], []]
    assert groups[0]["notes"]["marginal"]
    messages = [r.getMessage() for r in caplog.records if "last step's gain" in r.getMessage()]
    assert len(messages) == 1 and "2 groups" in messages[0]


def test_one_shot_scores_are_not_marginal(load):
    assert not load({"7": lever_lm(id_list=[[10, 7], [11, 7], [12, 7]], shot_scores=None)})[0]["notes"]["marginal"]


def test_a_beam_whose_last_id_is_not_the_key_is_refused_by_name(load):
    with pytest.raises(BeamDataError, match=r"record '7'.*id_list\[1\].*own id 7.*\[12, 10, 8\]"):
        load({"7": lever_lm(id_list=[[11, 10, 7], [12, 10, 8], [10, 13, 7]])})


def test_beams_without_the_query_need_a_declared_length(load):
    bare = [[11, 10], [12, 10], [10, 13]]
    assert ids(load({"7": lever_lm(id_list=bare, few_shot_num=2)})[0]) == [[10, 11], [10, 12], [13, 10]]
    name = NAME.format(order="left", shots="few_shot")
    assert ids(load({"7": lever_lm(id_list=bare)}, name)[0]) == [[10, 11], [10, 12], [13, 10]]
    with pytest.raises(BeamDataError, match="record '7'"):
        load({"7": lever_lm(id_list=bare)})


def test_lists_of_different_lengths_are_refused(load):
    with pytest.raises(BeamDataError, match="'score_list'.*expected 3 entries"):
        load({"7": lever_lm(score_list=[0.1, 0.2])})
    with pytest.raises(BeamDataError, match=r"shot_scores\[0\].*expected 2 gains"):
        load({"7": lever_lm(shot_scores=[[0.1], [0.1, 0.2], [0.1, 0.2]])})


def test_lever_plus_beams(load):
    beams = [
        # the order of `shots` is not trusted, the ids are: 10 was found first
        {
            "shots": [{"id": 11, "score": 0.1}, {"id": 10, "score": 0.3}],
            "full_sequence": [11, 10, 7],
            "final_score": 0.1,
        },
        {
            "shots": [{"id": 10, "score": 0.3}, {"id": 12, "score": 0.4}],
            "full_sequence": [12, 10, 7],
            "final_score": 0.4,
        },
    ]
    row = load({"7": {"beams": beams, "candidate_ids": POOL}})[0]
    assert ids(row) == [[10, 11], [10, 12]]
    assert row["shot_scores"] == [[0.3, 0.1], [0.3, 0.4]] and row["scores"] == pytest.approx([0.4, 0.7])
    full = lever_lm(beams=beams + beams[:1], few_shot_num=2)
    assert load({"7": full})[0]["shot_scores"][0] == [0.3, 0.1]


def test_file_name_is_parsed_when_it_matches_and_never_required(load):
    settings = parse_log_name(NAME.format(order="right", shots="max_shot"))
    assert settings["construct_order"] == "right" and settings["max_shot"] == 2 and settings["model"] == "flamingo_3B"
    name = NAME.format(order="left", shots="few_shot")
    assert log_metadata(load({"7": lever_lm()}, name))[name]["candidate_num"] == 64
    assert log_metadata(load({"7": lever_lm()}, "other.json")) == {}


# ---------------------------------------------------------------- pools


def test_a_missing_pool_is_an_error_that_names_the_remedies(load):
    with pytest.raises(BeamDataError, match="record '7'.*candidate_pools.*rebuild_pools"):
        load({"7": lever_lm(candidate_ids=None)})


def test_pools_from_a_dict_or_a_file(load, tmp_path):
    log = {"7": lever_lm(candidate_ids=None)}
    assert load(log, candidate_pools={7: [13, 12, 11, 10]})[0]["candidate_ids"] == [13, 12, 11, 10]
    side = tmp_path / "pools.jsonl"
    for record in ({"query_id": 7, "candidate_ids": POOL}, scored({"prompt_order": [10], "score": -1.0})):
        side.write_text(json.dumps(record) + "\n")
        row = load(log, candidate_pools=side)[0]
        assert row["candidate_ids"] == POOL and ids(row)[0] == [10, 11]
    side.write_text(json.dumps({"7": POOL}))
    assert load(log, candidate_pools=str(side))[0]["candidate_ids"] == POOL
    with pytest.raises(BeamDataError, match="record '7'.*candidate_pools"):
        load(log, candidate_pools={8: POOL})


def test_rebuilt_pools_warn_and_do_not_tell_the_rank(load, caplog):
    with caplog.at_level(logging.WARNING):
        row = load({"7": lever_lm(candidate_ids=None)}, rebuild_pools=True)[0]
    assert row["candidate_ids"] == [10, 11, 12, 13] and row["notes"]["pool_rebuilt"]
    assert "1 pools were rebuilt" in caplog.text


def test_pools_are_checked(load):
    with pytest.raises(BeamDataError, match=r"sequence 2.*pool of 3.*\[13\]"):
        load({"7": lever_lm(candidate_ids=[10, 11, 12])})
    with pytest.raises(BeamDataError, match=r"each candidate once, found \[10\]"):
        load({"7": lever_lm(candidate_ids=[10, 11, 12, 13, 10])})


def test_the_query_leaves_its_own_pool(load, caplog):
    with caplog.at_level(logging.WARNING):
        row = load({"7": lever_lm(candidate_ids=[7, 13, 12, 11, 10])})[0]
    assert row["candidate_ids"] == [13, 12, 11, 10] and ids(row)[0] == [10, 11]
    assert "held the query itself" in caplog.text


# ---------------------------------------------------------------- format 3


def rl(*entries, **fields):
    return {"query": {"question_id": 99}, "candidate_pool_ids": POOL, "pointer_candidates": list(entries), **fields}


def test_rl_file(load, caplog):
    log = {
        "_meta": {"model": "x"},
        "7": rl(
            pointer(),
            pointer((2, 0), (12, 10), gen_method="random", vqa_correct=0, beam_score=None),
            pointer((1, 3), (11, 13), eval_failed=True),
            pointer((3, 1), (13, 11), vqa_eval_mode="fallback"),
        ),
        "8": rl(pointer()),
    }
    with caplog.at_level(logging.WARNING):
        groups = load(log)
    assert [len(row["scores"]) for row in groups] == [2, 1]  # ragged groups, and one of one sequence
    row = groups[0]
    assert row["sequences"] == [[0, 1], [2, 0]]  # a pointer is in search order
    assert row["source"] == ["beam", "random"] and row["survived"] == [True, False]
    assert row["scores"] == [1.5, 0.5]  # hard_plus_soft
    assert row["columns"]["vqa_acc_score"] == [0.5, 0.5] and row["columns"]["beam_score"] == [0.04, None]
    assert row["notes"]["failed"] == 2 and "2 failed or fallback evaluations" in caplog.text
    assert log_metadata(groups)["log.json"]["_meta"] == {"model": "x"}


def test_pointer_alone_is_global(load):
    row = load({"7": rl(pointer((12, 10), None), pointer((10, 11), None, pointer_pos=[0, 1]))})[0]
    assert row["sequences"] == [[2, 0], [0, 1]]


def test_pointer_and_pointer_global_must_agree(load):
    with pytest.raises(
        BeamDataError, match=r"pointer_candidates\[0\].pointer.*\[11, 12\].*\[0, 1\].*stand for \[10, 11\]"
    ):
        load({"7": rl(pointer((0, 1), (11, 12)))})


def test_score_column_by_name_or_weights(load):
    log = {"7": rl(pointer(), pointer((2, 0), (12, 10), vqa_correct=0))}
    assert load(log, score_column="beam_score")[0]["scores"] == [0.04, 0.04]
    assert load(log, score_column={"vqa_correct": 2.0, "vqa_acc_score": 1.0})[0]["scores"] == [2.5, 0.5]
    with pytest.raises(BeamDataError, match=r"pointer_candidates\[0\].nope"):
        load(log, score_column="nope")


def test_a_choice_of_the_score_where_there_is_none_is_refused(load):
    log = {"7": {"id_list": [[3, 4, 7]], "score_list": [0.1], "candidate_ids": [3, 4, 5]}}
    with pytest.raises(BeamDataError, match="'score_column': expected none, as beams of this format have one score"):
        load(log, score_column="vqa_correct")


def test_the_zero_shot_score_is_one_of_the_logs_own_scores(load):
    entry = {"search_order": [3, 4], "score": -1.0, "correct": 1.0}
    log = {"7": {"query_id": 7, "pool": [3, 4, 5], "zero_shot": -3.0, "sequences": [entry]}}
    assert load(log)[0]["zero_shot"] == -3.0
    assert math.isnan(load(log, score_column="correct")[0]["zero_shot"])


def test_without_rewards_the_beam_score_is_the_score_and_without_it_one_is_asked_for(load):
    bare = {"vqa_correct": None, "vqa_acc_score": None}
    assert load({"7": rl(pointer(**bare))})[0]["scores"] == [0.04]
    with pytest.raises(BeamDataError, match="score_column"):
        load({"7": rl(pointer(**bare, beam_score=None))})


# ---------------------------------------------------------------- format 4


@pytest.mark.parametrize(("order", "expected"), [("left", [10, 11]), ("right", [11, 10])])
def test_scored_prompt_order(load, order, expected):
    line = scored(
        {"prompt_order": [11, 10], "score": -1.0, "correct": 1, "beam": True}, {"prompt_order": [12], "score": -3.0}
    )
    row = load(json.dumps(line), "log.jsonl", construct_order=order)[0]
    assert ids(row) == [expected, [12]]
    assert row["scores"] == [-1.0, -3.0] and row["survived"] == [True, False] and row["zero_shot"] == -2.0
    assert row["columns"]["correct"] == [1.0, None]


def test_scored_search_order(load):
    line = scored({"search_order": [11, 10], "score": -1.0, "shot_scores": [0.4, 0.6]})
    row = load(json.dumps(line), "log.jsonl")[0]
    assert ids(row) == [[11, 10]] and row["shot_scores"] == [[0.4, 0.6]] and "columns" not in row


def test_parquet_and_dataset_rows_come_back_as_they_were(load, tmp_path):
    line = scored(
        {"prompt_order": [11, 10], "score": -1.0, "correct": 1, "beam": True}, {"prompt_order": [12], "score": -3.0}
    )
    groups = load(json.dumps(line), "log.jsonl")
    groups.to_parquet(tmp_path / "again.parquet")
    groups.to_json(tmp_path / "again.jsonl")
    for name in ("again.parquet", "again.jsonl"):
        again = load_beams(tmp_path / name, cache_dir=tmp_path / "cache")
        assert again.features == groups.features and again[:] == groups[:]


def test_notes_survive_parquet(load, tmp_path):
    load({"7": lever_lm(candidate_ids=None)}, rebuild_pools=True).to_parquet(tmp_path / "again.parquet")
    assert load_beams(tmp_path / "again.parquet", cache_dir=tmp_path / "cache")[0]["notes"]["pool_rebuilt"]


# ---------------------------------------------------------------- what all formats share


def test_layout_is_found_from_the_content(load, tmp_path):
    records = [
        scored({"prompt_order": [10], "score": -1.0}),
        scored({"prompt_order": [11], "score": -1.0}, query_id=8),
    ]
    lines = "\n".join(map(json.dumps, records))
    assert len(load(lines, "wrong.parquet")) == 2
    assert len(load(json.dumps(records, indent=1), "array.txt")) == 2
    assert len(load('{"_meta": {}}\n' + lines, "meta.json")) == 2
    assert len(load("\ufeff" + json.dumps({"7": lever_lm()}), "bom.json")) == 1
    path = tmp_path / "log.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"7": lever_lm()}).encode()))
    assert len(load_beams(path, cache_dir=tmp_path / "cache")) == 1


def test_exact_repeats_are_dropped_and_other_orders_stay(load, caplog):
    log = {"7": lever_lm(id_list=[[11, 10, 7], [10, 11, 7], [11, 10, 7]])}
    with caplog.at_level(logging.WARNING):
        row = load(log)[0]
    assert ids(row) == [[10, 11], [11, 10]] and row["scores"] == pytest.approx([0.4, 0.7])
    assert row["notes"]["repeats"] == 1 and "1 exact repeats" in caplog.text


def test_sequences_that_repeat_an_id_or_hold_the_query_are_dropped_and_counted(load, caplog):
    log = {"7": lever_lm(id_list=[[10, 10, 7], [7, 10, 7], [12, 13, 7]])}
    with caplog.at_level(logging.WARNING):
        row = load(log)[0]
    assert ids(row) == [[13, 12]] and row["scores"] == pytest.approx([0.4]) and row["notes"]["invalid"] == 2
    assert "2 sequences that repeat" in caplog.text


def test_lower_is_better_negates_every_score_but_no_reward(load):
    line = scored({"search_order": [11], "score": 3.0, "shot_scores": [1.0], "correct": 1})
    row = load(json.dumps(line), "log.jsonl", higher_is_better=False)[0]
    assert (row["scores"], row["shot_scores"], row["zero_shot"]) == ([-3.0], [[-1.0]], 2.0)
    assert row["columns"]["correct"] == [1.0]


def test_shots_filter_or_split(load):
    line = scored(
        *({"prompt_order": order, "score": -float(i)} for i, order in enumerate([[10], [11, 10], [12], [10, 11, 12]]))
    )
    lines = json.dumps(line)
    assert ids(load(lines, "log.jsonl")[0]) == [[10], [10, 11], [12], [12, 11, 10]]
    assert ids(load(lines, "log.jsonl", shots=1)[0]) == [[10], [12]]
    rows = load(lines, "log.jsonl", shots=[2, 1])
    assert [ids(row) for row in rows] == [[[10, 11]], [[10], [12]]] and rows["query_id"][:] == [7, 7]
    with pytest.raises(BeamDataError, match="shots=5"):
        load(lines, "log.jsonl", shots=5)
    with pytest.raises(ValueError, match="shots"):
        load(lines, "log.jsonl", shots=0)


def test_counts_are_not_doubled_by_splitting(load):
    line = scored(
        {"prompt_order": [10], "score": 0.0},
        {"prompt_order": [10], "score": 0.0},
        {"prompt_order": [10, 11], "score": 1.0},
    )
    rows = load(json.dumps(line), "log.jsonl", shots=[1, 2])
    assert [row["notes"]["repeats"] for row in rows] == [1, 0]


def test_max_group_size_keeps_survivors_and_spaces_the_others(load):
    sequences = [
        {"prompt_order": [10 + i // 4, 20 + i % 4], "score": float((7 * i) % 16), "beam": i in (3, 5)}
        for i in range(16)
    ]
    line = json.dumps(scored(*sequences, pool=list(range(10, 30))))
    row = load(line, "log.jsonl", max_group_size=5)[0]
    assert len(row["scores"]) == 5 and sum(row["survived"]) == 2
    others = [score for score, kept in zip(row["scores"], row["survived"], strict=True) if not kept]
    assert {0.0, 15.0} <= set(others)  # the worst and the best of the others, and one between
    assert 5 <= sorted(others)[1] <= 10
    whole = load(line, "log.jsonl")[0]["scores"]
    assert [s for s in whole if s in row["scores"]] == row["scores"]  # in the file's order
    assert load(line, "log.jsonl", max_group_size=5)[0] == row


def test_reward_columns_as_declared(load):
    line = scored({"prompt_order": [11], "score": -1.0, "correct": True, "f1": 0.5, "note": "text"})
    assert set(load(json.dumps(line), "log.jsonl")[0]["columns"]) == {"correct", "f1"}
    assert load(json.dumps(line), "log.jsonl", reward_columns=["f1"])[0]["columns"] == {"f1": [0.5]}
    assert "columns" not in load(json.dumps(line), "log.jsonl", reward_columns=[])[0]
    with pytest.raises(BeamDataError, match=r"\['bleu'\], found \['correct', 'f1'\]"):
        load(json.dumps(line), "log.jsonl", reward_columns=["bleu"])


def test_external_ids(load):
    assert load({"7": lever_lm()}, external_ids={7: 4242})[0]["external_id"] == "4242"


# ---------------------------------------------------------------- bad values


@pytest.mark.parametrize("value", ["NaN", "Infinity", '"0.5"', "null"])
def test_scores_must_be_finite_numbers(load, value):
    good = json.dumps({"6": lever_lm(id_list=[[11, 10, 6]], score_list=[0.5], shot_scores=None)})[:-1]
    bad = json.dumps({"7": lever_lm(score_list=["@", 0.4, 0.2], shot_scores=None)}).replace('"@"', value)[1:]
    with pytest.raises(
        BeamDataError, match=r"log\.json: record '7', field 'score_list\[0\]': expected a finite number"
    ):
        load(f"{good}, {bad}")
    line = json.dumps(scored({"prompt_order": [11], "score": "@"})).replace('"@"', value)
    with pytest.raises(BeamDataError, match=r"line 1, query 7, field 'sequences\[0\].score'"):
        load(line, "log.jsonl")


def test_nan_where_nobody_looks_is_no_error(load):
    assert len(load('{"_meta": {"loss": NaN}, "7": ' + json.dumps(lever_lm()) + "}")) == 1


@pytest.mark.parametrize("value", [2**63, 2**70, -1, 1.5, "11", True, None])
def test_ids_must_be_row_positions(load, value):
    with pytest.raises(BeamDataError, match=r"record '7', field 'id_list\[0\]\[0\]': expected a row id"):
        load({"7": lever_lm(id_list=[[value, 10, 7], [12, 10, 7], [10, 13, 7]])})
    with pytest.raises(BeamDataError, match=r"prompt_order\[0\]"):
        load(json.dumps(scored({"prompt_order": [value], "score": 1.0})), "log.jsonl")


def test_a_query_that_stands_twice_is_refused(load):
    record = json.dumps(lever_lm())
    with pytest.raises(BeamDataError, match="record '7'.*twice"):
        load(f'{{"7": {record}, "7": {record}}}')


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "empty file"),
        ("hello", "starts with"),
        ('{"7": {"id_list": [[1', "damaged or cut short"),
        ('{"abc": {}}', "query_id|id_list"),
        ('{"7": 5}', "record '7'"),
        ('{"7": {"answers": []}}', "'id_list', 'beams', 'pointer_candidates', 'sequences'"),
        ('{"sequences": []}', "query_id"),
        ('{"query_id": 1, "sequences": [}', "line 1"),
        ('{"query_id": 1, "pool": [1], "sequences": [{"prompt_order": [], "score": 1}]}', "zero_shot"),
        ("PAR1 but no parquet", "Parquet"),
        ("\x1f\x8bbroken", "beam log"),
    ],
)
def test_unreadable_files_say_why(load, content, message):
    with pytest.raises(BeamDataError, match=message) as error:
        load(content)
    assert "log.json" in str(error.value)


def test_queries_without_a_usable_sequence_are_named(load, caplog):
    with caplog.at_level(logging.WARNING):
        groups = load({"7": rl(pointer(eval_failed=True)), "8": rl(pointer())})
    assert groups["query_id"][:] == [8]
    assert "1 queries have no usable sequence" in caplog.text and ": 7" in caplog.text
