"""Coverage-guided fuzzing of the parsers; `make fuzz` runs each of them for a minute.

    python tests/hardening/fuzz_atheris.py PARSER [-max_total_time=60] [any option of libFuzzer]

A parser may read what it is given or raise an error that names the file; anything else is a finding, whose input is
left as `crash-*` in `outputs/fuzz/PARSER`. What was found to reach new code is kept there, for the next run.
"""

import os
import sys
import tempfile
from pathlib import Path

import atheris


with atheris.instrument_imports(include=["lever_grpo.data", "lever_grpo.pipeline.parsing", "lever_grpo.convert"]):
    from lever_grpo.convert import read_checkpoint
    from lever_grpo.data import EmbeddingStore, load_examples, load_vqa
    from lever_grpo.data.formats import parse_record
    from lever_grpo.data.groups import group_rows
    from lever_grpo.data.pools import PoolSource, read_external_ids
    from lever_grpo.data.readers import iter_records
    from lever_grpo.data.records import Options, Where
    from lever_grpo.pipeline.parsing import read_config

from corpus import CHECKPOINTS, CONFIGS, EMBEDDINGS, LOGS, POOLS, QUESTION, TASKS, VQA, text
from test_fuzz import LOGS as VALID_LOGS


def read_log(path):
    """What `load_beams` does, without a dataset."""
    options = Options(rebuild_pools=True)
    for key, label, record in iter_records(str(path)):
        found = parse_record(key, record, Where(str(path), label), options, {})
        if found is not None:
            group_rows(found, options)


PARSERS = {
    "logs": (read_log, "log.json", LOGS),
    "tasks": (load_examples, "task.jsonl", TASKS),
    "vqa": (lambda path: load_vqa(path, path), "questions.json", VQA),
    "pools": (lambda path: PoolSource(path)(7), "pools.json", POOLS),
    "external_ids": (read_external_ids, "ids.json", POOLS),
    "safetensors": (EmbeddingStore.open, "e.safetensors", EMBEDDINGS),
    "npy": (EmbeddingStore.open, "e.npy", EMBEDDINGS),
    "configs": (read_config, "config.yaml", CONFIGS),
    "checkpoints": (read_checkpoint, "a.ckpt", CHECKPOINTS),
    "checkpoints_safetensors": (read_checkpoint, "a.safetensors", CHECKPOINTS),
}

VALID = {
    "logs": VALID_LOGS,
    "vqa": {"both": text({"questions": [QUESTION], "annotations": [{**QUESTION, "answers": [{"answer": "a dog"}]}]})},
}


def main():
    name = sys.argv[1]
    read, file, seeds = PARSERS[name]
    folder = Path("outputs", "fuzz", name)
    (folder / "corpus").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as made:
        for seed in seeds:
            place = Path(made, seed.name)
            place.mkdir()
            path = seed.write(place)
            if path.is_file() and path.suffix == Path(file).suffix and path.stat().st_size < 4096:
                (folder / "corpus" / seed.name).write_bytes(path.read_bytes())
    for valid, content in VALID.get(name, {}).items():
        (folder / "corpus" / valid).write_text(content)
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=memory) as place:
        path = Path(place, file)

        def one(data):
            path.write_bytes(data)
            try:
                read(path)
            except (ValueError, OSError) as error:
                if file not in str(error):
                    raise RuntimeError("the error does not name the file") from error

        options = ["-max_len=4096", "-timeout=60", "-rss_limit_mb=4096", f"-artifact_prefix={folder}/"]
        atheris.Setup([sys.argv[0], *options, *sys.argv[2:], str(folder / "corpus")], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
