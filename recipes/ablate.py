"""Compare versions and decoders of the selector at one to four shots, and write the table of the docs.

    python recipes/ablate.py [--shots 1 2 3 4] [--seeds 3] [--jobs 2] [--output_dir outputs/ablation]

On the task `supersense` of the sample. Its packaged logs hold one and two shots; for more, the frozen model first
scores sequences of that length for some of the training and validation queries (`logs/` in the output folder), those
that the untrained start samples among them, and in training it scores what validation queries are given
(`--score_picks`). Every version is trained by SFT and GRPO on the same logs, from the same start (similarity; `no
prior` from random weights), and the model then answers held-out queries with what each chose. What is complete is not
repeated, what was cut off goes on. Ends with `docs/ablation.md`.
"""

from __future__ import annotations

import argparse
import os
import re
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
import yaml
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoProcessor,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
)

from lever_grpo import GroupBeamGRPOConfig, load_sample
from lever_grpo.atomic import atomic_file
from lever_grpo.data import DataCollatorForRawBeams, sample_examples
from lever_grpo.data.sample import SampleTask
from lever_grpo.inference.answering import read_answers
from lever_grpo.inference.choices import POOL_INPUTS, policy_inputs
from lever_grpo.metrics import mean_interval, paired_interval
from lever_grpo.models import ClipSelector, load_selector
from lever_grpo.pipeline import RecipeArguments, build_selector, load_task, parse, train
from lever_grpo.pipeline.evaluate import evaluate, parse_evaluate
from lever_grpo.pipeline.generate import GenerateArguments, generate
from lever_grpo.pipeline.pick_scorer import PickScorer
from lever_grpo.pipeline.stages import save_selector


HERE = Path(__file__).resolve().parent
TASK = "supersense"
MODEL = yaml.safe_load((HERE / f"evaluate_{TASK}.yaml").read_text())
MODEL_KEYS = ("task", "scorer", "dtype", "question_template", "answer_template", "stop", "separator", "answers")
REFERENCE, ORIGINAL = "v2", "v2, no prior"
SAME = {"v3": "v2"}  # v3 is the network of v2 after post-training: one training is both
VALIDATION = 200  # queries, whose picks the model scores
CONTRAST = 16  # sequences a training query, beside those of the search: at random, and as many of the start's policy
# what differs from `recipes/okvqa_v3.yaml`: a network on the similarity prior, trained on the log's scores alone
COMMON = ["--hidden_dim", "64", "--agreement_steps", "0", "--sft_num_beams", "3", "--learning_rate", "5e-4"]
COMMON += ["--grpo_epochs", "6", "--per_device_eval_batch_size", "100"]
VERSIONS: dict[str, dict[str, Any]] = {
    "prior alone": {"preset": "prior"},
    "v0": {"preset": "v0"},
    "v1": {"preset": "v1"},
    "v2": {"preset": "v2"},
    "v3": {"preset": "v3"},
    "lever-plus-v1": {"preset": "lever-plus-v1", "similarity_prior": False},
    "lever-plus-v2": {"preset": "lever-plus-v2", "similarity_prior": False},
    "v2_lora, CLIP of random weights": {"preset": "v2_lora", "similarity_prior": False},
    "v2, no prior": {"preset": "v2", "similarity_prior": False},
    "v2, candidate set encoder": {"preset": "v2", "num_set_layers": 1},
    "v2, GRU": {"preset": "v2", "options": {"state_update": "gru"}},
    "v2, additive scores": {"preset": "v2", "options": {"scoring": "additive"}},
    "v2, MMR": {"preset": "v2", "options": {"decoder_terms": ["mmr"]}},
    "v2, coverage": {"preset": "v2", "options": {"decoder_terms": ["coverage"]}},
    "v2, DPP": {"preset": "v2", "options": {"decoder_terms": ["dpp"]}},
    "v2, all of these": {
        "preset": "v2",
        "num_set_layers": 1,
        "options": {"state_update": "gru", "decoder_terms": ["mmr", "coverage", "dpp"]},
    },
    "v2, STOP": {"preset": "v2", "options": {"stop": True}},
}
PICK_SCORERS: dict[int, PickScorer] = {}  # of this process, by shots
NOTES = """\
# Ablation: versions and decoders

Each version of the selector, with the options of its decoder, trained by SFT and then GRPO on the same logs of the
task `supersense`, and judged by what SmolLM2-135M-Instruct answers to {queries} held-out queries with its choices,
over {seeds} training seeds: the log-probability of the right answer, with its 95 % interval over queries. The last
two columns are differences of the GRPO selector, query by query: to its own start, and to the GRPO selector of v2.
All were trained on {logged} queries. For three and four shots a fresh log was made: a beam of one, and {contrast}
random sequences a query and {contrast} that the untrained prior samples. Only the drawn ones are learned from
(`--sources`), and checkpoints are chosen by what the model says of the picks for {validation} validation queries
(`--score_picks`). Latency is that of one query alone, from a
pool of 16 on one core, its embeddings given; that of `v2_lora` with the pass of its encoders over the texts.

All start from the similarity prior, but for `v2, no prior`, the two networks of Lever-Plus (which have none) and
`v2_lora`. `v3` is the network of `v2` after post-training: one training makes both rows. `v2, STOP` is trained on
all lengths up to the number of shots, and may show fewer. There is no trained CLIP among the packages, so that of
`v2_lora` has random weights and reads bytes: its row shows that the version goes the whole way and what it costs,
not what a trained CLIP would give. [What we learned](lessons.md) says what follows. `python recipes/ablate.py` makes
this page.
"""


def sequences_log(split: str, shots: int, queries: int, output: Path) -> Path:
    """The log of a split at a number of shots: the packaged one, or one that the frozen model makes."""
    sample = load_sample(TASK)
    if shots <= 2:
        return sample.splits[split]
    folder = output / "logs" / f"{split}-{shots}"
    if (folder / "manifest.json").exists():
        return folder / "beams.jsonl"
    groups = sample.load(split)
    contrast: dict[str, Any] = {}
    size = VALIDATION
    if split == "train":
        size = queries
        contrast = {"random_sequences": CONTRAST, "selector_sequences": CONTRAST, "selector": str(output / "start")}
    groups = groups.select(np.sort(np.random.default_rng(0).permutation(len(groups))[:size]))
    pools = folder / "given_pools.jsonl"
    with atomic_file(pools) as stream:
        for row in groups:
            stream.write(orjson.dumps({"query_id": row["query_id"], "candidate_ids": row["candidate_ids"]}) + b"\n")
    log = generate(
        GenerateArguments(
            **{name: MODEL[name] for name in MODEL_KEYS},
            candidate_pools=str(pools),
            query_ids=list(groups["query_id"]),
            num_shots=shots,
            beam_size=1,
            score="log_prob",
            output_dir=str(folder),
            cache_dir=str(output / "cache"),
            **contrast,
        )
    )
    return Path(log)


def make_start(folder: Path) -> None:
    """The similarity prior, untrained: the policy that all but the versions without it start from."""
    if not folder.exists():
        options = ["--config", str(HERE / "okvqa_v3.yaml"), "--task", TASK]
        recipe, _ = parse([*options, "--output_dir", str(folder)], GroupBeamGRPOConfig)
        data = load_task(recipe)
        save_selector(build_selector(recipe, data.collator), folder, data)


def data_options(sample: SampleTask, shots: int, queries: int, output: Path) -> list[str]:
    """The recipe's arguments that say what to train on."""
    if shots <= 2:
        return ["--task", TASK, "--num_shots", str(shots), "--max_samples", str(queries)]
    logs = {split: sequences_log(split, shots, queries, output) for split in ("train", "validation")}
    return [
        *("--beam_data", str(logs["train"]), "--validation_data", str(logs["validation"])),
        # nothing is reported on by the recipe; the held-out queries are judged by the model itself
        *("--heldout_data", str(logs["validation"]), "--embeddings", str(sample.folder / "embeddings.safetensors")),
        *("--query_features", *sample.query_features, "--candidate_features", *sample.candidate_features),
        *("--similarity_features", *sample.similarity_features, "--num_shots", str(shots), "--score_picks", "true"),
        # what the search went on to is good in hindsight; without it, longer steps pay
        *("--sources", "random", "selector", "--learning_rate", "1e-3", "--grpo_epochs", "10"),
    ]


def make_clip(folder: Path) -> None:
    """A small CLIP of random weights that reads bytes, with its processor and the rows of the task, in `folder`."""
    if folder.exists():
        return
    partial = folder.with_name(f".{folder.name}.partial")
    alphabet = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    reader = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    reader.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    reader.decoder = decoders.ByteLevel()
    reader.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=reader, model_max_length=64, **special)
    CLIPProcessor(CLIPImageProcessorPil(), tokenizer).save_pretrained(partial)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"vocab_size": len(alphabet), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    text = {**size, **ids, "max_position_embeddings": 64}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=size, projection_dim=64)).save_pretrained(partial)
    with open(partial / "rows.jsonl", "wb") as stream:
        for row in sample_examples(TASK):
            stream.write(orjson.dumps({"id": row.id, "question": row.question, "answers": row.answers}) + b"\n")
    partial.rename(folder)


def arguments_of(
    version: str, shots: int, seed: int, queries: int, output: Path
) -> tuple[RecipeArguments, GroupBeamGRPOConfig]:
    """The recipe's arguments for a version."""
    folder, about = place(output, version, shots, seed), VERSIONS[version]
    options = [
        *("--config", str(HERE / "okvqa_v3.yaml"), *COMMON, "--seed", str(seed), "--output_dir", str(folder)),
        *("--model_preset", about["preset"], "--similarity_prior", str(about.get("similarity_prior", True))),
        *("--num_set_layers", str(about.get("num_set_layers", 0))),
        *data_options(load_sample(TASK), shots, queries, output),
    ]
    if about["preset"] == "v2_lora":
        options += ["--clip_model", str(output / "clip"), "--task_file", str(output / "clip" / "rows.jsonl")]
    recipe, args = parse(options, GroupBeamGRPOConfig)
    recipe.model_init_kwargs = about.get("options")
    if recipe.model_options.get("stop"):  # sequences of all lengths compete; the longest end unasked
        recipe.min_shots, recipe.model_init_kwargs = 1, {**recipe.model_options, "max_shots": shots}
    args.resume_from_checkpoint = "true"
    return recipe, args


def run_one(version: str, shots: int, seed: int, queries: int, output: Path) -> None:
    """Trains a version; ends with the selectors `sft` and `grpo` in its folder. What it prints goes to a log."""
    log = output / "logs" / f"{key('', version).strip('_')}-{shots}-{seed}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as stream, redirect_stdout(stream), redirect_stderr(stream):
        try:
            recipe, args = arguments_of(version, shots, seed, queries, output)
            data = load_task(recipe, seed)
            if data.pick_scorer is not None:  # versions start alike: what one has asked, the next need not
                data.pick_scorer = PICK_SCORERS.setdefault(shots, data.pick_scorer)
            train(recipe, args, data, Path(str(args.output_dir)))
        except Exception as error:
            traceback.print_exc()
            raise RuntimeError(f"{version}, {shots} shots, seed {seed} failed, see {log}") from error


def place(output: Path, version: str, shots: int, seed: int) -> Path:
    return output / key("", SAME.get(version, version)).strip("_") / f"shots{shots}-seed{seed}"


def key(stage: str, version: str) -> str:
    """Name of a version's selector, as `evaluate` takes names."""
    return f"{stage}_{re.sub('[^a-z0-9]+', '_', version.lower())}"


def judge(versions: list[str], shots: int, seeds: int, heldout: int, output: Path) -> dict[str, NDArray[np.float64]]:
    """Log-probability of the right answer with the choices of each baseline and selector, (seeds, queries) each."""
    selectors = [
        f"{key(stage, version)}={place(output, version, shots, seed) / stage}"
        for version in versions
        for stage in ("sft", "grpo")
        for seed in range(seeds)
    ]
    folder = output / "answers" / f"shots{shots}"
    options = ["--config", str(HERE / f"evaluate_{TASK}.yaml"), "--num_shots", str(shots)]
    options += ["--num_queries", str(heldout), "--output_dir", str(folder), "--cache_dir", str(output / "cache")]
    evaluate(parse_evaluate([*options, "--baselines", "random", "similarity", "mmr", "--selectors", *selectors]))
    picks = orjson.loads((folder / "picks.json").read_bytes())
    answers = read_answers(folder / "answers")
    worth = {}
    for name, chosen in picks["shots"][str(shots)].items():
        found = [
            [answers[query, tuple(shown)].log_prob for query, shown in zip(picks["query_ids"], row, strict=True)]
            for row in chosen
        ]
        worth[name] = np.array(found, dtype=np.float64)
    return worth


@torch.inference_mode()
def size_and_latency(folder: Path) -> tuple[int, float]:
    """Parameters, and median milliseconds of a greedy selection for one query on one core."""
    selector, shots = load_selector(folder).eval(), int(folder.parent.name.partition("-")[0].removeprefix("shots"))
    if isinstance(selector, ClipSelector):
        collator = DataCollatorForRawBeams(
            sample_examples(TASK), AutoProcessor.from_pretrained(folder), selector.config.modalities
        )
        inputs = policy_inputs(collator([load_sample(TASK).load("heldout")[0]]), POOL_INPUTS, selector)
    else:
        widths = [sum(side.values()) for side in (selector.config.query_features, selector.config.candidate_features)]
        inputs = {"query_embeds": torch.randn(1, widths[0]), "candidate_embeds": torch.randn(1, 16, widths[1])}
    times, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(60):
            start = time.perf_counter()
            selector.select(**inputs, num_shots=shots)
            times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return sum(p.numel() for p in selector.parameters()), 1e3 * float(np.median(times[10:]))


def table(versions: list[str], shots: int, worth: dict[str, NDArray[np.float64]], output: Path) -> str:
    """A section of the page, of what `judge` found."""
    known = np.isfinite(np.concatenate(list(worth.values()))).all(axis=0)
    worth = {name: values[:, known] for name, values in worth.items()}
    lines = [f"## {shots} shot{'s' * (shots > 1)}", ""]
    lines += [
        "| selector | parameters | ms | SFT | GRPO | GRPO − its SFT | GRPO − GRPO of v2 |",
        "| --- | --: | --: | --- | --- | --- | --- |",
    ]
    for name in ("random", "similarity", "mmr"):
        if name in worth:
            lines.append(f"| {name} | | | {interval(mean_interval(worth[name].mean(0)))} | | | |")
    grpo = {version: worth[key("grpo", version)] for version in versions}
    for version in versions:
        parameters, latency = size_and_latency(place(output, version, shots, 0) / "grpo")
        sft = worth[key("sft", version)]
        cells = [version, f"{parameters:,}", f"{latency:.1f}"]
        cells += [interval(mean_interval(sft)), interval(mean_interval(grpo[version]))]
        cells.append(interval(paired_interval(grpo[version], sft), signed=True))
        compared = version != REFERENCE and REFERENCE in versions
        cells.append(interval(paired_interval(grpo[version], grpo[REFERENCE]), signed=True) if compared else "")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(verdict(grpo, reference) for reference in (REFERENCE, ORIGINAL) if reference in versions)]
    return "\n".join(lines) + "\n"


def verdict(grpo: dict[str, NDArray[np.float64]], reference: str) -> str:
    """What the intervals of the differences to a version say."""
    others = [version for version in grpo if version != reference]
    differences = {version: paired_interval(grpo[version], grpo[reference]) for version in others}
    sides = {
        "above": [version for version, of in differences.items() if of.ci_low > 0],
        "below": [version for version, of in differences.items() if of.ci_high < 0],
    }
    said = [
        f"{side.capitalize()} `{reference}` with certainty: "
        + "; ".join(f"{version} ({interval(differences[version], signed=True)})" for version in found)
        + "."
        if found
        else f"No version is {side} `{reference}` with certainty."
        for side, found in sides.items()
    ]
    return f"* {' '.join(said)} ({len(differences)} intervals, not corrected for their number.)"


def interval(of: Any, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"{of.mean:{sign}.3f} [{of.ci_low:{sign}.3f}, {of.ci_high:{sign}.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", nargs="+", default=list(VERSIONS), choices=list(VERSIONS), metavar="NAME")
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--queries", type=int, default=600, help="training queries of a version, scored anew at 3 shots and more"
    )
    parser.add_argument("--heldout", type=int, default=500, help="held-out queries that the model answers")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="trainings at a time, one core each")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/ablation"))
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs", help="folder of the page")
    arguments = parser.parse_args()
    output = arguments.output_dir
    make_clip(output / "clip")
    make_start(output / "start")
    seeds = range(arguments.seeds)
    logs = [(split, shots) for split in ("train", "validation") for shots in sorted(arguments.shots, reverse=True)]
    trained = list(dict.fromkeys(SAME.get(version, version) for version in arguments.versions))
    jobs = [(version, shots, seed) for shots in arguments.shots for version in trained for seed in seeds]
    jobs = [job for job in jobs if not (place(output, *job) / "grpo").exists()]
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes to come; this one has its threads already
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        for made in [pool.submit(sequences_log, *log, arguments.queries, output) for log in logs]:
            made.result()
        running = [pool.submit(run_one, *job, arguments.queries, output) for job in jobs]
        for job, future in zip(jobs, running, strict=True):
            try:
                future.result()
            except Exception:
                pool.shutdown(cancel_futures=True)
                raise
            print(f"{job}: done", flush=True)
        about = (arguments.seeds, arguments.heldout, output)
        judged = [pool.submit(judge, arguments.versions, shots, *about) for shots in arguments.shots]
        worth = [future.result() for future in judged]
    numbers = {"contrast": CONTRAST, "validation": VALIDATION, "logged": arguments.queries}
    parts = [NOTES.format(queries=arguments.heldout, seeds=arguments.seeds, **numbers)]
    parts += [
        table(arguments.versions, shots, found, output) for shots, found in zip(arguments.shots, worth, strict=True)
    ]
    with atomic_file(arguments.docs / "ablation.md") as stream:
        stream.write("\n".join(parts).encode())


if __name__ == "__main__":
    main()
