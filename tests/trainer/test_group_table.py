"""The table of sampled groups: what its rows say, where it goes, and that training does not notice it."""

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from planted import assert_same_weights, make_args, make_selector, make_trainer, planted_rows, to_dataset, weights_of
from rich.console import Console
from test_invariance import moved, ragged_rows

from lever_grpo import GroupBeamGRPOConfig
from lever_grpo.data import sample_examples
from lever_grpo.objectives.policy_losses import LOSS_TYPES
from lever_grpo.pipeline import RecipeArguments, load_task, parse
from lever_grpo.pipeline.stages import build_selector, post_train
from lever_grpo.trainer.group_table import (
    SCHEMA,
    GroupTableCallback,
    _cells,
    _markdown,
    group_rows,
    print_groups,
)


QUIET = {"eval_strategy": "no", "save_strategy": "no"}
EPSILON = 0.05
TABLES = {"log_groups": True, "log_groups_steps": 1, "num_groups_to_log": 99}


def table_of(trainer, rows: list[dict], stage: str = "grpo_late", top_k: int | None = None) -> list[dict]:
    """Rows that one forward pass in training leaves."""
    trainer.policy_control.stage, trainer.policy_control.top_k = stage, top_k
    (callback,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, GroupTableCallback)]
    trainer.model.train()
    trainer.compute_loss(trainer.model, trainer.data_collator(list(to_dataset(rows))))
    return callback.rows


def by_sequence(table: list[dict]) -> dict[tuple, dict]:
    return {(row["query_id"], *row["sequence"]): row for row in table}


def ids_of(row: dict) -> list[tuple]:
    return [(row["query_id"], *(row["candidate_ids"][i] for i in sequence)) for sequence in row["sequences"]]


# ---- rows ----


def test_rows_of_a_group_by_hand():
    inputs = {
        "query_ids": torch.tensor([7, 8]),
        "candidate_ids": [[30, 40, 50], [60]],
        "sequences": torch.tensor([[[2, 0], [1, 0], [0, 2]], [[0, 0], [0, 0], [0, 0]]]),
        "sequence_mask": torch.tensor([[[1, 1], [1, 0], [1, 1]], [[1, 0], [0, 0], [0, 0]]]).bool(),
    }
    rewards = torch.tensor([[1.0, 3.0, 2.0], [5.0, 0.0, 0.0]])
    columns = {
        "rewards": rewards,
        "log_probs": -rewards,
        "counts": torch.tensor([[True, True, False], [True, False, False]]),
        "advantages": rewards - 2.0,
        "ratios": rewards / 4,
        "clipped": rewards > 1.5,
    }
    names = ("query_id", "sequence", "reward", "weight", "advantage", "ratio", "log_prob", "counts", "clipped")
    expected = [
        (7, [40], 3.0, None, 1.0, 0.75, -3.0, True, True),
        (7, [30, 50], 2.0, None, 0.0, None, -2.0, False, None),
        (7, [50, 30], 1.0, None, -1.0, 0.25, -1.0, True, False),
        (8, [60], 5.0, None, 3.0, 1.25, -5.0, True, True),
    ]
    assert [tuple(row[name] for name in names) for row in group_rows(inputs, 9, **columns)] == expected
    assert [tuple(row[name] for name in names) for row in group_rows(inputs, 1, **columns)] == expected[:3]


def test_texts_of_a_group_by_hand():
    inputs = {"query_ids": torch.tensor([7]), "candidate_ids": [[30, 40]]}
    inputs |= {"sequences": torch.tensor([[[1, 0]]]), "sequence_mask": torch.ones(1, 1, 2, dtype=torch.bool)}
    values = {"rewards": torch.zeros(1, 1), "log_probs": torch.zeros(1, 1), "counts": torch.ones(1, 1).bool()}
    (row,) = group_rows(inputs, 1, texts={7: "Capital of Peru? Lima", 40: "Capital of Chad? N'Djamena"}, **values)
    assert row["query"] == "Capital of Peru? Lima" and row["query_id"] == 7
    assert row["demonstrations"] == ["Capital of Chad? N'Djamena", "30"] and row["sequence"] == [40, 30]
    (row,) = group_rows(inputs, 1, **values)
    assert row["query"] is None and row["demonstrations"] is None


@pytest.mark.parametrize("level", ["joint", "sequence", "token"])
@pytest.mark.parametrize("top_k", [None, 2])
def test_advantages_and_ratios_of_a_step(planted, tmp_path, level, top_k):
    """Against the definitions, in numpy: z-scores of the whole group, and quotients of probabilities."""
    rows = [*planted_rows(planted.embeddings, [1], group=5), *planted_rows(planted.embeddings, [2], group=3, shots=3)]
    options = {"importance_sampling_level": level, "epsilon": EPSILON, "learning_rate": 1.0}
    trainer = moved(make_trainer(tmp_path, planted, train=to_dataset(rows), **TABLES, **options))
    table = by_sequence(table_of(trainer, rows, top_k=top_k))

    batch = planted.collator(list(to_dataset(rows)))
    with torch.no_grad():
        new, old = (trainer.policy(p, batch).log_probs.double().numpy() for p in (trainer.model, trainer.old_policy))
    assert len(table) == 8
    clipped = []
    for b, row in enumerate(rows):
        scores = np.array(row["scores"])
        best = scores >= np.sort(scores)[-(top_k or len(scores))]
        advantages = (scores - scores.mean()) / scores.std(ddof=1)
        for g, (key, sequence) in enumerate(zip(ids_of(row), row["sequences"], strict=True)):
            found, shots = table[key], slice(len(sequence))
            steps = new[b, g, shots] - old[b, g, shots]
            ratios = np.exp({"joint": [steps.sum()], "sequence": [steps.mean()], "token": steps}[level])
            assert found["reward"] == pytest.approx(scores[g])
            assert found["advantage"] == pytest.approx(advantages[g], abs=1e-4)
            assert found["log_prob"] == pytest.approx(new[b, g, shots].sum(), abs=1e-5)
            assert found["counts"] == best[g]
            if best[g]:
                held_back = (ratios > 1 + EPSILON) if advantages[g] > 0 else (ratios < 1 - EPSILON)
                assert found["ratio"] == pytest.approx(ratios.mean(), abs=1e-5)
                assert found["clipped"] == held_back.any()
                clipped.append(found["clipped"])
            else:
                assert found["ratio"] is None and found["clipped"] is None
    assert len(clipped) == (8 if top_k is None else 4) and len(set(clipped)) == 2


def test_weights_of_rce(planted, tmp_path):
    rows = planted_rows(planted.embeddings, [1], group=5)
    trainer = make_trainer(tmp_path, planted, rce_normalize=False, rce_temperature_start=0.5, **TABLES)
    table = by_sequence(table_of(trainer, rows, "rce"))
    weights = np.exp(np.array(rows[0]["scores"]) / 0.5)
    assert [table[key]["weight"] for key in ids_of(rows[0])] == pytest.approx(weights / weights.sum(), rel=1e-4)
    assert {(row["counts"], row["advantage"], row["ratio"], row["clipped"]) for row in table.values()} == {
        (True, None, None, None)
    }


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_has_a_table(planted, tmp_path, loss_type):
    """Groups of all shapes, one of them tied, which does not count."""
    rows = ragged_rows(planted)
    trainer = moved(make_trainer(tmp_path, planted, train=to_dataset(rows), loss_type=loss_type, **TABLES))
    table = table_of(trainer, rows)
    assert [row["query_id"] for row in table] == [row["query_id"] for row in rows for _ in row["sequences"]]
    assert by_sequence(table).keys() == {key for row in rows for key in ids_of(row)}
    assert {row["query_id"] for row in table if not row["counts"]} == {5}
    tied = [row for row in table if row["query_id"] == 5]
    assert {(row["advantage"], row["ratio"], row["clipped"]) for row in tied} == {(0.0, None, None)}
    clips = loss_type in ("grpo", "dr_grpo", "cispo")
    assert {type(row["clipped"]) for row in table if row["counts"]} == {bool if clips else type(None)}


# ---- what is printed and written ----


def printed(rows: list[dict]) -> str:
    console = Console(file=io.StringIO(), record=True, width=110)
    print_groups(rows, console)
    return console.export_text()


def test_printed_table():
    grpo = {"step": 40, "stage": "grpo_late", **dict.fromkeys(SCHEMA.names[2:])}
    first = {**grpo, "query_id": 7211, "sequence": [7232, 8211], "reward": -0.25, "log_prob": -2.0}
    rows = [
        {**first, "advantage": 1.25, "ratio": 1.33333, "counts": True, "clipped": True},
        {**first, "query_id": 5, "advantage": 0.0, "counts": False},
    ]
    lines = [line.strip() for line in printed(rows).splitlines()]
    assert lines[0] == "Step 40, grpo_late"
    cells = [line.replace("┃", "│").strip("│").split("│") for line in lines if line[0] in "┃│"]
    header, *body = [[cell.strip() for cell in line] for line in cells]
    assert header == ["query_id", "sequence", "reward", "advantage", "ratio", "log_prob", "counts", "clipped"]
    assert body == [
        ["7211", "7232 8211", "-0.25", "1.25", "1.333", "-2", "yes", "yes"],
        ["5", "7232 8211", "-0.25", "0", "", "-2", "no", ""],
    ]
    assert sum(line.startswith("├") for line in lines) == 1  # between the two groups


def test_printed_texts():
    """They stand in the place of ids, cut short, and steer neither rich nor the terminal nor Markdown."""
    row = {**dict.fromkeys(SCHEMA.names), "step": 1, "stage": "rce", "query_id": 7, "sequence": [3], "reward": 0.5}
    row |= {"query": "[bold]a|b\x1b[2J", "demonstrations": ["x" * 41, "y" * 40]}
    header, shown = [line for line in printed([row]).splitlines() if line[0] in "┃│"][:2]
    assert [cell.strip() for cell in header.strip("┃").split("┃")] == ["query", "demonstrations", "reward"]
    assert "[bold]a|b\\x1b[2J" in shown
    names, cells = _cells([row])
    assert cells[0][1] == "x" * 39 + "…; " + "y" * 40
    assert _markdown([row]).splitlines()[-1].startswith("| [bold]a\\|b\\x1b[2J | xxx")


def test_a_recipe_shows_texts(tmp_path, capsys):
    """Those of the sample's rows: question and answer."""
    recipe = RecipeArguments(task="country_facts", model_preset="prior", max_samples=8)
    data = load_task(recipe)
    args = make_args(tmp_path, max_steps=1, **TABLES, **QUIET)
    post_train(args, data, build_selector(recipe, data.collator), tmp_path / "checkpoints")
    (path,) = (tmp_path / "checkpoints" / "groups").iterdir()
    row = pq.read_table(path).to_pylist()[0]
    rows = sample_examples("country_facts")
    said = [f"{rows[i].question} {rows[i].answers[0]}" for i in (row["query_id"], *row["sequence"])]
    assert [row["query"], *row["demonstrations"]] == said
    assert row["query"].split()[0] in capsys.readouterr().out  # the console folds what is long


def test_tables_of_a_run(planted, tmp_path, capsys):
    """Every second step, micro-batches and evaluations between them; what is printed is what is written."""
    options = {"log_groups": True, "log_groups_steps": 2, "num_groups_to_log": 3, "curriculum_top_k": 2}
    trainer = make_trainer(
        tmp_path, planted, per_device_train_batch_size=4, gradient_accumulation_steps=2, **options
    )  # fmt: skip
    trainer.train()
    paths = sorted((tmp_path / "groups").iterdir())
    assert [path.name for path in paths] == [f"groups_{step:05d}.parquet" for step in (2, 4, 6, 8)]
    output = capsys.readouterr().out
    known = {key: score for row in planted.rows for key, score in zip(ids_of(row), row["scores"], strict=True)}
    for step, path in zip((2, 4, 6, 8), paths, strict=True):
        table = pq.read_table(path)
        assert table.schema.equals(SCHEMA)
        rows = table.to_pylist()
        stage = "rce" if step < 4 else "grpo_early" if step < 7 else "grpo_late"
        assert {(row["step"], row["stage"]) for row in rows} == {(step, stage)}
        assert len(rows) == 3 * 6 and len({row["query_id"] for row in rows}) == 3
        assert [row["reward"] for row in rows] == pytest.approx(
            [known[(row["query_id"], *row["sequence"])] for row in rows]
        )
        assert sum(row["counts"] for row in rows) == (3 * 2 if stage == "grpo_early" else 3 * 6)
        assert f"Step {step}, {stage} " in output and f" {rows[0]['log_prob']:.4g} " in output
    assert output.count("Step ") == 4


def test_ratio_is_one_in_the_step_after_a_refresh(planted, tmp_path):
    trainer = make_trainer(tmp_path, planted, **TABLES, **QUIET)
    trainer.train()
    tables = [pq.read_table(path).to_pylist() for path in sorted((tmp_path / "groups").iterdir())]
    ratios = {table[0]["step"]: {row["ratio"] for row in table if row["counts"]} for table in tables}
    logged = {log["step"]: log["ratio_mean"] for log in trainer.state.log_history if "ratio_mean" in log}
    assert ratios[3] == {None} and ratios[4] == ratios[7] == {1.0}
    for step in (5, 6, 8, 9):  # a batch is one step here, so the table holds all that the metric is the mean of
        (table,) = [table for table in tables if table[0]["step"] == step]
        values = [row["ratio"] for row in table if row["counts"]]
        assert np.mean(values) == pytest.approx(logged[step], rel=1e-5) and len(set(values)) > 1


# ---- training does not notice ----


@pytest.mark.parametrize("options", [{}, {"precompute_ref_log_probs": True, "kl_estimator": "k3"}], ids=["", "column"])
def test_training_is_the_same(planted, tmp_path, options, capsys):
    """Bit for bit, with dropout, which would show a random number that is drawn."""
    runs = {}
    for name, tables in {"without": {}, "with": TABLES}.items():
        model = make_selector(dropout=0.3, similarity_prior=True, prior_dropout=0.3)
        trainer = make_trainer(tmp_path / name, planted, model, **tables, **options)
        trainer.train()
        timing = ("runtime", "per_second")
        log = [{k: v for k, v in entry.items() if not k.endswith(timing)} for entry in trainer.state.log_history]
        runs[name] = (weights_of(trainer.model), log, torch.get_rng_state())
    assert_same_weights(runs["with"][0], runs["without"][0])
    assert runs["with"][1] == runs["without"][1]
    assert torch.equal(runs["with"][2], runs["without"][2])
    assert len(list((tmp_path / "with" / "groups").iterdir())) == 9
    assert not (tmp_path / "without" / "groups").exists()


def test_other_processes_have_no_table(planted, tmp_path, capsys):
    trainer = make_trainer(tmp_path, planted, **TABLES)
    trainer.state.is_world_process_zero = False
    assert table_of(trainer, planted.rows[:2]) == []
    trainer.state.is_world_process_zero = True
    assert len(table_of(trainer, planted.rows[:2])) == 12


# ---- arguments ----


@pytest.mark.parametrize("name", ["log_groups_steps", "num_groups_to_log"])
def test_numbers_are_checked(name, tmp_path):
    with pytest.raises(ValueError, match=f"{name}=0: must be at least 1"):
        GroupBeamGRPOConfig(output_dir=str(tmp_path), use_cpu=True, **{name: 0})


def test_a_recipe_takes_them_from_yaml_and_flags(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(f"output_dir: {tmp_path}\nuse_cpu: true\nlog_groups: true\nlog_groups_steps: 5\n")
    _, args = parse(["--config", str(config), "--num_groups_to_log", "3"], GroupBeamGRPOConfig)
    assert (args.log_groups, args.log_groups_steps, args.num_groups_to_log) == (True, 5, 3)
