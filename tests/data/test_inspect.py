import json

import numpy as np
import pytest

from lever_grpo.cli import main
from lever_grpo.data import EmbeddingStore, inspect_log, load_beams


POOL = list(range(100, 116))


def scored(query, singles, beams=()):
    sequences = [{"prompt_order": [100 + i], "score": s, "beam": i in beams} for i, s in enumerate(singles)]
    return {"query_id": query, "pool": POOL, "zero_shot": -3.0, "sequences": sequences}


@pytest.fixture
def log(tmp_path):
    def log(*records, name="log.jsonl"):
        path = tmp_path / name
        path.write_text("\n".join(map(json.dumps, records)) if name.endswith("l") else json.dumps(records[0]))
        return path

    return log


def report_of(path, **options):
    return inspect_log(load_beams(path, streaming=True, **options))


def test_report_counts(log):
    report = report_of(log(scored(1, [-1.0, -2.0, -4.0], beams=[0]), scored(2, [-2.0] * 9)))
    assert (report.groups, report.queries, report.sequences, report.survivors) == (2, 2, 12, 1)
    assert report.group_sizes == {"min": 3, "median": 6, "mean": 6, "max": 9}
    assert report.pool_sizes["max"] == 16 and report.lengths == {1: 12} and report.sources == {"search": 12}
    assert report.score["min"] == -4.0 and report.score["mean"] == pytest.approx(-25 / 12)
    assert report.spread["max"] == pytest.approx(np.std([-1, -2, -4])) and report.spread["min"] == 0
    assert report.zero_shot["mean"] == -3.0 and report.gain_over_zero_shot == pytest.approx(11 / 12)
    assert (report.tied_groups, report.single_groups, report.usable_contrast) == (1, 0, 0.5)
    assert report.tied_pairs == pytest.approx(36 / 39)
    inside = np.var([-1, -2, -4]) * 3
    assert report.contrast_share == pytest.approx(inside / (np.var([-1, -2, -4] + [-2] * 9) * 12))
    assert any("1 of 2 groups have no contrast" in w for w in report.warnings)
    json.dumps(report.to_dict(), allow_nan=False)


def test_ties_are_relative_to_the_scale(log):
    tiny = [1e-8 * s for s in (1, 2, 3)]
    assert report_of(log(scored(1, tiny))).tied_groups == 0
    assert report_of(log(scored(1, [1e6, 1e6 + 1e-3, 1e6]))).tied_groups == 1


def test_healthy_log_has_no_warnings(log):
    assert report_of(log(*(scored(q, [-1.0, -2.0, -4.0], beams=[0]) for q in range(6)))).warnings == []


def test_reversed_logs_are_noticed(log):
    worst_kept = [scored(q, [-1.0, -2.0, -4.0], beams=[2]) for q in range(6)]
    assert "looks reversed: survivors" in report_of(log(*worst_kept)).warnings[0]
    assert report_of(log(*worst_kept), higher_is_better=False).warnings == []

    def beams(sign, order=(0.1, 0.2, 0.3)):
        ids = [[100, 7], [101, 7], [102, 7]]
        record = {"id_list": ids, "score_list": [sign * s for s in order], "candidate_ids": POOL}
        return {str(q): {**record, "id_list": [[i, q] for i, _ in ids]} for q in range(6)}

    rising = report_of(log(beams(1), name="a.json"))
    assert any("sorted from the lowest" in w for w in rising.warnings)
    falling = report_of(log(beams(1, (0.3, 0.2, 0.1)), name="b.json"))
    assert not any("reversed" in w for w in falling.warnings)
    shots = beams(-1, (0.3, 0.1, 0.2))
    for record in shots.values():
        record["shot_scores"] = [[s] for s in record["score_list"]]
    assert any("best gain is negative in 6 of 6" in w for w in report_of(log(shots, name="c.json")).warnings)


def test_what_the_loader_assumed_is_a_warning(log):
    beams = {
        str(q): {"id_list": [[100, 101, q], [101, 100, q], [100, 101, q]], "score_list": [0.3, 0.2, 0.1]}
        for q in (1, 2)
    }
    report = report_of(log(beams, name="a.json"), rebuild_pools=True)
    text = "\n".join(report.warnings)
    assert "looks marginal: 2 of 2" in text and "2 of 2 pools were rebuilt" in text
    assert "2 exact repeats" in text and "survivors only" in text
    assert report.notes["repeats"] == 2 and report.notes["pool_rebuilt"] == 2


def test_embeddings_are_checked_against_the_log(log):
    path = log(scored(1, [-1.0, -2.0], beams=[0]))
    values = np.ones((110, 2), np.float32)
    values[4] = np.nan
    warnings = inspect_log(load_beams(path, streaming=True), store=EmbeddingStore({"question": values})).warnings
    assert any("6 row ids have no embedding (the first: 110" in w for w in warnings)
    assert any("'question': NaN or infinity in 1 rows (the first: 4)" in w for w in warnings)


# ---------------------------------------------------------------- the command


def test_command_prints_and_returns_0(log, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "120")
    path = log(*(scored(q, [-1.0, -2.0, -4.0], beams=[0]) for q in range(6)))
    assert main(["inspect", str(path), "--strict"]) == 0
    out = capsys.readouterr().out
    assert "6 of 6 queries" in out and "usable contrast" in out and "no warnings" in out


def test_strict_returns_1_only_when_there_are_warnings(log, capsys):
    path = str(log(scored(1, [-1.0, -1.0])))
    assert main(["inspect", path]) == 0 and main(["inspect", path, "--strict"]) == 1
    assert "warning: 1 of 1 groups have no contrast" in capsys.readouterr().out


def test_json_is_all_that_stdout_holds(log, capsys):
    path = log({"1": {"id_list": [[100, 1]], "score_list": [0.5]}}, name="a.json")
    assert main(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"]["pool_rebuilt"] == 1


def test_options_reach_the_loader(log, capsys, tmp_path):
    pools = tmp_path / "pools.json"
    pools.write_text(json.dumps({"1": POOL}))
    path = str(
        log({"1": {"id_list": [[100, 1], [101, 1], [100, 101, 1]], "score_list": [0.5, 0.2, 0.1]}}, name="a.json")
    )
    assert main(["inspect", path, "--json", "--pools", str(pools), "--shots", "1", "--lower-is-better"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["pool_sizes"]["max"] == 16 and report["lengths"] == {"1": 2} and report["score"]["max"] == -0.2


@pytest.mark.parametrize("content", [None, "", "hello", '{"7": {"id_list": [[1, 8]], "score_list": [0.5]}}'])
def test_bad_input_is_one_line_and_2(tmp_path, capsys, content):
    path = tmp_path / "log.json"
    if content is not None:
        path.write_text(content)
    assert main(["inspect", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and "log.json" in captured.err


def test_env_names_versions(capsys):
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert "torch: " in out and "Python: 3" in out
