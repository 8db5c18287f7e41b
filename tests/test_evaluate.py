"""From selectors and a log to answers and a report: every method, resumed, and the same by two processes."""

import json
import os
import re
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from small_clip import WIDTH, make_clip, make_processor, png

from lever_grpo import DemonstrationSelector, PointerSelector, PointerSelectorConfig
from lever_grpo.cli import main
from lever_grpo.data import load_examples
from lever_grpo.inference import best_logged, mixed_picks, mmr_picks, random_picks, read_answers
from lever_grpo.models import ClipSelector
from lever_grpo.pipeline.evaluate import EvaluateArguments, evaluate, load_queries, make_picks, parse_evaluate
from lever_grpo.scorers import ScorerError


ROWS, POOL, QUERIES = 40, 6, 12
COLOURS = ("red", "green", "blue")


class Reader:
    """Answers what most of the demonstrations say; knows the right answer better the more of them say it."""

    def __init__(self, asked=None, fail_after=None, cannot=()):
        self.asked, self.fail_after, self.cannot, self.calls = asked, fail_after, cannot, 0

    def score(self, prompts):
        self.calls += 1
        if self.fail_after is not None and self.calls > self.fail_after:
            raise ScorerError("the model went away")
        if self.asked is not None:
            self.asked.extend((p.query.id, tuple(d.id for d in p.demonstrations)) for p in prompts)
        return [None if p.query.id in self.cannot else np.array([-1.0 / (1 + self._right(p))] * 2) for p in prompts]

    def answer(self, prompts, max_new_tokens=10):
        said = [[d.answers[0] for d in p.demonstrations] for p in prompts]
        return [
            None if p.query.id in self.cannot else (max(sorted(set(a)), key=a.count) if a else "none")
            for p, a in zip(prompts, said, strict=True)
        ]

    def describe(self):
        return {"backend": "reader"}

    @staticmethod
    def _right(prompt):
        return sum(d.answers[0] == prompt.query.answers[0] for d in prompt.demonstrations)


@pytest.fixture
def task(tmp_path) -> dict:
    return make_task(tmp_path)


def make_task(tmp_path, pool_size=POOL, queries=QUERIES) -> dict:
    rng = np.random.default_rng(0)
    count = queries + ROWS - QUERIES  # of rows; the first ones are the queries
    answers = [COLOURS[i % 3] for i in range(count)]
    rows = [{"id": i, "question": f"colour {i}?", "answers": [answer]} for i, answer in enumerate(answers)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    embeddings = {name: rng.standard_normal((count, 8)).astype(np.float32) for name in ("question", "image")}
    save_file(embeddings, str(tmp_path / "rows.safetensors"))
    records = []
    for query in range(queries):
        pool = (queries + rng.permutation(ROWS - QUERIES)[:pool_size]).tolist()
        pairs = [[i, j] for i in range(pool_size) for j in range(pool_size) if i != j]
        sequences = [[i] for i in range(pool_size)] + pairs
        scores = [
            sum(answers[pool[i]] == answers[query] for i in s) + zlib.crc32(repr(s).encode()) / 2**40
            for s in sequences
        ]
        record = {"query_id": query, "candidate_ids": pool, "sequences": sequences, "scores": scores}
        records.append(record | {"zero_shot": -1.0})
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for name, scale in (("sft", 1.0), ("grpo", 5.0)):
        config = PointerSelectorConfig(
            query_features={"question": 8, "image": 8},
            candidate_features={"question": 8, "image": 8},
            encoder="none",
            similarity_prior=True,
            prior_scale=scale,
        )
        PointerSelector(config).save_pretrained(tmp_path / name)
    return {
        "task_file": str(tmp_path / "rows.jsonl"),
        "log": str(tmp_path / "log.jsonl"),
        "embeddings": str(tmp_path / "rows.safetensors"),
        "selectors": [f"sft={tmp_path / 'sft'}", f"grpo={tmp_path / 'grpo'}", f"grpo={tmp_path / 'sft'}"],
        "output_dir": str(tmp_path / "out"),
        "random_draws": 3,
        "batch_size": 16,
        "disable_tqdm": True,
    }


def files(folder) -> dict[str, bytes]:
    names = ("report.json", "picks.json", "report.html")
    return {name: Path(folder, name).read_bytes() for name in names}


def test_every_method_is_asked_and_judged(task):
    evaluation = evaluate(EvaluateArguments(**task), Reader())
    report = evaluation["metrics"]["accuracy"]["2"]
    expected = ["zero_shot", "random", "similarity", "similarity_image", "mix", "mmr", "sft", "grpo", "oracle"]
    assert sorted(report["methods"]) == sorted(expected) and report["n_queries"] == QUERIES
    assert report["methods"]["zero_shot"]["reward"]["mean"] == 0
    # by hand: the log's best pairs are two right answers where the pool has them
    log = [json.loads(line) for line in Path(task["log"]).read_text().splitlines()]
    best = [max(zip(r["scores"], r["sequences"], strict=True))[1] for r in log]
    reader, queries = Reader(), load_queries(EvaluateArguments(**task))
    right = []
    for record, chosen in zip(log, best, strict=True):
        shown = [queries.rows[record["candidate_ids"][i]].answers[0] for i in reversed(chosen)]
        right.append(max(sorted(set(shown)), key=shown.count) == queries.rows[record["query_id"]].answers[0])
    assert report["methods"]["oracle"]["reward"]["mean"] == pytest.approx(np.mean(right))
    assert report["methods"]["oracle"]["reward"]["mean"] > report["methods"]["random"]["reward"]["mean"]
    assert {"grpo_minus_random", "grpo_minus_similarity", "grpo_minus_sft"} <= report["paired"].keys()
    assert reader is not None and json.loads(files(task["output_dir"])["report.json"])["metrics"].keys() == {
        "accuracy",
        "log_prob",
    }
    shown = evaluation["gallery"][0]["picks"]["2"]["grpo"]
    assert len(shown["demonstrations"]) == 2 and shown["accuracy"] in (0.0, 1.0)


def test_a_selector_that_sees_the_rows_is_judged_by_them(task, tmp_path):
    folder = tmp_path / "clip"
    ClipSelector.from_clip(make_clip(), modalities=["text"], hidden_dim=16).save_pretrained(folder)
    make_processor().save_pretrained(folder)
    # embeddings of the width that it reads, which it must not take for its own
    rng = np.random.default_rng(1)
    names = {"question": 8, "image": 8, "text": WIDTH}
    save_file({n: rng.standard_normal((ROWS, w)).astype(np.float32) for n, w in names.items()}, task["embeddings"])
    features = {"query_features": ["text"], "candidate_features": ["text"]}
    options = {**task, **features, "selectors": [f"clip={folder}"], "baselines": ["random"]}
    report = evaluate(EvaluateArguments(**options), Reader())["metrics"]["log_prob"]["2"]
    assert {"clip", "random"} == report["methods"].keys()
    picks = json.loads(Path(task["output_dir"], "picks.json").read_text())
    rows, log = load_examples(task["task_file"]), [json.loads(line) for line in open(task["log"])]
    picker = DemonstrationSelector.from_pretrained(folder)
    for record, shown in zip(log, picks["shots"]["2"]["clip"][0], strict=True):
        pool = [rows[i] for i in record["candidate_ids"]]
        picker.set_candidates(pool)
        (expected,) = picker.select([rows[record["query_id"]]], 2, pool_size=len(pool))
        assert shown == [row.id for row in expected.demonstrations]


def save_similarity(folder, *names) -> str:
    """A selector that picks the nearest by some embeddings, which its config has in this order."""
    widths = dict.fromkeys(names, 8)
    config = PointerSelectorConfig(
        query_features=widths, candidate_features=widths, encoder="none", similarity_prior=True,
        prior_pairs={f"{names[0]}:{names[0]}": 1.0}, prior_rank=0,
    )  # fmt: skip
    PointerSelector(config).save_pretrained(folder)
    return f"{folder.name}={folder}"


def test_each_selector_sees_the_embeddings_of_its_own_config(task, tmp_path):
    orders = {"q": ("question",), "i": ("image",), "qi": ("question", "image"), "iq": ("image", "question")}
    selectors = [save_similarity(tmp_path / name, *order) for name, order in orders.items()]
    for features in (["question"], ["question", "image"], ["image", "question"]):  # of the baselines
        options = {"query_features": features, "candidate_features": features, "selectors": selectors}
        arguments = EvaluateArguments(**{**task, **options})
        queries = load_queries(arguments)
        picks = make_picks(arguments, queries, 2)
        for name, (first, *_) in orders.items():
            nearest = mmr_picks(queries.dataset, queries.store, [first], 2, trade_off=1.0)
            pools = zip(queries.dataset["candidate_ids"], nearest.tolist(), strict=True)
            assert picks[name][0] == [[pool[i] for i in reversed(chosen)] for pool, chosen in pools]


@pytest.mark.parametrize("held", [{"image": 8}, {"question": 4, "image": 8}])
def test_a_selector_that_reads_other_embeddings_is_named(task, tmp_path, held):
    save_file({n: np.ones((ROWS, w), np.float32) for n, w in held.items()}, task["embeddings"])
    options = {"selectors": [save_similarity(tmp_path / "q", "question")], "baselines": ["random"]}
    with pytest.raises(ValueError, match="selector q=.*q reads 'question' of width 8 .*, and the embeddings are {"):
        evaluate(EvaluateArguments(**{**task, **options}), Reader())


SHOTS = (1, 2, 3, 4, 6, 8)


@pytest.fixture(scope="module")
def many_shots(tmp_path_factory):
    """An evaluation with all of them: its task, what the model was asked, and the evaluation."""
    task, asked = make_task(tmp_path_factory.mktemp("shots"), pool_size=9), []
    return task, asked, evaluate(EvaluateArguments(**task, num_shots=list(SHOTS)), Reader(asked))


@pytest.mark.parametrize("shots", SHOTS)
def test_any_number_of_shots(many_shots, shots):
    task, asked, evaluation = many_shots
    records = {r["query_id"]: r for r in map(json.loads, Path(task["log"]).read_text().splitlines())}
    shown = {(query, demonstrations) for query, demonstrations in asked if len(demonstrations) == shots}
    assert {query for query, _ in shown} == set(records)
    for query, demonstrations in shown:
        assert len(set(demonstrations)) == shots and set(demonstrations) <= set(records[query]["candidate_ids"])
    for metric in ("accuracy", "log_prob"):
        report = evaluation["metrics"][metric][str(shots)]
        # the log has no best sequence of more than two
        assert ("oracle" in report["methods"]) == (shots <= 2)
        assert {"zero_shot", "random", "similarity", "mmr", "sft", "grpo"} <= report["methods"].keys()
        assert report["n_queries"] == QUERIES and "grpo_minus_sft" in report["paired"]
        folder = Path(task["output_dir"], metric, f"shots{shots}")
        assert json.loads((folder / "report.json").read_text())["methods"] == report["methods"]
    for query in evaluation["gallery"]:
        assert all(len(query["picks"][str(shots)][name]["demonstrations"]) == shots for name in ("random", "grpo"))


def test_every_number_of_shots_has_a_place_in_the_report(many_shots):
    task, _, evaluation = many_shots
    wanted = [str(shots) for shots in SHOTS]
    summary = json.loads(files(task["output_dir"])["report.json"])
    assert [list(summary["metrics"][metric]) for metric in ("accuracy", "log_prob")] == [wanted] * 2
    page = files(task["output_dir"])["report.html"].decode()
    columns = re.findall(r'<th scope="col">(\d+) shots? <small>', page)
    assert columns == wanted * 2  # a table of each metric
    assert re.findall(r"<option value=.\d+.[^>]*>(\d+)</option>", page)[: len(wanted)] == wanted


def test_metrics_are_those_that_are_asked_for(task):
    arguments = EvaluateArguments(**task, metrics=["token_f1", "cider"])
    try:
        evaluation = evaluate(arguments, Reader())
    except ImportError as error:
        pytest.skip(str(error))
    assert list(evaluation["metrics"]) == ["token_f1", "cider"]
    f1, cider = (evaluation["metrics"][name]["2"]["methods"] for name in ("token_f1", "cider"))
    # an answer is one word: its F1 is whether it is right, and CIDEr has nothing else to tell either
    right = np.mean([pick["picks"]["2"]["grpo"]["accuracy"] for pick in evaluation["gallery"]])
    assert f1["grpo"]["reward"]["mean"] == pytest.approx(right)
    assert (cider["grpo"]["reward"]["mean"] > 0) == (right > 0)


def test_prompts_are_asked_once_and_a_new_selector_costs_its_own(task):
    asked = []
    evaluate(EvaluateArguments(**{**task, "selectors": task["selectors"][:1]}), Reader(asked))
    assert len(asked) == len(set(asked))
    first = set(asked)
    evaluate(EvaluateArguments(**{**task, "baselines": ["random"]}), Reader(asked))  # similarity again: all known
    assert first == set(asked)


def test_goes_on_after_a_failure(task, tmp_path):
    whole = tmp_path / "whole"
    evaluate(EvaluateArguments(**{**task, "output_dir": str(whole)}), Reader())
    with pytest.raises(ScorerError):
        evaluate(EvaluateArguments(**task), Reader(fail_after=2))
    assert len(read_answers(Path(task["output_dir"]) / "answers")) == 2 * task["batch_size"]
    evaluate(EvaluateArguments(**task), Reader())
    assert files(task["output_dir"]) == files(whole)


def test_goes_on_after_a_kill(tmp_path):
    """200 queries, 8 methods, 2 numbers of shots."""
    task, whole = make_task(tmp_path, queries=200), tmp_path / "whole"
    evaluation = evaluate(EvaluateArguments(**{**task, "output_dir": str(whole)}), Reader())
    for shots in ("1", "2"):
        report = evaluation["metrics"]["accuracy"][shots]
        assert report["n_queries"] == 200 and len(report["methods"].keys() - {"zero_shot"}) == 8
    script = tmp_path / "slow.py"
    script.write_text(
        "import json, sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from test_evaluate import Reader\n"
        "from lever_grpo.pipeline.evaluate import EvaluateArguments, evaluate\n"
        "class Slow(Reader):\n"
        "    def score(self, prompts):\n"
        "        time.sleep(0.5)\n"
        "        return super().score(prompts)\n"
        "evaluate(EvaluateArguments(**json.loads(sys.argv[2])), Slow())\n"
    )
    answers = Path(task["output_dir"]) / "answers"
    for files_before_the_kill in (1, 3):
        process = subprocess.Popen([sys.executable, str(script), str(Path(__file__).parent), json.dumps(task)])
        deadline = time.monotonic() + 120
        while len(list(answers.glob("*.jsonl"))) < files_before_the_kill and time.monotonic() < deadline:
            time.sleep(0.05)
        process.kill()
        assert process.wait() == -9 and not (answers.parent / "report.json").exists()
    evaluate(EvaluateArguments(**task), Reader())
    assert files(task["output_dir"]) == files(whole)


def test_goes_on_where_a_file_of_answers_was_deleted(task):
    evaluate(EvaluateArguments(**task), Reader())
    before = files(task["output_dir"])
    kept = sorted((Path(task["output_dir"]) / "answers").glob("*.jsonl"))
    kept[1].unlink()
    asked = []
    evaluate(EvaluateArguments(**task), Reader(asked))
    assert len(asked) == task["batch_size"] and files(task["output_dir"]) == before


def test_two_processes_give_the_same(task, tmp_path):
    one = evaluate(EvaluateArguments(**{**task, "output_dir": str(tmp_path / "one")}), Reader())
    script = tmp_path / "both.py"
    script.write_text(
        "import json, sys; sys.path.insert(0, sys.argv[1])\n"
        "from accelerate import PartialState\n"
        "from test_evaluate import Reader\n"
        "from lever_grpo.pipeline.evaluate import EvaluateArguments, evaluate\n"
        "evaluate(EvaluateArguments(**json.loads(sys.argv[2])), Reader())\n"
        "assert PartialState().num_processes == 2\n"
        "PartialState().destroy_process_group()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    subprocess.run([*command, str(Path(__file__).parent), json.dumps(task)], check=True, env=environment, timeout=300)
    two = json.loads(files(task["output_dir"])["report.json"])
    assert two["metrics"] == json.loads(json.dumps(one["metrics"]))


def test_queries_that_cannot_be_asked_are_left_out_for_all(task):
    evaluation = evaluate(EvaluateArguments(**task), Reader(cannot={3}))
    assert evaluation["metrics"]["accuracy"]["1"]["n_queries"] == QUERIES - 1
    assert "1 of 12 queries are left out for all methods" in evaluation["notes"][0] and "[3]" in evaluation["notes"][0]
    with pytest.raises(ValueError, match="no query"):
        evaluate(EvaluateArguments(**{**task, "overwrite": True}), Reader(cannot=set(range(QUERIES))))


def test_a_query_that_stands_twice_in_the_log_may_fail_in_one_of_its_pools(task):
    log = Path(task["log"])
    records = [json.loads(line) for line in log.read_text().splitlines()]
    first = records[3]["candidate_ids"]
    records.append(records[3] | {"candidate_ids": [i for i in range(QUERIES, ROWS) if i not in first][:POOL]})
    log.write_text("".join(json.dumps(record) + "\n" for record in records))

    class Picky(Reader):
        def score(self, prompts):
            bad = [p.query.id == 3 and any(d.id in first for d in p.demonstrations) for p in prompts]
            return [None if b else score for b, score in zip(bad, super().score(prompts), strict=True)]

    evaluation = evaluate(EvaluateArguments(**task), Picky())
    assert evaluation["metrics"]["accuracy"]["2"]["n_queries"] == QUERIES
    assert "1 of 13 queries are left out" in evaluation["notes"][0] and "[3]" in evaluation["notes"][0]
    assert [query["query_id"] for query in evaluation["gallery"]] == [*range(3), *range(4, QUERIES), 3]


def test_a_broken_image_is_not_shown_and_stops_nothing(task, tmp_path):
    rows = [json.loads(line) | {"image": "whole.png"} for line in open(task["task_file"])]
    (tmp_path / "whole.png").write_bytes(png(1, 0, 0))
    (tmp_path / "broken.png").write_bytes(png(1, 0, 0)[:40])
    pool = json.loads(Path(task["log"]).read_text().splitlines()[0])["candidate_ids"]
    rows[3]["image"] = rows[pool[0]]["image"] = "broken.png"
    Path(task["task_file"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluation = evaluate(EvaluateArguments(**task, num_shots=[POOL]), Reader())
    note = f"images of 2 rows cannot be read and are not shown: 3, {pool[0]}."
    assert note in evaluation["notes"] and note in files(task["output_dir"])["report.html"].decode()
    shown = {query["query_id"]: query["image"] for query in evaluation["gallery"]}
    assert [query for query, image in shown.items() if image is None] == [3]
    demonstrations = evaluation["gallery"][0]["picks"][str(POOL)]["grpo"]["demonstrations"]
    assert [row["id"] for row in demonstrations if row["image"] is None] == [pool[0]]


def test_answers_of_another_model_are_not_mixed(task):
    class Other(Reader):
        def describe(self):
            return {"backend": "other"}

    evaluate(EvaluateArguments(**task), Reader())
    with pytest.raises(ValueError, match="model.separator: None there, ' ' here"):  # though nothing is left to ask
        evaluate(EvaluateArguments(**{**task, "separator": " "}))
    with pytest.raises(ValueError, match="backend: 'reader' there, 'other' here"):
        evaluate(EvaluateArguments(**task), Other())
    evaluate(EvaluateArguments(**{**task, "overwrite": True}), Other())


def test_picks_stand_in_prompt_order(task):
    queries = load_queries(EvaluateArguments(**task))
    left, right = (
        make_picks(EvaluateArguments(**{**task, "construct_order": order}), queries, 2)["grpo"]
        for order in ("left", "right")
    )
    assert [[row[::-1] for row in seed] for seed in left] == right


def test_pools_without_a_log(task, tmp_path):
    pools = tmp_path / "pools.jsonl"
    records = [json.loads(line) for line in Path(task["log"]).read_text().splitlines()]
    pools.write_text("".join(json.dumps({k: r[k] for k in ("query_id", "candidate_ids")}) + "\n" for r in records))
    evaluation = evaluate(EvaluateArguments(**{**task, "log": None, "candidate_pools": str(pools)}), Reader())
    methods = evaluation["metrics"]["accuracy"]["2"]["methods"]
    assert "oracle" not in methods and "grpo" in methods


def pools_of(task, pools) -> dict:
    """The task with pools of a file instead of its log."""
    path = Path(task["log"]).with_name("pools.json")
    path.write_text(json.dumps(pools))
    return {**task, "log": None, "candidate_pools": str(path)}


def test_a_pool_gives_no_answer_away(task, caplog):
    rows = [row | {"entity": f"about {row['id'] % 5}"} for row in map(json.loads, open(task["task_file"]))]
    rows[3].pop("entity"), rows[4].pop("entity")  # about nothing: not about the same thing
    Path(task["task_file"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    pools = {0: [20, 0, 21, 22], 1: [21, 20, 22], 2: [20, 22, 21, 23, 27], 3: [4, 20, 21]}
    queries = load_queries(EvaluateArguments(**pools_of(task, pools)))
    assert queries.dataset["candidate_ids"][:] == [[21, 22], [20, 22], [20, 21, 23], [4, 20, 21]]
    assert "3 pools held the query itself, or rows about the same thing" in caplog.text
    assert "those of queries 0, 1, 2;" in caplog.text


def test_pools_of_other_queries_are_named(task, caplog):
    other = {query: [20, 21] for query in range(90, 97)}
    queries = load_queries(EvaluateArguments(**pools_of(task, {0: [20, 21], **other})))
    assert queries.dataset["query_id"][:] == [0]
    assert "7 of 8 pools are of queries that are no rows of the task" in caplog.text
    assert "not used: 90, 91, 92, 93, 94, …" in caplog.text
    with pytest.raises(ValueError, match=r"found 7 of other queries, \[90, .*; do both files belong together"):
        load_queries(EvaluateArguments(**pools_of(task, other)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"selectors": ["grpo"]}, "expected name=path"),
        ({"selectors": ["random=x"]}, "none of"),
        ({"selectors": ["prior_minus_answers=x"]}, "'prior_minus_answers' must not have '_minus'"),
        ({"selectors": ["prior_minus=x"]}, "'prior_minus' must not have '_minus'"),
        ({"num_shots": [0]}, "numbers from 1 on"),
        ({"num_shots": [7]}, "smallest pool has 6"),
        ({"num_queries": 0}, "num_queries=0 must be at least 1"),
        ({"num_queries": -3}, "num_queries=-3 must be at least 1"),
        ({"baselines": ["best"]}, "must be of"),
        ({"metrics": ["bleu"]}, "must be of accuracy, log_prob, token_f1, cider"),
        ({"log": None}, "have no pools"),
        ({"embeddings": None}, "through embeddings"),
        ({"similarity_features": ["answer"]}, "two sides share question, image|two sides share image, question"),
        ({"candidate_pools": "x"}, "give one of them"),
    ],
)
def test_bad_settings(task, change, message):
    with pytest.raises(ValueError, match=message):
        evaluate(EvaluateArguments(**{**task, **change}), Reader())


def test_command_line(task, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("lever_grpo.pipeline.evaluate.make_scorer", lambda arguments, state: Reader())
    config = tmp_path / "evaluate.yaml"
    config.write_text(json.dumps(task))
    assert main(["evaluate", f"--config={config}", "--num_shots", "1", "--num_queries", "5"]) == 0
    assert capsys.readouterr().out.strip().endswith("out/report.html")
    assert main(["evaluate", "--config", str(config), "--shots", "2"]) == 2


@pytest.mark.parametrize("name", ["evaluate_icl", "evaluate_supersense", "evaluate_easy_vqa"])
def test_recipes_parse(name):
    arguments = parse_evaluate(["--config", str(Path(__file__).resolve().parents[1] / "recipes" / f"{name}.yaml")])
    rows = load_queries(arguments).rows.values()
    assert {answer for row in rows for answer in row.answers} == set(arguments.answers)
    assert arguments.seeds_of.keys() == {"sft", "agreement", "rce", "grpo"}


class TestBaselines:
    def test_mmr_by_hand(self, task):
        queries = load_queries(EvaluateArguments(**task))
        picks = mmr_picks(queries.dataset, queries.store, ["question"], 3, 0.3)
        for row, chosen in zip(queries.dataset, picks.tolist(), strict=True):
            unit = {i: v / np.linalg.norm(v) for i, v in enumerate(queries.store["question"].astype(float))}
            pool, query = row["candidate_ids"], unit[row["query_id"]]
            expected = []
            while len(expected) < 3:
                value = {
                    k: 0.3 * query @ unit[c] - 0.7 * max([unit[c] @ unit[pool[p]] for p in expected], default=0)
                    for k, c in enumerate(pool)
                    if k not in expected
                }
                expected.append(max(value, key=value.get))
            assert chosen == expected

    def test_mixed_takes_turns(self, task):
        queries = load_queries(EvaluateArguments(**task))
        both = mixed_picks(queries.dataset, queries.store, ["question", "image"], 2)
        assert (both[:, :1] == mmr_picks(queries.dataset, queries.store, ["question"], 1)).all()
        assert all(len(set(row)) == 2 for row in both.tolist())

    def test_random_is_by_query_and_seed(self, task):
        dataset = load_queries(EvaluateArguments(**task)).dataset
        picks = random_picks(dataset, 3, seed=1)
        assert (random_picks(dataset.select([4, 5]), 3, seed=1) == picks[4:6]).all()
        assert (random_picks(dataset, 3, seed=2) != picks).any()
        assert all(len(set(row)) == 3 for row in picks.tolist())

    def test_best_logged(self):
        rows = [{"sequences": [[0], [1], [0, 1]], "scores": [0.1, 0.2, 9.0]}]
        assert best_logged(rows, 1).tolist() == [[1]] and best_logged(rows, 3) is None
