"""Model cards: what a reader of the Hub is told of a selector, made from what lies in the folders of its run."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import AutoConfig

from .. import __version__
from ..data.fingerprint import file_digest
from ..models.configuration_clip_selector import ClipSelectorConfig
from ..models.configuration_selector import SelectorConfig
from ..report import to_markdown
from ..search.features import ENCODERS_FILE


TAGS = ("in-context-learning", "demonstration-selection", "lever-grpo")
REPORT_FILE, LOG_FILE = "report.json", "log.json"
FIGURES = ("gains.png", "curves.png")
# the selectors of a run, the one that it ends with first
STAGES = ("grpo", "rce", "sft")
_STAGE_NAMES = {
    "sft": "supervised start",
    "agreement": "agreement of answers",
    "rce": "reward-weighted cross-entropy",
    "grpo": "offline GRPO",
}
_VERSIONS = ("torch", "transformers", "datasets", "accelerate", "numpy", "safetensors")
_METRICS = {
    "gap_closed": "Share of the random-to-oracle gap closed",
    "percentile": "Percentile",
    "accuracy": "Accuracy",
}

LIMITS = """\
* The reward is what one frozen model said in the log. A higher score need not be a higher accuracy, nor hold for \
another model.
* Learning is offline: nothing has judged choices far from the logged sequences.
* The selector expects embeddings made as those of its training; others give choices without meaning.
* Intervals speak of queries like the held-out ones. Compare with the similarity baseline before relying on the \
selector."""

CITATION = f"""\
```bibtex
@software{{lever_grpo,
  title   = {{lever_grpo: post-training demonstration selectors for in-context learning on logged beams}},
  author  = {{{{The lever_grpo authors}}}},
  version = {{{__version__}}}
}}
@article{{lever_lm,
  title   = {{Lever LM: Configuring In-Context Sequence to Lever Large Vision Language Models}},
  author  = {{Yang, Xu and Peng, Yingzhe and Ma, Haoxuan and Xu, Shuo and Zhang, Chi and Han, Yucheng and
             Zhang, Hanwang}},
  journal = {{arXiv:2312.10104}},
  year    = {{2023}}
}}
@article{{grpo,
  title   = {{DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models}},
  author  = {{Shao, Zhihong and others}},
  journal = {{arXiv:2402.03300}},
  year    = {{2024}}
}}
```"""


@dataclass(frozen=True)
class Training:
    """
    What a trainer knows of its own run, for a card without a report.

    Args:
        metrics (`dict[str, float]`):
            Evaluation of the checkpoint that was kept.
        step (`int`):
            Its step.
        settings (`dict`):
            Hyperparameters.
        figures (`tuple[str, ...]`, *optional*):
            Pictures beside the card.
    """

    metrics: Mapping[str, float]
    step: int
    settings: Mapping[str, Any]
    figures: tuple[str, ...] = ()


def selector_card(
    selector: str | os.PathLike,
    repo_id: str,
    *,
    run: str | os.PathLike | None = None,
    training: Training | None = None,
    config: SelectorConfig | None = None,
    language: str | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
) -> ModelCard:
    """
    The card of a selector.

    Args:
        selector (`str` or `Path`):
            Its folder.
        repo_id (`str`):
            Where the card will stand: the snippets load the selector from there.
        run (`str` or `Path`, *optional*):
            Output folder of the run that trained it, with `report.json`, `log.json` and the figures, each if it is
            there.
        training ([`Training`], *optional*):
            What is known without a report.
        config ([`SelectorConfig`], *optional*):
            That of the selector, where the folder holds an adapter alone. By default the folder's.
        language, license (`str`, *optional*), tags (`Sequence[str]`, *optional*):
            Metadata of the card.

    Returns:
        `huggingface_hub.ModelCard`: held-out metrics stand in its `model-index`. Absolute paths are cut to
        their names.

    Example:

    ```python
    >>> import tempfile
    >>> from lever_grpo import PointerSelector, PointerSelectorConfig
    >>> from lever_grpo.hub import selector_card
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     PointerSelector(PointerSelectorConfig(embed_dim=4, hidden_dim=8)).save_pretrained(folder)
    ...     card = selector_card(folder, "me/selector", license="apache-2.0")
    >>> card.data.library_name, "DemonstrationSelector.from_pretrained" in card.text
    ('lever_grpo', True)

    ```
    """
    folder = Path(selector)
    if config is None:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    report = _read_json(None if run is None else Path(run, REPORT_FILE))
    log = _read_json(None if run is None else Path(run, LOG_FILE))
    name = repo_id.rsplit("/", 1)[-1]
    stage = next((stage for stage in (folder.name, *STAGES) if report and stage in report["methods"]), None)
    results = _report_results(report, stage) if report and stage else _training_results(training)
    data = ModelCardData(
        language=language,
        license=license,
        library_name="lever_grpo",
        tags=[*TAGS, config.model_type, *tags],
        model_name=name,
        eval_results=results or None,
    )
    parts = [f"# {name}", _describe(folder, config, report, stage)]
    parts.append(f"## How to use\n\n{_usage(folder, config, repo_id)}")
    if report is not None and run is not None:
        text = to_markdown(without_paths(report), images=[image for image in FIGURES if Path(run, image).exists()])
        parts.append(re.sub("^#", "##", text.strip(), flags=re.MULTILINE))
    elif training is not None:
        parts.append(_training_text(training))
    if log is not None:
        parts.append(f"## Training log\n\n{_LOG_TEXT}\n\n{json_block(log)}")
    parts += [f"## Versions\n\n{versions()}", f"## Limits\n\n{LIMITS}", f"## Citation\n\n{CITATION}"]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


_LOG_TEXT = "The SHA-256 of the beam log's files and, where it was made by `lever-grpo generate`, its manifest."


def describe_log(files: Sequence[str | os.PathLike]) -> dict[str, Any]:
    """What a log is known by: the digests of its files, and the manifest beside them if there is one."""
    paths = [Path(file) for file in files]
    manifests = sorted({path.parent / "manifest.json" for path in paths})
    found = [without_paths(_read_json(path)) for path in manifests if path.exists()]
    return {"files": {path.name: file_digest(str(path)) for path in paths}, "manifests": found}


def without_paths(value: Any) -> Any:
    """
    A JSON value in which absolute paths are cut to their last part and addresses of servers left out: a card does not
    say how a machine is laid out.

    Example:

    ```python
    >>> from lever_grpo.hub.cards import without_paths
    >>> without_paths({"log": ["/data/me/log.jsonl", "logs/b.json"], "url": "http://10.0.0.7:8000", "seed": 1})
    {'log': ['log.jsonl', 'logs/b.json'], 'url': '(a server)', 'seed': 1}

    ```
    """
    if isinstance(value, Mapping):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item) for item in value]
    if isinstance(value, str) and os.path.isabs(value):
        return Path(value).name
    return "(a server)" if isinstance(value, str) and value.startswith(("http://", "https://")) else value


def json_block(value: Any) -> str:
    """A value as JSON that a reader unfolds."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return f"<details><summary>show</summary>\n\n```json\n{text}\n```\n\n</details>"


def versions() -> str:
    """The versions of what made the card, as a list."""
    found = {"lever_grpo": __version__, "python": platform.python_version()}
    found.update({name: importlib.metadata.version(name) for name in _VERSIONS})
    found["huggingface_hub"] = huggingface_hub.__version__
    return "\n".join(f"* {name} {version}" for name, version in found.items())


def _read_json(path: Path | None) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path is not None and path.exists() else None


def _report_results(report: Mapping[str, Any], stage: str) -> list[EvalResult]:
    """The stage's row of the report, and its differences from the baselines."""
    task = str(report["settings"].get("task", report["title"]))
    row = report["methods"][stage]
    values = {"reward": (f"Mean {report['reward_name']} of the choice", row["reward"]["mean"])}
    values |= {key: (name, row[key]) for key, name in _METRICS.items() if row.get(key) is not None}
    for pair, difference in report["paired"].items():
        if pair.startswith(f"{stage}_minus_"):
            values[pair] = (pair.replace("_", " "), difference["mean"])
    return _eval_results(task, values)


def _training_results(training: Training | None) -> list[EvalResult]:
    metrics = {} if training is None else training.metrics
    values = {key: (key.removeprefix("eval_"), value) for key, value in metrics.items()}
    return _eval_results("beam-log", values, split="validation")


def _eval_results(dataset: str, values: Mapping[str, tuple[str, float]], split: str = "heldout") -> list[EvalResult]:
    return [
        EvalResult(
            task_type="demonstration-selection",
            task_name="Demonstration selection",
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=split,
            metric_type=key,
            metric_name=name,
            metric_value=round(value, 6),
        )
        for key, (name, value) in values.items()
    ]


def _describe(folder: Path, config: SelectorConfig, report: Mapping[str, Any] | None, stage: str | None) -> str:
    kind = (config.architectures or [config.model_type])[0]
    weights = map(huggingface_hub.parse_local_safetensors_file_metadata, folder.glob("model*.safetensors"))
    size = sum(sum(file.parameter_count.values()) for file in weights)
    lines = [
        "This selector picks demonstrations for in-context learning: given a new query and a pool of candidates, it "
        "picks some of them one after another, without asking a large model. It was trained with `lever_grpo` on a "
        "*beam log*, the scores that a frozen model gave to many sequences of demonstrations.",
        f"* Kind: `{kind}`" + (f", {size:,} parameters" if size else ""),
    ]
    if not isinstance(config, ClipSelectorConfig):
        sides = {"Queries": config.query_features, "Candidates": config.candidate_features}
        for side, widths in sides.items():
            features = ", ".join(f"`{name}` ({width})" for name, width in widths.items())
            lines.append(f"* {side} are seen by: {features}")
    if report and stage:
        order = list(_STAGE_NAMES)
        passed = [name for name in order[: order.index(stage) + 1] if name in report["methods"]]
        lines.append("* Stages: " + ", then ".join(_STAGE_NAMES[name] for name in passed))
    return lines[0] + "\n\n" + "\n".join(lines[1:])


def _usage(folder: Path, config: SelectorConfig, repo_id: str) -> str:
    """Python that runs as it stands."""
    adapter = _read_json(folder / "adapter_config.json")
    if adapter is not None:
        start = adapter.get("base_model_name_or_path") or "the/selector-it-started-from"
        start = Path(start).name if os.path.isabs(start) else start
        return f"""\
This is an adapter: it changes the selector that its training started from.

```python
from peft import PeftModel
from lever_grpo import DemonstrationSelector

selector = DemonstrationSelector.from_pretrained("{start}")
selector.selector = PeftModel.from_pretrained(selector.selector, "{repo_id}").merge_and_unload()
```"""
    shots = min(2, config.max_shots)
    sees_rows = isinstance(config, ClipSelectorConfig)
    if sees_rows and "image" in config.modalities:
        return f"""\
```python
import io

from PIL import Image
from lever_grpo import DemonstrationSelector
from lever_grpo.data import Example


def picture(colour):
    # put the bytes or the paths of your images here
    stream = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(stream, "PNG")
    return stream.getvalue()


selector = DemonstrationSelector.from_pretrained("{repo_id}")  # sees the rows themselves
colours = ["red", "green", "blue"]
rows = [Example(i, "Which colour?", (colour,), picture(colour)) for i, colour in enumerate(colours)]
selector.set_candidates(rows)
query = Example(3, "Which colour?", ("?",), picture("navy"))
(picked,) = selector.select([query], num_shots={shots})
print([row.answers[0] for row in picked.demonstrations])  # in the order of the prompt
```"""
    encoders = _read_json(folder / ENCODERS_FILE) or {}
    sides = {**config.query_features, **config.candidate_features}
    if sees_rows or all(name in encoders and encoders[name]["kind"] != "image" for name in sides):
        return f"""\
```python
from lever_grpo import DemonstrationSelector
from lever_grpo.data import Example

selector = DemonstrationSelector.from_pretrained("{repo_id}")  # comes with its encoders
rows = [("Capital of Peru?", "Lima"), ("Capital of Chad?", "N'Djamena"), ("Capital of Fiji?", "Suva")]
selector.set_candidates([Example(i, question, (answer,)) for i, (question, answer) in enumerate(rows)])
(picked,) = selector.select([Example(3, "Capital of Mali?", ("?",))], num_shots={shots})
print([row.question for row in picked.demonstrations])  # in the order of the prompt
```"""
    return f"""\
The selector reads embeddings; give those of your rows, made as in its training.

```python
import numpy as np
from lever_grpo import DemonstrationSelector
from lever_grpo.data import EmbeddingStore, Example


def embed(rows):
    # put your encoders here: this is noise of the right widths
    noise = np.random.default_rng(0)
    widths = {json.dumps(sides)}
    return EmbeddingStore({{name: noise.random((len(rows), width), np.float32) for name, width in widths.items()}})


selector = DemonstrationSelector.from_pretrained("{repo_id}")
rows = [("Capital of Peru?", "Lima"), ("Capital of Chad?", "N'Djamena"), ("Capital of Fiji?", "Suva")]
candidates = [Example(i, question, (answer,)) for i, (question, answer) in enumerate(rows)]
queries = [Example(3, "Capital of Mali?", ("?",))]
selector.set_candidates(candidates, embed(candidates))
(picked,) = selector.select(queries, num_shots={shots}, embeddings=embed(queries))
print([row.question for row in picked.demonstrations])  # in the order of the prompt
```"""


def _training_text(training: Training) -> str:
    parts = []
    if training.metrics:
        values = "\n".join(f"* `{name}`: {value:.4f}" for name, value in training.metrics.items())
        parts.append(f"## Evaluation\n\nOf the checkpoint that was kept, that of step {training.step}:\n\n{values}")
    if training.figures:
        parts.append("## Training\n\n" + "\n\n".join(f"![{figure}]({figure})" for figure in training.figures))
    parts.append(f"## Hyperparameters\n\n{json_block(without_paths(training.settings))}")
    return "\n\n".join(parts)
