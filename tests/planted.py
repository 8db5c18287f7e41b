"""Small beam logs with a planted signal: a sequence is worth what a hidden direction of the embeddings says."""

import json
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from transformers import PrinterCallback

from lever_grpo import (
    DataCollatorForBeams,
    EmbeddingStore,
    GroupBeamGRPOConfig,
    GroupBeamGRPOTrainer,
    PointerSelector,
    PointerSelectorConfig,
)


WIDTH, ROWS, TRAIN, VALIDATION, POOL = 8, 72, 24, 8, 5
FEATURES = Features(
    {
        "query_id": Value("int64"),
        "candidate_ids": List(Value("int64")),
        "sequences": List(List(Value("int32"))),
        "scores": List(Value("float64")),
        "survived": List(Value("bool")),
        "zero_shot": Value("float64"),
        "columns": {"correct": List(Value("float64"))},
    }
)


def planted_embeddings(seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(ROWS, WIDTH))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def score_of(embeddings: np.ndarray, ids: list[int]) -> float:
    """The first pick counts twice as much as the second: the order matters, the query does not."""
    return float(sum(weight * embeddings[i, 0] for weight, i in zip((2.0, 1.0, 0.5), ids, strict=False)) - 3.0)


def planted_rows(
    embeddings: np.ndarray,
    queries: list[int],
    group: int | None = None,
    shots: int = 2,
    pool: int = POOL,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Groups of the queries: every sequence of the pool, or `group` of them drawn at random."""
    rng = np.random.default_rng(seed)
    rows = []
    for query in queries:
        candidates = rng.choice(np.arange(TRAIN + VALIDATION, ROWS), pool, replace=False).tolist()
        sequences = [list(s) for s in permutations(range(pool), shots)]
        if group is not None:
            sequences = [sequences[i] for i in rng.permutation(len(sequences))[:group]]
        scores = [score_of(embeddings, [candidates[i] for i in s]) for s in sequences]
        rows.append(
            {
                "query_id": query,
                "candidate_ids": candidates,
                "sequences": sequences,
                "scores": scores,
                "survived": [score >= sorted(scores)[-2:][0] for score in scores],
                "zero_shot": -3.5,
                "columns": {"correct": [float(score > -3.0) for score in scores]},
            }
        )
    return rows


def to_dataset(rows: list[dict[str, Any]]) -> Dataset:
    return Dataset.from_list(rows, features=FEATURES)


class PlantedScorer:
    """A frozen model to which a sequence is worth what the planted direction says."""

    def __init__(self, embeddings: np.ndarray):
        self.embeddings = embeddings

    def score(self, prompts):
        # left construction: in the prompt, what was found last stands first
        found = ([shot.id for shot in reversed(prompt.demonstrations)] for prompt in prompts)
        return [np.array([score_of(self.embeddings, ids)]) for ids in found]

    def describe(self) -> dict[str, str]:
        return {"backend": "planted"}


def planted_task(folder: Path, data: "Planted") -> dict[str, Any]:
    """Writes rows and embeddings; gives the arguments of `GenerateArguments` that search them at random."""
    np.save(folder / "text.npy", data.embeddings)
    rows = [{"id": i, "question": f"thing {i}?", "answers": [f"{i}"]} for i in range(ROWS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"task_file": str(folder / "rows.jsonl"), "embeddings": str(folder / "text.npy")}
    return {**files, "sampler": "random", "pool_size": POOL, "disable_tqdm": True}


class Planted:
    """Training groups of 6 sequences, and validation queries with every sequence scored."""

    def __init__(self, seed: int = 0):
        self.embeddings = planted_embeddings(seed)
        self.store = EmbeddingStore({"text": self.embeddings})
        self.collator = DataCollatorForBeams(self.store, ["text"], ["text"])
        self.rows = planted_rows(self.embeddings, list(range(TRAIN)), group=6, seed=seed)
        self.train = to_dataset(self.rows)
        held_out = planted_rows(self.embeddings, list(range(TRAIN, TRAIN + VALIDATION)), seed=seed + 1)
        self.validation = to_dataset(held_out)


def make_selector(seed: int = 0, **options: Any) -> PointerSelector:
    """Small, without dropout, from random weights."""
    torch.manual_seed(seed)
    defaults = {"hidden_dim": 16, "num_attention_heads": 2, "num_layers": 1, "dropout": 0.0, "prior_dropout": 0.0}
    sides = {"query_features": {"text": WIDTH}, "candidate_features": {"text": WIDTH}}
    return PointerSelector(PointerSelectorConfig(**{**defaults, **sides, **options}))


def make_args(folder: Any, **options: Any) -> GroupBeamGRPOConfig:
    """RCE, early and late GRPO for an epoch of 3 steps each, everything logged."""
    defaults = {
        "output_dir": str(folder),
        "rce_epochs": 1,
        "grpo_epochs": 2,
        "curriculum_epochs": 1,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "rce_learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "disable_dropout": False,  # the selectors here have none, unless a test asks for it
    }
    return GroupBeamGRPOConfig(**{**defaults, **options})


def make_trainer(folder: Any, data: Planted, model: Any = None, **options: Any) -> GroupBeamGRPOTrainer:
    trainer_options = {name: options.pop(name) for name in ("callbacks", "peft_config") if name in options}
    train, validation = options.pop("train", data.train), options.pop("validation", data.validation)
    model = make_selector() if model is None else model
    args = make_args(folder, **options)
    trainer = GroupBeamGRPOTrainer(model, args, data.collator, train, validation, **trainer_options)
    trainer.remove_callback(PrinterCallback)
    return trainer


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"{len(different)} of {len(a)} tensors differ: {different[:3]}"


def write_files(folder: Path, data: Planted) -> dict[str, str]:
    """Paths by name: train, validation, heldout (our format), lever_lm, pools, embeddings, entities."""
    heldout = planted_rows(data.embeddings, list(range(TRAIN + VALIDATION - 4, TRAIN + VALIDATION)), seed=5)
    validation = [row for row in data.validation if row["query_id"] < TRAIN + VALIDATION - 4]
    # singles too, as a search scores them: what was not scored can then be estimated
    train = []
    for row in data.rows:
        singles = planted_rows_like(data.embeddings, row, [[i] for i in range(len(row["candidate_ids"]))])
        columns = {"correct": singles["columns"]["correct"] + row["columns"]["correct"]}
        joined = {name: singles[name] + row[name] for name in ("sequences", "scores", "survived")}
        train.append({**row, **joined, "columns": columns})
    logs = {"train": train, "validation": validation, "heldout": heldout}
    for name, rows in logs.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # prompt order (last found first), then the query itself
    lever_lm = {
        str(row["query_id"]): {
            "id_list": [[row["candidate_ids"][i] for i in reversed(s)] + [row["query_id"]] for s in row["sequences"]],
            "score_list": row["scores"],
        }
        for row in data.rows
    }
    (folder / "beams.json").write_text(json.dumps(lever_lm))
    pools = [{"query_id": row["query_id"], "candidate_ids": row["candidate_ids"]} for row in data.rows]
    (folder / "pools.jsonl").write_text("".join(json.dumps(pool) + "\n" for pool in pools))
    np.save(folder / "text.npy", data.embeddings)
    (folder / "entities.json").write_text(json.dumps({str(i): f"thing {i // 2}" for i in range(ROWS)}))
    paths = {name: str(folder / f"{name}.jsonl") for name in logs}
    others = {"lever_lm": "beams.json", "pools": "pools.jsonl", "embeddings": "text.npy", "entities": "entities.json"}
    return paths | {name: str(folder / file) for name, file in others.items()}


def planted_rows_like(embeddings: np.ndarray, row: dict[str, Any], sequences: list[list[int]]) -> dict[str, Any]:
    """A group of the same query and pool with other sequences."""
    scores = [score_of(embeddings, [row["candidate_ids"][i] for i in s]) for s in sequences]
    correct = {"correct": [float(score > -3.0) for score in scores]}
    survived = [False] * len(scores)
    return {**row, "sequences": sequences, "scores": scores, "survived": survived, "columns": correct}
