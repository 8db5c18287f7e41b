"""Compare versions and decoders of the selector at one to four shots, and write the table of the docs.

    python recipes/ablate.py [--shots 1 2 3 4] [--seeds 3] [--jobs 2] [--output_dir outputs/ablation]

On the task `supersense` of the sample. Its packaged logs hold one and two shots; for more, the frozen model first
scores sequences of that length for some of the training and validation queries (`logs/` in the output folder). Every
version is trained by SFT and GRPO on the same logs, from the same start (similarity; `no prior` from random weights),
and the model then answers held-out queries with what each chose. What is complete is not repeated, what was cut off
goes on. Ends with `docs/ablation.md`.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
import yaml
from numpy.typing import NDArray

from lever_grpo import GroupBeamGRPOConfig, load_sample
from lever_grpo.atomic import atomic_file
from lever_grpo.data.sample import SampleTask
from lever_grpo.inference.answering import read_answers
from lever_grpo.metrics import mean_interval, paired_interval
from lever_grpo.models import load_selector
from lever_grpo.pipeline import load_task, parse, train
from lever_grpo.pipeline.evaluate import evaluate, parse_evaluate
from lever_grpo.pipeline.generate import GenerateArguments, generate


HERE = Path(__file__).resolve().parent
TASK = "supersense"
MODEL = yaml.safe_load((HERE / f"evaluate_{TASK}.yaml").read_text())
MODEL_KEYS = ("task", "scorer", "dtype", "question_template", "answer_template", "stop", "separator", "answers")
REFERENCE = "v2"
# what differs from `recipes/okvqa_v3.yaml`: a network on the similarity prior, trained on the log's scores alone
COMMON = ["--hidden_dim", "64", "--agreement_steps", "0", "--sft_num_beams", "3", "--learning_rate", "5e-4"]
VERSIONS: dict[str, dict[str, Any]] = {
    "prior alone": {"preset": "prior"},
    "v0": {"preset": "v0"},
    "v1": {"preset": "v1"},
    "v2": {"preset": "v2"},
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
}
NOTES = """\
# Ablation: versions and decoders

Each version of the selector, with the options of its decoder, trained by SFT and then GRPO on the same logs of the
task `supersense`, and judged by what SmolLM2-135M-Instruct answers to {queries} held-out queries with its choices,
over {seeds} training seeds: the log-probability of the right answer, with its 95 % interval over queries. The last
column is the difference of the GRPO selector to that of v2, query by query. All were trained on {logged} queries;
for three and four shots a fresh log was made, with a beam of one and 24 random sequences a query. Latency is that
of one query alone, its embeddings given, from a pool of 16 on one core. `v2_lora` is missing: there is no CLIP
among the packages. `python recipes/ablate.py` makes this page.
"""


def sequences_log(split: str, shots: int, queries: int, output: Path) -> Path:
    """The log of a split at a number of shots: the packaged one, or one that the frozen model makes."""
    sample = load_sample(TASK)
    if shots <= 2:
        return sample.splits[split]
    folder = output / "logs" / f"{split}-{shots}"
    groups = sample.load(split)
    size = queries if split == "train" else queries // 4
    chosen = np.sort(np.random.default_rng(0).permutation(len(groups))[:size])
    pools = folder / "given_pools.jsonl"
    with atomic_file(pools) as stream:
        for row in groups.select(chosen):
            stream.write(orjson.dumps({"query_id": row["query_id"], "candidate_ids": row["candidate_ids"]}) + b"\n")
    log = generate(
        GenerateArguments(
            **{name: MODEL[name] for name in MODEL_KEYS},
            candidate_pools=str(pools),
            query_ids=[groups[i]["query_id"] for i in chosen.tolist()],
            num_shots=shots,
            beam_size=1,
            random_sequences=24,
            score="log_prob",
            output_dir=str(folder),
        )
    )
    return Path(log)


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
        *("--similarity_features", *sample.similarity_features, "--num_shots", str(shots)),
    ]


def run_one(version: str, shots: int, seed: int, queries: int, output: Path) -> None:
    """Trains a version; ends with the selectors `sft` and `grpo` in its folder."""
    folder, about = place(output, version, shots, seed), VERSIONS[version]
    options = [
        *("--config", str(HERE / "okvqa_v3.yaml"), *COMMON, "--seed", str(seed), "--output_dir", str(folder)),
        *("--model_preset", about["preset"], "--similarity_prior", str(about.get("similarity_prior", True))),
        *("--num_set_layers", str(about.get("num_set_layers", 0))),
        *data_options(load_sample(TASK), shots, queries, output),
    ]
    recipe, args = parse(options, GroupBeamGRPOConfig)
    recipe.model_init_kwargs = about.get("options")
    args.resume_from_checkpoint = "true"
    train(recipe, args, load_task(recipe, seed), folder)


def place(output: Path, version: str, shots: int, seed: int) -> Path:
    return output / key("", version).strip("_") / f"shots{shots}-seed{seed}"


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
    """Parameters, and median milliseconds of a greedy selection for one query."""
    selector, shots = load_selector(folder).eval(), int(folder.parent.name.partition("-")[0].removeprefix("shots"))
    widths = [sum(side.values()) for side in (selector.config.query_features, selector.config.candidate_features)]
    query, pool = torch.randn(1, widths[0]), torch.randn(1, 16, widths[1])
    times = []
    for _ in range(60):
        start = time.perf_counter()
        selector.select(query_embeds=query, candidate_embeds=pool, num_shots=shots)
        times.append(time.perf_counter() - start)
    return sum(p.numel() for p in selector.parameters()), 1e3 * float(np.median(times[10:]))


def table(versions: list[str], shots: int, seeds: int, heldout: int, output: Path) -> str:
    """A section of the page."""
    worth = judge(versions, shots, seeds, heldout, output)
    known = np.isfinite(np.concatenate(list(worth.values()))).all(axis=0)
    worth = {name: values[:, known] for name, values in worth.items()}
    lines = [f"## {shots} shot{'s' * (shots > 1)}", ""]
    lines += [
        "| selector | parameters | ms | SFT | GRPO | GRPO − GRPO of v2 |",
        "| --- | --: | --: | --- | --- | --- |",
    ]
    for name in ("random", "similarity", "mmr"):
        if name in worth:
            lines.append(f"| {name} | | | {interval(mean_interval(worth[name].mean(0)))} | | |")
    for version in versions:
        parameters, latency = size_and_latency(place(output, version, shots, 0) / "grpo")
        sft, grpo = (worth[key(stage, version)] for stage in ("sft", "grpo"))
        beside = ""
        if version != REFERENCE and REFERENCE in versions:
            beside = interval(paired_interval(grpo, worth[key("grpo", REFERENCE)]), signed=True)
        cells = [
            version,
            f"{parameters:,}",
            f"{latency:.1f}",
            interval(mean_interval(sft)),
            interval(mean_interval(grpo)),
        ]
        lines.append(f"| {' | '.join([*cells, beside])} |")
    return "\n".join(lines) + "\n"


def interval(of: Any, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"{of.mean:{sign}.3f} [{of.ci_low:{sign}.3f}, {of.ci_high:{sign}.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", nargs="+", default=list(VERSIONS), choices=list(VERSIONS), metavar="NAME")
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--queries", type=int, default=400, help="training queries that are scored at 3 shots and more"
    )
    parser.add_argument("--heldout", type=int, default=250, help="held-out queries that the model answers")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="trainings at a time, one core each")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/ablation"))
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs", help="folder of the page")
    parser.add_argument("--one", nargs=3, metavar=("VERSION", "SHOTS", "SEED"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    output = arguments.output_dir
    if arguments.one:
        version, shots, seed = arguments.one
        run_one(version, int(shots), int(seed), arguments.queries, output)
        return
    for shots in arguments.shots:  # all cores for the frozen model, before the trainings share them
        for split in ("train", "validation"):
            sequences_log(split, shots, arguments.queries, output)

    def launch(job: tuple[str, int, int]) -> None:
        command = [sys.executable, __file__, "--output_dir", str(output), "--queries", str(arguments.queries), "--one"]
        log = output / "logs" / f"{'-'.join(map(str, job)).replace(' ', '_')}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "w") as stream:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run([*command, *map(str, job)], stdout=stream, stderr=stream, env=environment)
        print(f"{job}: {'done' if done.returncode == 0 else f'failed, see {log}'}", flush=True)
        if done.returncode:
            raise RuntimeError(f"{job} failed, see {log}")

    seeds = range(arguments.seeds)
    jobs = [(version, shots, seed) for shots in arguments.shots for version in arguments.versions for seed in seeds]
    jobs = [job for job in jobs if not (place(output, *job) / "grpo").exists()]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(launch, jobs))
    parts = [NOTES.format(queries=arguments.heldout, seeds=arguments.seeds, logged=arguments.queries)]
    parts += [
        table(arguments.versions, shots, arguments.seeds, arguments.heldout, output) for shots in arguments.shots
    ]
    with atomic_file(arguments.docs / "ablation.md") as stream:
        stream.write("\n".join(parts).encode())


if __name__ == "__main__":
    main()
