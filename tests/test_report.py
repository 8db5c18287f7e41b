"""The report: its numbers, its keys, and its files."""

import json
import os
import re

import numpy as np
import pytest
from rich.console import Console

from lever_grpo.metrics import paired_interval
from lever_grpo.report import (
    MethodResult,
    build_report,
    default_pairs,
    load_results,
    pool_tasks,
    print_report,
    save_results,
    stack_seeds,
    to_markdown,
    write_report,
)
from lever_grpo.report import write as write_module
from lever_grpo.report.build import to_jsonable
from lever_grpo.report.figures import PANELS, _continuous, _panel_lines, _stage_spans, draw_curves


NAMES = ["zero_shot", "random", "similarity", "sft", "rce", "grpo", "oracle"]
LEVELS = dict(zip(NAMES, [-2.0, 0.0, 1.0, 1.1, 1.4, 1.6, 2.0], strict=True))


def results(scale=1.0, offset=0.0, queries=30, seeds=3, names=NAMES, seed=0):
    """Methods whose true levels are LEVELS, on one set of queries of differing difficulty."""
    rng = np.random.default_rng(seed)
    difficulty = rng.normal(0, 1.0, queries)
    rows = []
    for name in names:
        trained = name in ("sft", "rce", "grpo")
        noise = rng.normal(0, 0.1, (seeds if trained else 1, queries))
        picks = rng.integers(0, 4, (*noise.shape, 2)) if name not in ("zero_shot", "random") else None
        percentiles = None if name == "zero_shot" else np.full(noise.shape, 50.0)
        rows.append(MethodResult(name, offset + scale * (LEVELS[name] + difficulty + noise), percentiles, picks=picks))
    return rows


def log_history():
    """An SFT run, then a run of three stages, as the Hugging Face Trainer logs them."""
    log = [{"step": step, "loss": 4.0 - step / 10, "stage": "sft"} for step in (5, 10)]
    log += [{"step": 10, "eval_loss": 3.0, "eval_greedy_reward": -1.0}, {"step": 10, "train_runtime": 1.0}]
    log += [{"step": 0, "eval_greedy_reward": -1.0, "eval_kl": 0.0}]
    for step in range(1, 10):
        stage = (step - 1) // 3
        entry = {"step": step, "stage": stage, "loss": 3.0 if stage == 0 else 0.1, "kl": 0.01 * step, "reward": -1.0}
        log.append(entry | ({"temperature": 2.0 - step / 3} if stage == 0 else {"beta": 0.1, "policy_loss": 0.05}))
    return log


# The numbers


def test_keys_of_the_report():
    report = build_report(results())
    assert list(report["methods"]) == NAMES
    for name, row in report["methods"].items():
        assert row["reward"].keys() == {"mean", "ci_low", "ci_high"}
        assert ("percentile" in row) == (name != "zero_shot")
        assert ("changed_vs_sft" in row) == (name in ("similarity", "rce", "grpo", "oracle"))
        assert "accuracy" not in row and "gap_closed" in row and "regret" in row
    assert list(report["paired"]) == [
        "sft_minus_similarity",
        "sft_minus_random",
        *(f"rce_minus_{b}" for b in ("sft", "similarity", "random")),
        *(f"grpo_minus_{b}" for b in ("rce", "sft", "similarity", "random")),
    ]
    assert all(row.keys() == {"mean", "ci_low", "ci_high", "p_value"} for row in report["paired"].values())
    assert (report["n_queries"], report["n_seeds"]) == (30, 3)


def test_numbers_are_those_of_the_metrics():
    methods = {result.name: result for result in results()}
    report = build_report(list(methods.values()))
    row = report["paired"]["grpo_minus_similarity"]
    interval = paired_interval(methods["grpo"].rewards, methods["similarity"].rewards)
    assert (row["mean"], row["ci_low"], row["ci_high"]) == interval
    assert row["ci_low"] > 0 and row["p_value"] < 0.001
    means = {name: result.rewards.mean() for name, result in methods.items()}
    share = (means["grpo"] - means["random"]) / (means["oracle"] - means["random"])
    assert report["methods"]["grpo"]["gap_closed"] == pytest.approx(share)
    assert report["methods"]["random"]["gap_closed"] == 0.0
    assert report["methods"]["oracle"]["gap_closed"] == 1.0


def test_accuracy_and_changed_share_by_hand():
    sft = MethodResult("sft", [0.0, 0.0], correct=[0.0, 1.0], picks=[[0, 1], [2, 3]])
    grpo = MethodResult("grpo", np.zeros((2, 2)), correct=[[1.0, 1.0], [0.0, 1.0]], picks=[[[1, 0], [2, 3]]] * 2)
    methods = build_report([sft, grpo])["methods"]
    assert (methods["sft"]["accuracy"], methods["grpo"]["accuracy"]) == (0.5, 0.75)
    assert methods["grpo"]["changed_vs_sft"] == 0.5
    assert "gap_closed" not in methods["grpo"]  # neither random nor oracle was run


def test_absent_methods_are_absent_and_others_stand_before_the_oracle():
    rows = results(names=["random", "oracle", "grpo"]) + [MethodResult("grpo_literal", np.zeros(30))]
    report = build_report(rows)
    assert list(report["methods"]) == ["random", "grpo", "grpo_literal", "oracle"]
    assert list(report["paired"]) == ["grpo_minus_random", "grpo_literal_minus_random"]
    assert default_pairs(["similarity", "oracle"]) == []


def test_every_stage_is_compared_with_the_one_before_it():
    before = {"agreement": "sft", "rce": "agreement", "grpo": "rce"}
    pairs = default_pairs(["random", "sft", "agreement", "rce", "grpo", "grpo_literal", "oracle"])
    assert set(before.items()) <= set(pairs) and len(pairs) == len(set(pairs))
    assert ("grpo_literal", "grpo") not in pairs  # no stage of this training
    assert ("grpo", "sft") in default_pairs(["sft", "grpo"])  # GRPO alone

    methods = {result.name: result for result in results()}
    row = build_report(list(methods.values()))["paired"]["grpo_minus_rce"]
    assert row["mean"] == pytest.approx(methods["grpo"].rewards.mean() - methods["rce"].rewards.mean())
    assert row["ci_low"] < row["mean"] < row["ci_high"]


def test_regret_is_the_shortfall_from_the_oracle():
    rows = {"random": [0.0, 1.0], "sft": [[1.0, 2.0], [3.0, 2.0]], "oracle": [3.0, 4.0]}
    methods = build_report([MethodResult(name, rewards) for name, rewards in rows.items()])["methods"]
    assert {name: row["regret"] for name, row in methods.items()} == {"random": 3.0, "sft": 1.5, "oracle": 0.0}
    rows = [MethodResult(name, rewards) for name, rewards in rows.items()]
    assert "regret" not in build_report(rows[:2])["methods"]["sft"]  # nothing to fall short of
    pooled = pool_tasks({"a": rows, "b": rows})["methods"]["sft"]
    assert pooled["regret"] == pytest.approx(1.5 / 3.0)  # in units of the gap


def test_agreement_with_the_log(tmp_path):
    def row(name, seeds=2, **agreement):
        return MethodResult(name, np.zeros((seeds, 3)), **agreement)

    sft = row("sft", rank_correlation=[0.25, 0.5], calibration_error=[1.0, 2.0])
    save_results([sft, row("grpo", 1, calibration_error=0.5), row("random", 1)], tmp_path / "results.json")
    report = build_report(list(load_results(tmp_path / "results.json").values()))
    methods = report["methods"]
    assert (methods["sft"]["rank_correlation"], methods["sft"]["calibration_error"]) == (0.375, 1.5)
    assert "rank_correlation" not in methods["grpo"] and "calibration_error" not in methods["random"]
    text = to_markdown(report)
    assert "| method | regret | rank correlation | calibration error |" in text
    assert "| SFT | - | 0.375 | 1.500 |" in text and "| GRPO | - | - | 0.500 |" in text
    assert "calibration error" not in to_markdown(build_report([row("random")]))
    with pytest.raises(ValueError, match=r"sft: rank_correlation is \[0.5\]; expected .* 2 seeds"):
        row("sft", rank_correlation=0.5)

    # files of earlier versions know nothing of it, and may be seeds beside newer ones
    old = {key: value for key, value in sft.to_dict().items() if key in ("name", "rewards")}
    (tmp_path / "old.json").write_text(json.dumps([old]))
    older = load_results(tmp_path / "old.json")["sft"]
    assert stack_seeds([sft, older]).calibration_error is None
    assert stack_seeds([sft, row("sft", 1, calibration_error=4.0)]).calibration_error.tolist() == [1.0, 2.0, 4.0]
    tasks = {task: [row("random", 1), sft, MethodResult("oracle", np.ones(3))] for task in "ab"}
    assert pool_tasks(tasks)["methods"]["sft"]["rank_correlation"] == 0.375


def test_pairs_on_request():
    report = build_report(results(), baseline_pairs=[("oracle", "grpo")])
    assert list(report["paired"]) == ["oracle_minus_grpo"]
    with pytest.raises(ValueError, match="baseline_pairs has .'grpo', 'nobody'."):
        build_report(results(), baseline_pairs=[("grpo", "nobody")])


def test_an_empty_gap_is_null_with_a_note():
    report = build_report([MethodResult(name, [1.0, 2.0]) for name in ("random", "sft", "oracle")])
    assert report["gap"] is None and report["methods"]["sft"]["gap_closed"] is None
    assert "gap_closed is undefined" in report["notes"][0]
    assert "gap_closed is undefined" in to_markdown(report)


def test_inputs_are_checked():
    with pytest.raises(ValueError, match="sft: rewards holds 1 value"):
        MethodResult("sft", [1.0, np.nan])
    with pytest.raises(ValueError, match=r"percentiles runs from 0.0 to 101.0; expected \[0, 100\]"):
        MethodResult("sft", [1.0, 2.0], percentiles=[0.0, 101.0])
    with pytest.raises(ValueError, match=r"correct has shape \(1, 1\)"):
        MethodResult("sft", [1.0, 2.0], correct=[1.0])
    with pytest.raises(ValueError, match="picks have shape"):
        MethodResult("sft", [1.0, 2.0], picks=[[1, 2]])
    with pytest.raises(ValueError, match=r"methods \['sft'\] are given twice"):
        build_report([MethodResult("sft", [1.0]), MethodResult("sft", [1.0])])
    with pytest.raises(ValueError, match="unequal numbers of queries"):
        build_report([MethodResult("sft", [1.0]), MethodResult("rce", [1.0, 2.0])])
    with pytest.raises(ValueError, match="no result"):
        build_report([])


def test_from_picks():
    sequences = [[[0], [0, 1], [1, 0], [0, 2]]] * 2
    scores = [[9.0, 1.0, 2.0, 3.0], [9.0, 3.0, 2.0, 1.0]]
    result = MethodResult.from_picks("rce", [[1, 0], [0, 1]], sequences, scores, correct=[[0, 0, 1, 0]] * 2)
    assert result.rewards.tolist() == [[2.0, 3.0]]
    assert result.percentiles.tolist() == [[50.0, 100.0]]
    assert result.correct.tolist() == [[1.0, 0.0]]
    partly = [[None, 0, 1, None], [None, None, 1, 0]]  # known of the picks of one query
    assert MethodResult.from_picks("rce", [[1, 0], [0, 1]], sequences, scores, correct=partly).correct is None
    known = MethodResult.from_picks("rce", [[1, 0], [1, 0]], sequences, scores, correct=partly)
    assert known.correct.tolist() == [[1.0, 1.0]]
    with pytest.raises(ValueError, match=r"1 of 2 picks are not in the log, the first is \[2, 1\] of query 1"):
        MethodResult.from_picks("rce", [[1, 0], [2, 1]], sequences, scores)


def test_stacked_seeds_and_files(tmp_path):
    runs = [results(seeds=1, seed=0), results(seeds=1, seed=0)]
    object.__setattr__(runs[1][3], "rewards", runs[1][3].rewards + 1.0)
    for i, run in enumerate(runs):
        save_results(run, tmp_path / f"{i}.json")
    loaded = [load_results(tmp_path / f"{i}.json") for i in range(2)]
    assert list(loaded[0]) == NAMES
    assert loaded[1]["sft"].rewards.tolist() == runs[1][3].rewards.tolist()
    assert loaded[1]["sft"].picks.tolist() == runs[1][3].picks.tolist()
    stacked = {name: stack_seeds([run[name] for run in loaded]) for name in NAMES}
    assert stacked["sft"].seeds == 2 and stacked["similarity"].seeds == 1
    with pytest.raises(ValueError, match="cannot be seeds of one method"):
        stack_seeds(runs[0][:2])
    with pytest.raises(ValueError, match="1 of 2 runs have no picks"):
        stack_seeds([runs[0][3], MethodResult("sft", runs[0][3].rewards, runs[0][3].percentiles)])


# Several tasks


def test_pooling_puts_every_task_on_its_own_scale():
    tasks = {"small": results(scale=0.01, offset=5.0, queries=20), "large": results(scale=30.0, queries=40, seed=1)}
    report = pool_tasks(tasks)
    shares = [report["tasks"][task]["methods"]["grpo"]["gap_closed"] for task in tasks]
    assert report["methods"]["grpo"]["gap_closed"] == pytest.approx((20 * shares[0] + 40 * shares[1]) / 60)
    assert report["methods"]["random"]["reward"]["mean"] == pytest.approx(0.0, abs=1e-9)
    assert report["methods"]["oracle"]["reward"]["mean"] == pytest.approx(1.0)
    rows = [report["tasks"][task]["paired"]["grpo_minus_sft"]["mean"] / report["tasks"][task]["gap"] for task in tasks]
    pooled = report["paired"]["grpo_minus_sft"]
    assert pooled["mean"] == pytest.approx((20 * rows[0] + 40 * rows[1]) / 60)
    assert pooled.keys() == {"mean", "ci_low", "ci_high", "p_value"} and pooled["ci_low"] > 0
    assert report["n_queries"] == 60


def test_pooling_does_not_depend_on_a_tasks_unit():
    def pooled(scale, offset):
        return pool_tasks({"a": results(), "b": results(scale=scale, offset=offset, seed=1)})["paired"][
            "grpo_minus_sft"
        ]

    assert pooled(1.0, 0.0) == pytest.approx(pooled(100.0, -7.0))


def test_pooling_leaves_out_what_a_task_lacks_and_says_so():
    tasks = {"a": results() + [MethodResult("grpo_literal", np.zeros(30))], "b": results(seed=1)}
    report = pool_tasks(tasks)
    assert "grpo_literal" not in report["methods"]
    assert "grpo_literal" in report["tasks"]["a"]["methods"]
    assert any("grpo_literal" in note for note in report["notes"])
    with pytest.raises(ValueError, match="task 'b' has methods .'sft'.; 'random' and 'oracle' make its scale"):
        pool_tasks({"a": results(), "b": results(names=["sft"])})


# The files


@pytest.mark.parametrize("kind", ["task", "pooled"])
def test_files_are_complete(tmp_path, kind):
    if kind == "task":
        report = build_report(results(), log_history=log_history(), settings={"path": tmp_path, "seeds": (0, 1)})
    else:
        report = pool_tasks({"a": results(), "b": results(seed=1)})
    files = write_report(report, tmp_path / "new" / "folder")
    names = {"report.json", "report.md", "gains.png"} | ({"curves.png"} if kind == "task" else set())
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == set(files) == names

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    read = json.loads(files["report.json"].read_text(), parse_constant=refuse)
    assert read == report
    for name in names - {"report.json", "report.md"}:
        assert files[name].read_bytes().startswith(b"\x89PNG\r\n")
    assert set(re.findall(r"!\[.*?\]\((.*?)\)", files["report.md"].read_text())) == {n for n in names if ".png" in n}


def test_markdown_says_what_was_measured():
    sections = {"Learning curve": [{"queries": 150, "gap": 0.51}, {"queries": 450}], "Limits": "Small | pools."}
    report = build_report(results(), reward_name="log-probability", title="Emoji", sections=sections)
    text = to_markdown(report)
    assert text.startswith("# Emoji\n\n30 held-out queries, 3 seeds. Reward: log-probability, higher is better.")
    assert "95 % percentile bootstrap, 10,000 resamples of the queries and, for methods with several seeds" in text
    mean = report["methods"]["grpo"]["reward"]
    assert f"| GRPO | {mean['mean']:.3f} [{mean['ci_low']:.3f}, {mean['ci_high']:.3f}] |" in text
    assert re.search(r"\| GRPO - similarity \| \+0\.\d+ \[\+.*\] \| 0\.0001 \| above 0 \|", text)
    assert "## Learning curve\n\n| queries | gap |\n| --- | ---: |\n| 150 | 0.51 |\n| 450 | - |" in text
    assert "## Limits\n\nSmall | pools." in text
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        assert len({line.count("|") for line in block.strip().split("\n")}) == 1


def test_pooled_markdown_has_a_table_by_task():
    text = to_markdown(pool_tasks({"a": results(queries=20), "b": results(queries=10, seed=1)}))
    assert "| method | a (n = 20) | b (n = 10) | pooled (n = 30) |" in text
    assert "30 held-out queries of 2 tasks (a, b), 3 seeds." in text


@pytest.mark.parametrize("kind", ["task", "pooled"])
def test_console_fits_100_columns(kind, capsys):
    rows = results() + [
        MethodResult("grpo_literal", np.zeros((3, 30)), np.zeros((3, 30)), picks=np.zeros((3, 30, 2), int))
    ]
    for i, r in enumerate(rows):
        correct, agreement = np.full(r.rewards.shape, 0.5), ([-0.1] * r.seeds, [12.0] * r.seeds)
        rows[i] = MethodResult(r.name, r.rewards, r.percentiles, correct, r.picks, *agreement)
    report = build_report(rows) if kind == "task" else pool_tasks({"country_facts": rows, "easy_vqa": rows, "c": rows})
    print_report(report, Console(width=100))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    # Each method's numbers stand in one line: nothing was folded.
    mean = report["methods"]["grpo_literal"]["reward"]
    assert any("GRPO literal" in x and f"{mean['mean']:.3f} [" in x and f"{mean['ci_high']:.3f}]" in x for x in lines)


def test_a_failed_write_leaves_the_old_report(tmp_path, monkeypatch):
    write_report(build_report(results(), title="old"), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    new = build_report(results(), title="new")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_report(new | {"gap": float("nan")}, tmp_path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(write_module.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(new, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_written_files_have_the_usual_permissions(tmp_path):
    (tmp_path / "plain").write_text("")
    files = write_report(build_report(results()), tmp_path)
    assert os.stat(files["report.json"]).st_mode == os.stat(tmp_path / "plain").st_mode


def test_nan_is_an_error_with_its_place_but_null_in_the_log():
    with pytest.raises(ValueError, match=r"report.settings.rates\[1\] is nan"):
        build_report(results(), settings={"rates": [1.0, float("nan")]})
    with pytest.raises(TypeError, match="report.settings.model is of type object"):
        build_report(results(), settings={"model": object()})
    log = [{"step": 1, "loss": np.float32(1.0), "grad_norm": float("inf")}, {"step": 2, "loss": float("nan")}]
    report = build_report(results(), log_history=log)
    assert report["log_history"] == [{"step": 1, "loss": 1.0, "grad_norm": None}, {"step": 2, "loss": None}]
    assert report["notes"][0].startswith("2 logged value(s) were not finite")
    assert to_jsonable({1: np.arange(2)}) == {"1": [0, 1]}


# The curves


def test_runs_follow_each_other_and_stages_are_filled_in():
    history, offset = _continuous(log_history())
    assert offset == 10
    assert [entry["step"] for entry in history] == [5, 10, 10, 10, 10, *range(11, 20)]
    assert [entry["stage"] for entry in history][2:6] == ["sft", "sft", "rce", "rce"]
    spans = [("sft", 0, 10), ("rce", 10, 13), ("grpo_early", 13, 16), ("grpo_late", 16, 19)]
    assert _stage_spans(history) == spans


def test_lines_break_where_the_loss_changes_its_meaning():
    history, _ = _continuous(log_history())
    panels = {panel.title: _panel_lines(panel, history) for panel in PANELS}
    loss = panels["Loss, SFT and RCE"][0][1]
    assert [steps for steps, _ in loss] == [[5, 10], [11, 12, 13]]
    assert [steps for steps, _ in panels["Loss, GRPO"][0][1]] == [[14, 15, 16], [17, 18, 19]]
    assert panels["Share of clipped ratios"] == []


def test_lines_break_where_another_policy_takes_over():
    """The last point of SFT and the first of RCE stand at one step; the agreement of answers lies between them."""
    sft = [{"step": step, "eval_greedy_reward": 0.0, "stage": "sft"} for step in (0, 5, 10)]
    after = [
        {"step": step, "eval_greedy_reward": 1.0, "stage": stage} for step, stage in ((0, "rce"), (3, "grpo_early"))
    ]
    history, _ = _continuous([*sft, *after])
    panels = {panel.title: _panel_lines(panel, history) for panel in PANELS}
    assert [steps for steps, _ in panels["Reward of the greedy pick"][0][1]] == [[0, 5, 10], [10, 13]]


def test_curves_tolerate_poor_logs():
    for log in ([{"loss": 1.0}], [{"step": 3, "train_runtime": 1.0}], []):
        assert draw_curves(build_report(results(), log_history=log)) is None
    for log in ([{"step": 1, "loss": 1.0}], [{"step": 1, "kl": 0.0, "stage": 0.4}, {"step": 2, "stage": "my stage"}]):
        assert draw_curves(build_report(results(), log_history=log, best_step=1)).startswith(b"\x89PNG")
