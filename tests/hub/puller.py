"""A process that starts with an empty cache and knows the Hub only; called and answering as `pusher.py` does."""

import contextlib
import io
import json
import re
import sys
from pathlib import Path

from datasets import Image, get_dataset_config_names, load_dataset
from huggingface_hub import ModelCard, hf_hub_download
from planted import weights_of
from test_pipeline import make_recipe
from transformers import AutoModel

from lever_grpo import DemonstrationSelector, load_beams
from lever_grpo.inference import choose
from lever_grpo.pipeline import load_task


def run_snippet(repo_id: str) -> str:
    (snippet,) = re.findall(r"```python\n(.*?)```", ModelCard.load(repo_id).text, re.DOTALL)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(snippet, repo_id, "exec"), {})
    return printed.getvalue()


def pull_everything(paths: dict) -> dict:
    files, folder = paths["files"], Path(paths["folder"])
    data = load_task(make_recipe(files))
    seen: dict = {}
    for repo_id in ("me/selector", "me/late"):
        seen[repo_id] = choose(AutoModel.from_pretrained(repo_id), data.heldout, data.collator).tolist()
    loaded = DemonstrationSelector.from_pretrained("me/selector")
    seen["demonstration_selector"] = choose(loaded.selector, data.heldout, data.collator).tolist()
    seen["snippets"] = {repo_id: run_snippet(repo_id) for repo_id in ("me/selector", "me/plain")}

    plain, by_itself = (weights_of(AutoModel.from_pretrained(f"me/{name}")) for name in ("plain", "by-the-model"))
    seen["model_round_trip"] = all(plain[name].equal(by_itself[name]) for name in plain)

    own = load_beams(files["train"]).to_list()
    seen["groups_are_equal"] = load_dataset("me/log", split="train").to_list() == own
    seen["streamed_group_is_equal"] = next(iter(load_dataset("me/log", split="train", streaming=True))) == own[0]
    path = hf_hub_download("me/log", "beams/train.parquet", repo_type="dataset")
    seen["read_by_load_beams"] = load_beams(path).to_list() == own
    seen["configs"] = {name: get_dataset_config_names(f"me/{name}") for name in ("log", "bare-log")}
    rows = load_dataset("me/log", "rows", split="train")
    seen["row"] = {key: value for key, value in rows[5].items() if key != "image"}
    seen["picture"] = [rows[5]["image"].size, rows[5]["image"].getpixel((0, 0))]
    seen["kept_bytes"] = rows.cast_column("image", Image(decode=False))[5]["image"]["bytes"].hex()
    seen["manifest"] = json.loads(Path(hf_hub_download("me/log", "manifest.json", repo_type="dataset")).read_text())
    assert not list(folder.glob("*")), "this process must not need what the other one wrote"
    return seen


if __name__ == "__main__":
    print(json.dumps(pull_everything(json.loads(Path(sys.argv[1]).read_text()))))
