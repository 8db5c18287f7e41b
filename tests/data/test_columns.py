"""The fast way through a log: it must give what the careful way gives, record by record, traps and errors included."""

import gzip
import json
import random
import tracemalloc
from copy import deepcopy

import orjson
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lever_grpo.data import BeamDataError, columns, load_beams
from lever_grpo.data.columns import NotPlain, batches, plain_table, read_tables
from lever_grpo.data.formats import parse_record
from lever_grpo.data.groups import group_features, group_rows
from lever_grpo.data.readers import _Seen, iter_records, iter_texts
from lever_grpo.data.records import Options, Where


REWARDS = ("correct", "f1")


def make_record(rng, kind, query_id, pool_size=6, lengths=(1, 2, 3)):
    """A record without any trap. Values are of all magnitudes, and some floats are written as whole numbers."""

    def number():
        return rng.choice([rng.gauss(0, 1), rng.gauss(0, 1) * 10.0 ** rng.randint(-12, 3), rng.randint(-3, 3), -0.0])

    pool = [i for i in rng.sample(range(100), pool_size + 1) if i != query_id][:pool_size]
    sequences = {tuple(rng.sample(range(pool_size), rng.choice(lengths))): None for _ in range(rng.randint(1, 5))}
    gains = [[number() for _ in sequence] for sequence in sequences]
    ids = [[pool[p] for p in sequence] for sequence in sequences]
    if kind.startswith("lever"):
        record = {
            "id_list": [beam[::-1] + [query_id] for beam in ids],
            "score_list": [number() for _ in ids],
            "candidate_ids": pool,
        }
        if kind != "lever_marginal":
            record["shot_scores"] = gains
        if kind == "lever_plus":
            record["few_shot_num"] = 2
            record["beams"] = [{"full_sequence": beam, "final_score": 0.5} for beam in record["id_list"]]
        return record
    if kind == "group":
        return {
            "query_id": query_id,
            "candidate_ids": pool,
            "sequences": list(map(list, sequences)),
            "scores": [number() for _ in ids],
            "shot_scores": [rng.choice([shots, []]) for shots in gains],
            "survived": [rng.random() < 0.5 for _ in ids],
            "zero_shot": rng.choice([None, number()]),
            "source": [rng.choice(["search", "random"]) for _ in ids],
            "columns": {name: [rng.choice([None, True, number()]) for _ in ids] for name in REWARDS},
            "notes": {"failed": rng.randint(0, 3), "marginal": rng.random() < 0.5},
        }
    order = {"scored_search": "search_order", "scored_prompt": "prompt_order"}[kind]
    return {
        "query_id": query_id,
        "pool": pool,
        "zero_shot": number(),
        "comment": "a [b] c",
        "sequences": [
            {
                order: beam,
                "score": number(),
                "shot_scores": shots,
                "beam": rng.random() < 0.5,
                "correct": 1,
                "f1": 0.5,
            }
            for beam, shots in zip(ids, gains, strict=True)
        ],
    }


KINDS = ("lever", "lever_plus", "lever_marginal", "group", "scored_search", "scored_prompt")
BAD = [None, True, "1", 1.5, -1, 10**6, 2**63, 2**64, 2**70, [], [3], {}, float("nan"), float("inf"), "[", "\\u005b"]


def spoil(rng, record, query_id):
    """One trap: a value anywhere in the record is replaced, doubled, removed or wrapped, or a field comes or goes."""
    holders = []

    def walk(value):
        if isinstance(value, (dict, list)) and value:
            holders.append(value)
            for item in value.values() if isinstance(value, dict) else value:
                walk(item)

    walk(record)
    holder = rng.choice(holders)
    place = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    trap = rng.choice(["replace", "query", "remove", "wrap", "copy", "add"])
    if trap == "replace":
        holder[place] = deepcopy(rng.choice(BAD))
    elif trap == "query":
        holder[place] = query_id
    elif trap == "remove":
        del holder[place]
    elif trap == "wrap":
        holder[place] = [holder[place]]
    elif trap == "copy":
        other = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        holder[place] = deepcopy(holder[other])
    elif isinstance(holder, dict):
        name, value = rng.choice(
            [("eval_failed", True), ("eval_failed", False), ("note", "[["), ("note", [[1]]), ("gen_method", "x")]
            + [("survived", 1), ("query_id", 5), ("pool", [1, 2]), ("candidate_pool_ids", None), ("zero_shot", None)]
            + [("source", "é"), ("shot_scores", None), ("notes", {"marginal": True}), ("columns", None), ("_meta", {})]
        )
        holder[name] = deepcopy(value)
    else:
        holder.insert(place, deepcopy(holder[place]))


def careful(texts, options, schema):
    """The plain rules, one record after another: the table, or the error."""
    rows, empty = [], []
    try:
        for key, label, record in texts:
            group = parse_record(key, record, Where("log", label), options, {})
            if group is not None:
                if not group.sequences:
                    empty.append(group.query_id)
                rows += group_rows(group, options)
        return pa.Table.from_pylist(rows, schema=schema), empty
    except Exception as error:
        return type(error), str(error)


def fast(texts, options, schema):
    empty = []
    try:
        tables = [
            table
            for batch in batches(texts)
            for table in read_tables(batch, "log", {}, options, schema, lambda group: empty.append(group.query_id))
        ]
        return pa.concat_tables([schema.empty_table(), *tables]), empty
    except Exception as error:
        return type(error), str(error)


def exactly(result):
    """Something that is equal only if every bit is: NaN is itself, and -0.0 is not 0.0."""
    what, rest = result
    if isinstance(what, pa.Table):
        what.validate(full=True)
        return what.schema, repr(what.to_pylist()), rest
    return result


def options_of(rng):
    return Options(
        construct_order=rng.choice(["left", "right"]),
        reward_columns=rng.choice([(), REWARDS]),
        score_weights=rng.choice([None, None, None, {"f1": 1.0, "correct": 2.0}]),
        higher_is_better=rng.random() < 0.7,
        rebuild_pools=rng.random() < 0.2,
        shots=rng.choice([None, None, (2,), (2, 1)]),
        max_group_size=rng.choice([None, None, 3]),
        pool_of=rng.choice([lambda query_id: None, lambda query_id: list(range(query_id + 1, 120))]),
        external_id_of=rng.choice([None, {5: "five"}.get]),
    )


def write(rng, path, records, keyed):
    indent = rng.choice([None, None, 1]) if keyed else None
    separators = rng.choice([None, (",", ":")])
    if keyed:
        text = json.dumps(
            {str(query_id): record for query_id, record in records}, indent=indent, separators=separators
        )
    else:
        text = "\n".join(json.dumps(record, separators=separators) for _, record in records) + "\n"
    text = text.replace('"\\\\u005b"', '"\\u005b"')
    path.write_bytes(gzip.compress(text.encode()) if rng.random() < 0.3 else text.encode())


@settings(max_examples=120, deadline=None)
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(KINDS), traps=st.sampled_from([0, 0, 1, 1, 3, 30]))
def test_fast_and_careful_way_agree(tmp_path_factory, seed, kind, traps):
    rng = random.Random(seed)
    keyed = kind.startswith("lever") or rng.random() < 0.3
    lengths = rng.choice([(2,), (1, 2, 3)])
    queries = rng.sample(range(200), 30)
    records = [(query_id, make_record(rng, kind, query_id, lengths=lengths)) for query_id in queries]
    for _ in range(traps):
        query_id, record = rng.choice(records)
        spoil(rng, record, query_id)
    if rng.random() < 0.2:
        records.insert(rng.randrange(30), ("_meta", {"_meta": {"[": 1}}))
    path = tmp_path_factory.mktemp("log") / "log"
    write(rng, path, records, keyed)
    options = options_of(rng)
    schema = group_features(options.reward_columns, external_ids=options.external_id_of is not None).arrow_schema
    texts = [(key, label, record) for key, label, record in iter_texts(str(path))]
    assert exactly(fast(texts, options, schema)) == exactly(careful(iter_records(str(path)), options, schema))


@pytest.mark.parametrize("kind", KINDS)
def test_records_without_traps_are_plain(kind, tmp_path):
    """Else the test above would compare the careful way with itself."""
    rng = random.Random(0)
    records = [(query_id, make_record(rng, kind, query_id)) for query_id in range(100, 140)]
    write(rng, tmp_path / "log", records, keyed=kind.startswith("lever"))
    rewards = () if kind.startswith("lever") else REWARDS
    [batch] = batches(iter_texts(str(tmp_path / "log")))
    assert len(plain_table(batch, Options(reward_columns=rewards), group_features(rewards).arrow_schema)) == 40


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("id_list", [[10, 7], [10, 7]]),  # a sequence twice
        ("id_list", [[10, 10, 7], [11, 7]]),  # a demonstration twice
        ("id_list", [[7, 7], [11, 7]]),  # the query itself
        ("id_list", [[10, 8], [11, 7]]),  # another query
        ("id_list", [[99, 7], [11, 7]]),  # not in the pool
        ("id_list", [[[10], 7], [11, 7]]),  # deeper than it may be, and as long as it should be
        ("id_list", [[7], [11, 7]]),
        ("id_list", []),
        ("candidate_ids", [10, 11, 11]),
        ("candidate_ids", [10, 11, 7]),
        ("score_list", [0.5, True]),
        ("score_list", [0.5]),
        ("zero_shot", "0.5"),
    ],
)
def test_what_needs_care_is_not_plain(change, value):
    record = {"id_list": [[10, 7], [11, 7]], "score_list": [0.5, 0.25], "candidate_ids": [10, 11, 12]}
    schema = group_features().arrow_schema
    assert plain_table([("7", "", orjson.dumps(record))], Options(), schema)["scores"].to_pylist() == [[0.5, 0.25]]
    with pytest.raises(columns.NOT_PLAIN):
        plain_table([("7", "", orjson.dumps({**record, change: value}))], Options(), schema)


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("sequences", [[0], [3]]),  # beyond the pool
        ("sequences", [[0], [-1]]),
        ("sequences", [[0], []]),
        ("candidate_ids", [10, 11, 7]),
        ("scores", [0.5, None]),
        ("scores", [0.5]),
        ("shot_scores", [[0.5], [0.25, 0.5]]),
        ("survived", [True, 1]),
        ("survived", [True]),
        ("source", ["a", None]),
        ("columns", {"f1": [0.5, "0.5"]}),
        ("columns", {"f1": [0.5]}),
        ("columns", []),
        ("notes", {"failed": True}),
        ("notes", {"failed": -1}),
        ("notes", {"other": 1}),
    ],
)
def test_what_needs_care_in_a_group_is_not_plain(change, value):
    record = {"query_id": 7, "candidate_ids": [10, 11, 12], "sequences": [[0], [1]], "scores": [0.5, 0.25]}
    record |= {"survived": [True, False], "source": ["a", "b"], "columns": {"f1": [0.5, None]}}
    options, schema = Options(reward_columns=("f1",)), group_features(("f1",)).arrow_schema
    assert plain_table([(None, "", orjson.dumps(record))], options, schema)["scores"].to_pylist() == [[0.5, 0.25]]
    with pytest.raises(columns.NOT_PLAIN):
        plain_table([(None, "", orjson.dumps({**record, change: value}))], options, schema)


def test_a_key_longer_than_any_id_is_not_plain():
    text = b'{"id_list": [[10, 7]], "score_list": [0.5], "pool": [10]}'
    with pytest.raises(NotPlain):
        plain_table([("7".zfill(20), "", text)], Options(), group_features().arrow_schema)


def test_a_key_that_stands_twice_in_a_record_is_not_plain():
    text = b'{"id_list": [[10, 7]], "score_list": [0.5], "score_list": [0.25], "pool": [10]}'
    with pytest.raises(NotPlain):
        plain_table([("7", "", text)], Options(), group_features().arrow_schema)


def lever_log(count):
    rng = random.Random(0)
    return {str(query_id): make_record(rng, "lever", query_id) for query_id in range(200, 200 + count)}


@pytest.mark.parametrize("layout", ["object", "indented", "array", "lines"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_every_layout_gives_the_same_groups(layout, pack, tmp_path):
    log = lever_log(700)
    flat = [{"query_id": int(key), **record} for key, record in log.items()]
    text = {
        "object": lambda: json.dumps(log),
        "indented": lambda: json.dumps(log, indent=2),
        "array": lambda: json.dumps(flat),
        "lines": lambda: "\n".join(map(json.dumps, flat)),
    }[layout]()
    path = tmp_path / "log"
    path.write_bytes(pack(text.encode()))
    groups = load_beams(path, cache_dir=tmp_path / "cache")
    records = [(key, f"record '{key}'", record) for key, record in log.items()]
    expected, _ = careful(records, Options(), group_features().arrow_schema)
    assert repr(list(groups)) == repr(expected.to_pylist())  # as text: NaN is not equal to itself


def test_cuts_in_an_object_are_only_taken_where_they_are_right(tmp_path, monkeypatch):
    """Keys inside records, strings that look like keys, blocks that end anywhere."""
    log = lever_log(20)
    log["203"]["extra"] = {"5": {"a": 1}, "6": [1]}
    log["204"]["text"] = 'x", "9": {'
    log["_meta"] = {"a": [1, {"7": 2}]}
    log = {"_version": 3, **log, "_end": None}
    path = tmp_path / "log"
    for indent in (None, 1):
        path.write_text(json.dumps(log, indent=indent))
        for size in (1, 7, 1000, 1 << 20):
            monkeypatch.setattr("lever_grpo.data.readers.BLOCK_BYTES", size)
            assert {key: record for key, _, record in iter_records(str(path))} == log


def test_what_finds_a_query_twice_takes_a_bit_a_query():
    """Exact for every key, and no more than 16 bytes each for row ids, however they are picked from their split."""
    keys = [str(i) for i in random.Random(0).sample(range(1_000_000), 100_000)]
    tracemalloc.start()
    seen = _Seen()
    assert all(map(seen.add, keys))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * len(keys)
    assert not any(map(seen.add, keys))
    others = ["_meta", "07", "-7", "\u0667", "9" * 19, "9" * 20, str(2**63), "1000000"]
    assert all(map(seen.add, others)) and not any(map(seen.add, others))


@pytest.mark.parametrize("keyed", [True, False])
def test_an_error_in_the_middle_names_its_record_and_leaves_nothing(keyed, tmp_path):
    log = lever_log(3000)
    log["2345"]["id_list"][0][-1] = 8
    lines = [json.dumps({"query_id": int(key), **record}) for key, record in log.items()]
    path = tmp_path / "log"
    path.write_text(json.dumps(log) if keyed else "\n".join(lines))
    name = "record '2345'" if keyed else "line 2146, query 2345"
    with pytest.raises(BeamDataError, match=rf"log: {name}, field 'id_list\[0\]'.*own id 2345"):
        load_beams(path, cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.arrow"))
    if keyed:
        path.write_text(json.dumps(lever_log(3000))[:-400])
        with pytest.raises(BeamDataError, match=r"after 29\d\d records.*cut short"):
            load_beams(path, cache_dir=tmp_path / "cache")


def test_memory_does_not_grow_with_the_log(tmp_path):
    """The peak of what Python and Arrow hold, of logs of which one is six times the other."""
    import tracemalloc

    schema = group_features().arrow_schema
    line = orjson.dumps({"query_id": 300, **make_record(random.Random(0), "lever", 300)}) + b"\n"
    peaks = []
    for count in (1_000, 6_000):
        path = tmp_path / f"{count}.jsonl"
        path.write_bytes(line * count)
        before = pa.total_allocated_bytes()
        tracemalloc.start()
        rows = arrow = 0
        for batch in batches(iter_texts(str(path))):
            for table in read_tables(batch, "log", {}, Options(), schema, print):
                rows += len(table)
                arrow = max(arrow, pa.total_allocated_bytes() - before)
        peaks.append(tracemalloc.get_traced_memory()[1] + arrow)
        tracemalloc.stop()
        assert rows == count
    assert peaks[1] < 1.5 * peaks[0]
