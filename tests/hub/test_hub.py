"""Pushing and pulling through the unmodified `huggingface_hub`, against a real server on the loopback."""

import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hub_server import TOKEN, Hub, client_environment
from PIL import Image

from lever_grpo.hub import fetch_run


HERE = Path(__file__).parent


def start_process(script: str, hub: Hub, home: Path, paths: dict) -> dict:
    """Runs a script with an empty home; gives the JSON of its last line."""
    home.mkdir()
    file = home / "paths.json"
    file.write_text(json.dumps(paths))
    environment = client_environment(hub, home)
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)])
    done = subprocess.run(
        [sys.executable, str(HERE / script), str(file)], env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return {**json.loads(done.stdout.splitlines()[-1]), "stderr": done.stderr}


@pytest.fixture(scope="module")
def hub():
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def pushed(hub, planted_files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    paths = {"files": planted_files, "folder": str(folder), "token": TOKEN}
    return {**start_process("pusher.py", hub, tmp_path_factory.mktemp("home") / "a", paths), "folder": folder}


@pytest.fixture(scope="module")
def pulled(hub, pushed, planted_files, tmp_path_factory):
    empty = tmp_path_factory.mktemp("elsewhere")
    paths = {"files": planted_files, "folder": str(empty)}
    return start_process("puller.py", hub, tmp_path_factory.mktemp("home") / "b", paths)


def front_matter(card: bytes) -> tuple[dict, str]:
    _, head, text = card.decode().split("---\n", 2)
    return yaml.safe_load(head), text


# ---- the recipe ----


def test_a_new_process_selects_the_same(pushed, pulled):
    assert pushed["said_while_well"] == []
    assert len(pushed["picks"]) == 4
    assert pulled["me/selector"] == pulled["demonstration_selector"] == pushed["picks"]


def test_every_save_is_a_commit_and_the_end_is_the_run(pushed, hub):
    messages = hub.messages("me/selector")
    assert messages[:5] == ["initial commit", "step 0", "step 3", "step 6", "step 9"]
    assert messages[5].startswith("grpo of lever_grpo ") and messages[6:] == ["report run"]
    files = hub.files("me/selector")
    run = pushed["folder"] / "run"
    for name in ("config.json", "model.safetensors"):
        assert files[name] == (run / "grpo" / name).read_bytes()
    for name in ("report.json", "report.md", "results.json", "log.json", "gains.png", "curves.png"):
        assert files[name] == (run / name).read_bytes()
    assert files["run/report.md"] == (run / "report.md").read_bytes()  # `push_report`
    last = run / "checkpoints" / "grpo" / "checkpoint-9"
    assert files["last-checkpoint/optimizer.pt"] == (last / "optimizer.pt").read_bytes()
    assert files["sft/model.safetensors"] == (run / "sft" / "model.safetensors").read_bytes()


def weights_by_step(repository) -> dict[str, dict]:
    return {message: repository.trees[oid] for oid, message in repository.commits if message.startswith("step ")}


@pytest.mark.parametrize(
    "state", [{"global_step": "x/../../../../../planted"}, {"global_step": -1}, {"global_step": True}, {}, [], "text"]
)
def test_a_checkpoint_of_the_hub_writes_nowhere_else(state, tmp_path, monkeypatch):
    there, output = tmp_path / "there", tmp_path / "a" / "b" / "out"
    (there / "last-checkpoint").mkdir(parents=True)
    (there / "last-checkpoint" / "trainer_state.json").write_text(json.dumps(state))
    monkeypatch.setattr("lever_grpo.hub.resume.snapshot_download", lambda *args, **kwargs: str(there))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        ValueError, match="me/evil: last-checkpoint/trainer_state.json: expected an object whose global"
    ):
        fetch_run("me/evil", output)
    assert [path for path in sorted(tmp_path.rglob("*")) if path.is_file()] == [p for p in before if p.is_file()]


def test_every_save_without_checkpoints(pushed, hub):
    trees = weights_by_step(hub.repositories["models", "me/every_save"])
    assert list(trees) == ["step 0", "step 3", "step 6", "step 9"] and pushed["said_of_strategies"] == []
    for step in (3, 6, 9):
        own = pushed["folder"] / "every_save" / f"checkpoint-{step}" / "model.safetensors"
        assert trees[f"step {step}"]["model.safetensors"].content == own.read_bytes()
    assert len({tree["model.safetensors"].sha256 for tree in trees.values()}) == 4
    assert not [path for tree in trees.values() for path in tree if "checkpoint" in path]


def test_all_checkpoints_under_their_names(pushed, hub):
    trees = weights_by_step(hub.repositories["models", "me/all_checkpoints"])
    assert list(trees) == ["step 0", "step 3", "step 6", "step 9"]
    for step in (3, 6, 9):
        own = pushed["folder"] / "all_checkpoints" / f"checkpoint-{step}"
        for name in ("model.safetensors", "optimizer.pt", "trainer_state.json"):
            there = f"checkpoint-{step}/{name}"
            assert trees["step 9"][there].content == (own / name).read_bytes()
            assert (there in trees["step 3"]) == (step == 3)
    assert not [path for path in trees["step 9"] if path.startswith(("last-checkpoint", "best-checkpoint"))]
    assert {"checkpoint-3", "checkpoint-6", "checkpoint-9"} <= set(pushed["fetched"])


def test_no_token_leaves_the_machine(pushed, hub):
    """`hub_token` is among the arguments, which the trainer pickles beside its checkpoints."""
    pickles = list((pushed["folder"] / "run").rglob("training_args.bin"))
    assert pickles and any(TOKEN.encode() in path.read_bytes() for path in pickles)
    for repository in hub.repositories.values():
        for tree in repository.trees.values():
            assert not [path for path, file in tree.items() if TOKEN.encode() in file.content]
            assert not [path for path in tree if path.endswith("training_args.bin")]


def test_model_card(pushed, hub):
    files = hub.files("me/selector")
    data, text = front_matter(files["README.md"])
    report = json.loads(files["report.json"])
    assert data["library_name"] == "lever_grpo" and "in-context-learning" in data["tags"]
    (entry,) = data["model-index"]
    (result,) = entry["results"]
    assert entry["name"] == "selector" and result["dataset"] == {"name": "train", "type": "train", "split": "heldout"}
    metrics = {metric["type"]: metric["value"] for metric in result["metrics"]}
    grpo = report["methods"]["grpo"]
    expected = {name: grpo[name] for name in ("gap_closed", "percentile", "accuracy")}
    expected["reward"] = grpo["reward"]["mean"]
    expected |= {pair: row["mean"] for pair, row in report["paired"].items() if pair.startswith("grpo_minus_")}
    assert len(expected) > 5 and metrics == {name: pytest.approx(value, abs=1e-6) for name, value in expected.items()}
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert [heading for heading in headings if heading.startswith("## ")] == [
        "## How to use", "## train: what post-training gained", "## Training log", "## Versions", "## Limits",
        "## Citation",
    ]  # fmt: skip
    assert "### Settings" in headings and "](curves.png)" in text and "](gains.png)" in text
    digest = json.loads(files["log.json"])["files"]["train.jsonl"]
    assert digest in text and len(digest) == 64
    assert str(pushed["folder"].parent) not in text  # the machine's folders


def test_snippets_of_cards_run(pulled):
    for printed in pulled["snippets"].values():
        assert printed.count("Capital of") == 2


# ---- what goes wrong ----


def test_a_run_goes_on_from_the_hub(pushed, hub):
    assert hub.messages("me/cut") == ["initial commit", "step 0", "step 3", "step 6"]
    assert pushed["best_step"] == 3  # which came from the Hub beside the last one
    assert pushed["steps_after_resuming"] == ["checkpoint-3", "checkpoint-6", "checkpoint-9"]
    assert pushed["same grpo"] and pushed["same rce"] and pushed["same sft"]
    assert pushed["same checkpoints/grpo/checkpoint-9"]
    assert pushed["reports_agree"] and pushed["logs_agree"]


def test_an_outage_costs_nothing(pushed):
    """The run that goes on meets one, and ends with the same weights."""
    assert pushed["same grpo"] and pushed["same checkpoints/grpo/checkpoint-9"]
    *at_saves, at_the_end = pushed["said_in_outage"]
    assert len(at_saves) == 2  # where the repository is looked for, and at step 9
    assert all("503" in text and "The training goes on" in text for text in at_saves)
    assert "The push to the Hub FAILED" in at_the_end and "Nothing is lost" in at_the_end
    assert f"lever-grpo push {pushed['folder'] / 'on'} me/cut" in at_the_end
    assert pushed["exit_while_down"] == 2 and "lever-grpo: error: " in pushed["stderr"]


@pytest.mark.parametrize(
    "failure, words",
    [
        ("full", "the Hub is full"),  # no space left for large files
        ("closed", "the Hub is closed"),  # files are refused before they are sent
        ("silent", "timed out"),  # no answer, where the repository is made
        ("stuck", "timed out"),  # no answer, where the commit is made
    ],
)
def test_other_outages_cost_nothing(pushed, hub, failure, words):
    seen = pushed[failure]
    assert_nothing_lost(seen, words, f"lever-grpo push {pushed['folder'] / failure} me/{failure}")
    made = hub.repositories.get(("models", f"me/{failure}"))
    assert made is None if failure == "silent" else len(made.commits) == 1


def assert_nothing_lost(seen, words, later):
    assert seen["same"] and seen["pushed"] is None and seen["seconds"] < 60
    assert all(words in text for text in seen["said"]), seen["said"]
    assert later in seen["said"][-1]


def test_a_hub_that_is_not_there_costs_nothing(tmp_path):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        address = SimpleNamespace(url=f"http://127.0.0.1:{nobody.getsockname()[1]}")
        seen = start_process("stranded.py", address, tmp_path / "home", {"folder": str(tmp_path)})
    assert_nothing_lost(seen, "refused", f"lever-grpo push {tmp_path / 'gone'} me/gone")


def test_a_run_is_pushed_later(pushed, pulled, hub):
    assert pushed["exit_later"] == 0 and hub.repositories["models", "me/late"].private
    assert pulled["me/late"] == pushed["picks"]
    assert front_matter(hub.files("me/late")["README.md"])[0]["model-index"][0]["name"] == "late"


def test_a_trainer_made_in_an_outage(pushed):
    assert "The training goes on" in pushed["said_without_card"][0]
    nothing, said = pushed["pushed_while_down"]
    assert nothing is None and "lever-grpo push" in said and "me/plain" in said
    assert "/commit/" in pushed["pushed_without_card"]  # the same trainer, when the Hub is back


def test_a_card_that_fails(pushed, hub):
    assert pushed["card_changes_nothing"] and "/commit/" in pushed["pushed_without_card"]
    assert any("model card could not be written" in text for text in pushed["said_without_card"])
    repository = hub.repositories["models", "me/plain"]
    (oid,) = [oid for oid, message in repository.commits if message == "Without a card"]
    assert "model.safetensors" in repository.trees[oid] and "README.md" not in repository.trees[oid]
    assert repository.private


def test_nothing_to_push(pushed, hub):
    assert pushed["exit_of_nothing"] == 2
    assert "found neither a selector" in pushed["stderr"]
    assert ("models", "me/nothing") not in hub.repositories


# ---- trainers and models by themselves ----


def test_card_of_a_trainer(pushed, hub):
    files = hub.files("me/plain")
    data, text = front_matter(files["README.md"])
    metrics = {metric["type"] for metric in data["model-index"][0]["results"][0]["metrics"]}
    assert data["license"] == "mit" and "eval_greedy_reward" in metrics and "eval_runtime" not in metrics
    assert "](curves.png)" in text and files["curves.png"].startswith(b"\x89PNG")
    assert '"kl_estimator"' in text


def test_push_to_hub_of_the_model(pulled, hub):
    assert pulled["model_round_trip"]
    card = hub.files("me/by-the-model")["README.md"].decode()
    assert 'DemonstrationSelector.from_pretrained("me/by-the-model")' in card and "More Information Needed" not in card


# ---- logs ----


def test_a_log_is_a_dataset(pulled):
    assert pulled["groups_are_equal"] and pulled["streamed_group_is_equal"] and pulled["read_by_load_beams"]
    assert pulled["configs"] == {"log": ["beams", "rows"], "bare-log": ["beams"]}


def test_rows_have_their_pictures(pulled):
    row = {"id": 5, "question": "What is thing 5?", "answers": ["thing 5"], "entity": None, "external_id": None}
    assert pulled["row"] == row
    assert pulled["picture"] == [[4, 3], [5, 10, 250]]
    picture = Image.open(io.BytesIO(bytes.fromhex(pulled["kept_bytes"])))
    assert picture.format == "PNG" and picture.size == (4, 3)


def test_card_and_manifest_of_a_log(pushed, pulled, hub):
    assert pulled["manifest"] == {
        "arguments": {"log_name": "beams.jsonl", "task_file": "task.jsonl"}, "seeds": {"seed": 7}
    }  # fmt: skip
    files = hub.files("me/log", "datasets")
    data, text = front_matter(files["README.md"])
    assert data["license"] == "cc0-1.0" and [config["config_name"] for config in data["configs"]] == ["beams", "rows"]
    named = {file["path"] for config in data["configs"] for file in config["data_files"]}
    assert named == {path for path in files if path.endswith(".parquet")}
    assert "| train | 24 |" in text and '"seed": 7' in text and str(pushed["folder"].parent) not in text
    assert pushed["json_of_log"] == {"repo_id": "me/bare-log", "url": f"{hub.url}/datasets/me/bare-log"}
    assert pushed["exit_of_log"] == 0 and "rows/rows.parquet" not in hub.files("me/bare-log", "datasets")
