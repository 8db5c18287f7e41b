"""A process that trains and pushes with the unmodified client; `HF_ENDPOINT` is read when that is imported.

Called with a JSON file of paths; prints what it saw as JSON, on the last line.
"""

import contextlib
import io
import json
import logging
import shutil
import sys
import time
import urllib.request
from pathlib import Path

import huggingface_hub.constants
import torch
import transformers.trainer
from PIL import Image
from planted import Planted, make_args, make_trainer, weights_of
from test_pipeline import make_recipe
from transformers import AutoModel, TrainerCallback

from lever_grpo.cli import main
from lever_grpo.data import Example
from lever_grpo.hub import fetch_run, push, push_log, push_report
from lever_grpo.inference import choose
from lever_grpo.pipeline import load_task, run


class CutOff(Exception):
    pass


class Scissors(TrainerCallback):
    """Ends post-training in the middle of an epoch."""

    armed = False

    def on_step_end(self, args, state, control, **kwargs):
        if Scissors.armed and Path(args.output_dir).name == "grpo" and state.global_step == 8:
            raise CutOff


def steer(what: str):
    with urllib.request.urlopen(f"{huggingface_hub.constants.ENDPOINT}/_test/{what}") as answer:
        return json.load(answer)


def said_since(records: list[logging.LogRecord], start: int) -> list[str]:
    return [record.getMessage() for record in records[start:] if record.levelno >= logging.WARNING]


def train(files, output, repo_id, token=None, **recipe):
    # so fast that an early checkpoint stays the best: resuming needs it beside the last one
    args = make_args(
        output, learning_rate=0.5, rce_learning_rate=0.02, seed=3, push_to_hub=True, hub_model_id=repo_id,
        hub_strategy="checkpoint", hub_always_push=True, hub_token=token,
    )  # fmt: skip
    return run(make_recipe(files, **recipe), args)


def trained(folder, planted, **options):
    trainer = make_trainer(folder, planted, **options)
    trainer.train()
    return trainer


def weights_at(output: Path, selector: str) -> dict[str, torch.Tensor]:
    return weights_of(AutoModel.from_pretrained(output / selector))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def without_times(log: list[dict]) -> list[dict]:
    """All entries but the trainer's summary of the run at hand, which is another one after resuming."""
    return [
        {name: x for name, x in entry.items() if not name.endswith(("runtime", "per_second"))}
        for entry in log
        if "train_runtime" not in entry
    ]


def pictures(count: int) -> list[Example]:
    rows = []
    for i in range(count):
        stream = io.BytesIO()
        Image.new("RGB", (4, 3), (i, 2 * i, 255 - i)).save(stream, "PNG")
        rows.append(Example(i, f"What is thing {i}?", (f"thing {i}",), image=stream.getvalue()))
    return rows


def push_everything(paths: dict) -> dict:
    folder, files = Path(paths["folder"]), paths["files"]
    records: list[logging.LogRecord] = []
    logging.getLogger("lever_grpo").addHandler(handler := logging.Handler())
    handler.emit = records.append
    seen: dict = {}
    patience = push.SILENCE

    # the recipe, with the token in the arguments
    train(files, folder / "run", "me/selector", token=paths["token"])
    data = load_task(make_recipe(files))
    picks = choose(AutoModel.from_pretrained(folder / "run" / "grpo"), data.heldout, data.collator)
    seen["picks"] = picks.tolist()
    seen["said_while_well"] = said_since(records, 0)

    # cut off in the last epoch
    transformers.trainer.DEFAULT_CALLBACKS.append(Scissors)
    Scissors.armed = True
    try:
        train(files, folder / "cut", "me/cut")
        raise AssertionError("the training was not cut off")
    except CutOff:
        Scissors.armed = False
    deadline = time.monotonic() + 60
    while "step 6" not in steer("messages/me/cut") and time.monotonic() < deadline:
        time.sleep(0.05)
    shutil.rmtree(folder / "cut")

    # on from the Hub in a new folder; the Hub takes nothing more from then on, and comes back when all is over
    start = len(records)
    steer("down")
    train(files, folder / "on", "me/cut", resume_from_hub="me/cut")
    seen["said_in_outage"] = said_since(records, start)
    seen["exit_while_down"] = main(["push", str(folder / "on"), "me/late"])
    steer("up")
    seen["exit_later"] = main(["push", str(folder / "on"), "me/late", "--private"])
    state = json.loads((folder / "on" / "checkpoints" / "grpo" / "trainer_state.json").read_text())
    seen["steps_after_resuming"] = [
        p.name for p in sorted((folder / "on" / "checkpoints" / "grpo").glob("checkpoint-*"))
    ]
    seen["best_step"] = state["best_global_step"]
    for name in ("grpo", "rce", "sft", "checkpoints/grpo/checkpoint-9"):
        seen[f"same {name}"] = same(*(weights_at(folder / run, name) for run in ("run", "on")))
    first, second = (json.loads((folder / name / "report.json").read_text()) for name in ("run", "on"))
    seen["reports_agree"] = first["methods"] == second["methods"]
    seen["logs_agree"] = without_times(first["log_history"]) == without_times(second["log_history"])

    # a trainer that is made while the Hub is down; a card that cannot be written: its name is taken by a folder
    start = len(records)
    planted = Planted()
    steer("down")
    trainer = make_trainer(
        folder / "plain", planted, push_to_hub=True, hub_model_id="me/plain", hub_strategy="end", max_steps=2
    )
    trainer.train()
    nothing = trainer.push_to_hub()
    seen["pushed_while_down"] = [nothing, said_since(records, start)[-1]]
    steer("up")
    (folder / "plain" / "README.md").unlink()
    (folder / "plain" / "README.md").mkdir()
    before = weights_of(trainer.model)
    seen["pushed_without_card"] = trainer.push_to_hub("Without a card", private=True)
    seen["said_without_card"] = said_since(records, start)
    seen["card_changes_nothing"] = same(weights_of(trainer.model), before)
    (folder / "plain" / "README.md").rmdir()
    trainer.push_to_hub("With a card", license="mit")

    # the other strategies, each save a commit
    start = len(records)
    for strategy in ("every_save", "all_checkpoints"):
        hub_options = {"push_to_hub": True, "hub_model_id": f"me/{strategy}", "hub_strategy": strategy}
        trained(folder / strategy, planted, hub_always_push=True, **hub_options)
    fetched = fetch_run("me/all_checkpoints", folder / "fetched")
    seen["fetched"] = sorted(path.name for path in (fetched / "checkpoints" / "grpo").iterdir())
    seen["said_of_strategies"] = said_since(records, start)

    # other outages, the short patience for those alone that never answer
    weights = weights_of(trained(folder / "alone", planted).model)
    for failure in ("full", "closed", "silent", "stuck"):
        start, before = len(records), time.monotonic()
        steer(failure)
        if failure in ("silent", "stuck"):
            push.SILENCE = 1.0
            huggingface_hub.close_session()
        strategy = "end" if failure == "silent" else "every_save"
        hub_options = {"push_to_hub": True, "hub_model_id": f"me/{failure}", "hub_strategy": strategy}
        stranded = trained(folder / failure, planted, **hub_options)
        seen[failure] = {
            "pushed": stranded.push_to_hub(),
            "seconds": time.monotonic() - before,
            "said": said_since(records, start),
            "same": same(weights_of(stranded.model), weights),
        }
        steer("up")
        push.SILENCE = patience
        huggingface_hub.close_session()

    # the model's own method, a log with pictures, and a report
    trainer.model.push_to_hub("me/by-the-model")
    log = folder / "log"
    log.mkdir()
    shutil.copy(files["train"], log / "beams.jsonl")
    manifest = {
        "arguments": {"log_name": "beams.jsonl", "task_file": str(folder / "task.jsonl")},
        "seeds": {"seed": 7},
    }
    (log / "manifest.json").write_text(json.dumps(manifest))
    push_log(log, "me/log", rows=pictures(72), license="cc0-1.0")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        seen["exit_of_log"] = main(["push", str(log), "me/bare-log", "--json"])
    seen["json_of_log"] = json.loads(printed.getvalue())
    push_report(folder / "run", "me/selector")
    seen["exit_of_nothing"] = main(["push", str(folder), "me/nothing"])
    return seen


if __name__ == "__main__":
    print(json.dumps(push_everything(json.loads(Path(sys.argv[1]).read_text()))))
