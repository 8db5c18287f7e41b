"""Runs of the recipe on a small planted log, in processes of their own, and all that they leave behind."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from lever_grpo.pipeline import parse, run
from lever_grpo.trainer import GroupBeamGRPOConfig


RECIPE = Path(__file__).parents[2] / "recipes" / "okvqa_v3.py"
SELECTORS = ("sft", "agreement", "rce", "grpo")
REPORTS = ("report.json", "report.md", "results.json", "log.json", "curves.png", "gains.png")
# of a log: the base class takes `train_loss` over the steps since it was started
NOT_COMPARED = ("runtime", "per_second", "train_loss")


def arguments(files: dict[str, str], output: Path, **options: Any) -> list[str]:
    """Of a run through all stages with everything that has a memory, which saves and evaluates at every step."""
    values = {
        "beam_data": files["train"],
        "validation_data": files["validation"],
        "heldout_data": files["heldout"],
        "embeddings": files["embeddings"],
        "hidden_dim": 8,
        "num_set_layers": 0,
        "prior_rank": 2,
        "dropout": 0.1,
        "sft_epochs": 1,
        "sft_num_beams": 2,
        "agreement_steps": 5,
        "answer_feature": "text",
        "rce_epochs": 1,
        "grpo_epochs": 2,
        "curriculum_epochs": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.02,
        "rce_learning_rate": 0.001,
        "disable_dropout": "false",
        "adaptive_beta": "true",
        "logging_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_total_limit": 3,
        "report_to": "none",
        "use_cpu": "true",
        "disable_tqdm": "true",
        "seed": 3,
        "resume_from_checkpoint": "true",
        "output_dir": output,
        **options,
    }
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


def run_recipe(words: list[str], log: Path, environment: dict[str, str] | None = None) -> None:
    """What `recipes/okvqa_v3.py` does, for a process that has the imports done; what it says goes to `log`."""
    os.environ.update(environment or {})
    with log.open("a", buffering=1) as stream:
        for number in (1, 2):
            os.dup2(stream.fileno(), number)
    run(*parse(words, GroupBeamGRPOConfig))


def left_behind(output: Path) -> dict[str, Any]:
    """All that must not depend on what happened on the way: weights, reports, logs but for what is not compared."""
    found: dict[str, Any] = {name: (output / name / "model.safetensors").read_bytes() for name in SELECTORS}
    found.update({name: (output / name).read_bytes() for name in REPORTS})
    for stage in ("sft", "grpo"):
        state = json.loads((output / "checkpoints" / stage / "trainer_state.json").read_text())
        found[f"log of {stage}"] = [
            {name: value for name, value in entry.items() if not name.endswith(NOT_COMPARED)}
            for entry in state["log_history"]
        ]
    return found


def differences(output: Path, undisturbed: dict[str, Any]) -> list[str]:
    """The names of what is not as an undisturbed run left it."""
    found: dict[str, Any] = {}
    with contextlib.suppress(FileNotFoundError):
        found = left_behind(output)
    return [name for name in undisturbed if found.get(name) != undisturbed[name]]
