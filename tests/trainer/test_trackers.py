"""What TensorBoard, trackio and Weights & Biases get, and that the stages of a recipe keep apart in them."""

import json
import math
import os
from pathlib import Path

import pytest
from planted import make_args, make_trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_pipeline import make_recipe
from transformers.integrations.integration_utils import rewrite_logs

from lever_grpo.pipeline import load_task, train


TABLES = {"log_groups": True, "log_groups_steps": 4, "num_groups_to_log": 1}
SUMMARIES = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos"}


def logged(trainer) -> dict[str, dict[int, float]]:
    """The log of a training as trackers name it: key, step, value."""
    values: dict[str, dict[int, float]] = {}
    for entry in trainer.state.log_history:
        scalars = {name: value for name, value in entry.items() if name != "step"}
        for name, value in rewrite_logs(scalars).items():
            values.setdefault(name, {})[entry["step"]] = value
    assert {"train/kl", "train/policy_loss", "train/stage", "eval/greedy_reward", "eval/kl"} <= values.keys()
    return values


def assert_same_values(found: dict[str, dict[int, float]], expected: dict[str, dict[int, float]]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=1e-6, nan_ok=True), name


def two_stages(files: dict[str, str], output: Path, tracker: str, **options) -> None:
    recipe = make_recipe(files)
    args = make_args(output, report_to=[tracker], eval_strategy="no", save_strategy="no", **options)
    train(recipe, args, load_task(recipe), output)


# ---- TensorBoard ----


def events_below(folder: Path) -> dict[str, EventAccumulator]:
    """What the event files say, by their folder."""
    found = {}
    for path in sorted(folder.rglob("events.out.tfevents.*")):
        found[path.parent.relative_to(folder).as_posix()] = events = EventAccumulator(str(path.parent))
        events.Reload()
    return found


def test_tensorboard_has_the_log_and_the_tables(planted, tmp_path, monkeypatch):
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    trainer = make_trainer(tmp_path, planted, report_to=["tensorboard"], **TABLES)
    trainer.train()
    (events,) = events_below(tmp_path / "runs").values()
    tags = events.Tags()
    found = {name: {event.step: event.value for event in events.Scalars(name)} for name in tags["scalars"]}
    assert_same_values(found, logged(trainer))

    texts = events.Tensors("groups/text_summary")
    assert [event.step for event in texts] == [4, 8]
    header, _, *rows = texts[-1].tensor_proto.string_val[0].decode().splitlines()
    assert header.startswith("| query_id | sequence | reward | advantage |")
    query, sequence, reward, *_ = (cell.strip() for cell in rows[0].strip("|").split("|"))
    (row,) = [row for row in planted.rows if row["query_id"] == int(query)]
    assert len(rows) == len(row["sequences"])
    assert float(reward) == pytest.approx(max(row["scores"]), rel=1e-3)
    best = row["sequences"][row["scores"].index(max(row["scores"]))]
    assert [int(i) for i in sequence.split()] == [row["candidate_ids"][i] for i in best]


@pytest.mark.parametrize("own_folder", [False, True])
def test_tensorboard_of_a_recipe(planted_files, tmp_path, monkeypatch, own_folder):
    """A folder per stage, with TENSORBOARD_LOGGING_DIR too; no steps of one among those of the other."""
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    if own_folder:
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "boards"))
    two_stages(planted_files, tmp_path / "out", "tensorboard")
    boards = events_below(tmp_path / "boards" if own_folder else tmp_path / "out" / "checkpoints")
    assert [name.split("/")[0] for name in boards] == ["grpo", "sft"]
    assert own_folder == (set(boards) == {"grpo", "sft"})
    steps = [[event.step for event in events.Scalars("train/loss")] for events in boards.values()]
    assert steps == [list(range(1, 10)), [1, 2, 3]]
    assert ["train/beta" in events.Tags()["scalars"] for events in boards.values()] == [True, False]


# ---- trackio ----


@pytest.fixture
def trackio_runs(tmp_path, monkeypatch):
    """Reads what trackio has in its data base, which is in a folder of the test: name of the run to its logs."""
    trackio = pytest.importorskip("trackio")
    storage = pytest.importorskip("trackio.sqlite_storage")
    for module in (trackio, storage, trackio.utils):  # read from the environment when they were imported
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_BUCKET_ID"):
        monkeypatch.delenv(name, raising=False)

    def read(project: str) -> dict[str, list[dict]]:
        return {
            name: storage.SQLiteStorage.get_logs(project, name) for name in storage.SQLiteStorage.get_runs(project)
        }

    return read


def test_trackio_has_the_log_and_the_tables(planted, tmp_path, trackio_runs):
    trainer = make_trainer(
        tmp_path / "out", planted, report_to=["trackio"], project="planted", run_name="one", **TABLES
    )
    trainer.train()
    logs = trackio_runs("planted")["one"]
    found: dict[str, dict[int, float]] = {}
    tables = {}
    for entry in logs:
        step = entry["train/global_step"]
        if "groups" in entry:
            tables[step] = entry["groups"]["_value"]
            continue
        for name in entry.keys() - {"train/global_step", "timestamp", "step"}:
            found.setdefault(name, {})[step] = entry[name]
    expected = logged(trainer)
    assert_same_values(found, {n: v for n, v in expected.items() if n.removeprefix("train/") not in SUMMARIES})
    assert tables.keys() == {4, 8}
    assert [row["step"] for row in tables[8]] == [8] * 6 and {row["stage"] for row in tables[8]} == {"grpo_late"}
    (row,) = [row for row in planted.rows if row["query_id"] == tables[8][0]["query_id"]]
    assert [entry["reward"] for entry in tables[8]] == pytest.approx(sorted(row["scores"], reverse=True))


def test_trackio_of_a_recipe(planted_files, tmp_path, trackio_runs):
    two_stages(planted_files, tmp_path / "out", "trackio", project="planted", run_name="mine")
    runs = trackio_runs("planted")
    assert sorted(runs) == ["mine-grpo", "mine-sft"]
    losses = {name: [entry for entry in logs if "train/loss" in entry] for name, logs in runs.items()}
    assert {name: len(entries) for name, entries in losses.items()} == {"mine-grpo": 9, "mine-sft": 3}
    assert "train/beta" in losses["mine-grpo"][0] and "train/beta" not in losses["mine-sft"][0]


# ---- Weights & Biases ----


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """Offline, in a folder of the test."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    settings = {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true", "ERROR_REPORTING": "false"}
    for name, value in settings.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    module = pytest.importorskip("wandb")
    module.teardown()  # it may have read other settings before
    yield module
    module.finish()
    module.teardown()


def test_wandb_has_the_log_and_the_tables(planted, tmp_path, wandb):
    trainer = make_trainer(tmp_path / "out", planted, report_to=["wandb"], run_name="one", **TABLES)
    trainer.train()
    assert wandb.run.name == "one" and wandb.run.offline
    summary = dict(wandb.run.summary)  # the last value of every key
    for name, values in logged(trainer).items():
        key = name.removeprefix("train/") if name.removeprefix("train/") in SUMMARIES else name
        value = list(values.values())[-1]
        assert summary[key] == pytest.approx(value, nan_ok=math.isnan(value)), name
    # 4 evaluations (the start's too), 9 steps and the end, and two tables
    assert wandb.run.step == 4 + 9 + 1 + 2
    tables = sorted(Path(wandb.run.dir).rglob("*.table.json"))
    assert len(tables) == 2
    contents = [json.loads(path.read_text()) for path in tables]
    (last,) = [table for table in contents if table["data"][0][table["columns"].index("step")] == 8]
    rows = [dict(zip(last["columns"], values, strict=True)) for values in last["data"]]
    (row,) = [row for row in planted.rows if row["query_id"] == rows[0]["query_id"]]
    assert [entry["reward"] for entry in rows] == pytest.approx(sorted(row["scores"], reverse=True))


def test_wandb_of_a_recipe(planted_files, tmp_path, wandb):
    """A run per stage: names and keys stand in the files as they are."""
    two_stages(planted_files, tmp_path / "out", "wandb", run_name="mine")
    assert wandb.run is None
    files = [path.read_bytes() for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))]
    assert len(files) == 2
    (sft,) = [data for data in files if b"mine-sft" in data]
    (grpo,) = [data for data in files if b"mine-grpo" in data]
    assert b"train/beta" in grpo and b"train/beta" not in sft and b"mine-grpo" not in sft and b"mine-sft" not in grpo
