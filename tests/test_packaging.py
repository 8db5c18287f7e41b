"""What a stranger gets: metadata, package data, lazy imports, accelerate configs, the README's example."""

import ast
import json
import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from try_wheel import build_wheel

import lever_grpo


ROOT = Path(__file__).resolve().parents[1]
CONFIGS = {
    # name: distributed type, fewest processes, on the CPU
    "cpu": ("NO", 1, True),
    "single_gpu": ("NO", 1, False),
    "multi_gpu": ("MULTI_GPU", 2, False),
    "fsdp2": ("FSDP", 2, False),
    "deepspeed_zero2": ("DEEPSPEED", 2, False),
}
PUBLIC_NAMES = [
    "BeamJson",
    "CurriculumCallback",
    "DataCollatorForBeams",
    "EmbeddingStore",
    "GroupBeamGRPOConfig",
    "GroupBeamGRPOTrainer",
    "KLBetaCallback",
    "PointerSelector",
    "PointerSelectorConfig",
    "SelectorSFTTrainer",
    "TemperatureCallback",
    "clip_advantages",
    "compute_softmax_weights",
    "load_beams",
    "normalize_rewards_zscore",
]


def run_python(code: str, cwd: Path = ROOT, timeout: float = 300) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# ---- names ----


@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_public_names(name):
    assert name in lever_grpo.__all__
    assert getattr(lever_grpo, name).__name__ == name


def test_every_public_name_resolves():
    missing = [name for name in lever_grpo.__all__ if not hasattr(lever_grpo, name)]
    assert not missing
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = lever_grpo.no_such_name


def test_import_and_help_do_not_load_torch():
    code = """
import sys
import lever_grpo
from lever_grpo.cli import build_parser
build_parser().format_help()
print([name for name in ("torch", "transformers", "datasets") if name in sys.modules])
"""
    assert run_python(code).strip() == "[]"


# ---- metadata ----


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel's files, and the texts of its metadata."""
    with zipfile.ZipFile(build_wheel(tmp_path_factory.mktemp("wheel"))) as archive:
        info = next(entry.rpartition("/")[0] for entry in archive.namelist() if entry.endswith(".dist-info/METADATA"))
        texts = {part: archive.read(f"{info}/{part}").decode() for part in ("METADATA", "entry_points.txt")}
        return set(archive.namelist()), texts


def test_wheel_holds_modules_sample_and_marker(wheel):
    files, _ = wheel
    package = ROOT / "lever_grpo"
    kept = (path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    expected = {path.relative_to(ROOT).as_posix() for path in kept}
    assert {"lever_grpo/py.typed", "lever_grpo/sample/README.md", "lever_grpo/sample/emoji/train.parquet"} <= expected
    expected |= {f"lever_grpo/accelerate_configs/{name}.yaml" for name in CONFIGS}
    assert not expected - files
    assert not {name for name in files if not name.startswith("lever_grpo")}, "only the package belongs in the wheel"


def test_version_is_the_same_everywhere(wheel):
    version = lever_grpo.__version__
    assert f"\nVersion: {version}\n" in wheel[1]["METADATA"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    heading = "## [Unreleased]" if ".dev" in version else f"## [{version}]"
    assert heading in (ROOT / "CHANGELOG.md").read_text()


def test_entry_point_and_licence(wheel):
    _, texts = wheel
    assert "lever-grpo = lever_grpo.cli:main" in texts["entry_points.txt"]
    assert "License-Expression: Apache-2.0" in texts["METADATA"]
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:200]


def requirements(metadata: str, extra: str = "") -> dict[str, Requirement]:
    """Requirements without an extra, or with the named one, by canonical name."""
    lines = (line for line in metadata.splitlines() if line.startswith("Requires-Dist: "))
    found = [Requirement(line.removeprefix("Requires-Dist: ")) for line in lines]
    if extra:
        wanted = [r for r in found if r.marker is not None and r.marker.evaluate({"extra": extra})]
    else:
        wanted = [r for r in found if r.marker is None]
    return {canonicalize_name(r.name): r for r in wanted}


def imported(folder: Path) -> set[str]:
    """Names of the distributions that the modules of a folder import, at any depth of the code."""
    top = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                top |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                top.add(node.module.partition(".")[0])
    homes = packages_distributions()
    own = {"lever_grpo"} | {path.stem for path in folder.glob("*.py")}  # a script imports its neighbours by name
    third_party = top - set(sys.stdlib_module_names) - own
    return {canonicalize_name(homes.get(name, [name])[0]) for name in third_party}


def test_requirements_cover_the_imports(wheel):
    metadata = wheel[1]["METADATA"]
    base = requirements(metadata)
    optional = {
        name
        for extra in ("peft", "encoders", "search", "sample", "captions", "evaluate", "demo", "completion", "trackers")
        for name in requirements(metadata, extra)
    }
    for folder, more in (("lever_grpo", set()), ("recipes", set()), ("benchmarks", requirements(metadata, "test"))):
        assert not imported(ROOT / folder) - base.keys() - optional - set(more), (
            f"{folder} imports what is not required"
        )
    assert {"pytest", "hypothesis", "scipy", "peft"} <= requirements(metadata, "test").keys()
    assert {"ruff", "mypy"} <= requirements(metadata, "quality").keys()


@pytest.mark.parametrize("name", ["transformers", "trl", "datasets", "accelerate"])
def test_libraries_that_we_subclass_are_bounded(wheel, name):
    specifier = requirements(wheel[1]["METADATA"])[name].specifier
    assert {part.operator for part in specifier} == {">=", "<"}, f"{name}: {specifier}"


def test_the_table_of_supported_versions_is_that_of_the_metadata(wheel):
    """Of `CONTRIBUTING.md`: the oldest versions are the bounds, and no newest version is older or out of bounds."""
    metadata = wheel[1]["METADATA"]
    bounds = requirements(metadata, "peft") | requirements(metadata)
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("## Supported versions\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \|$", section, flags=re.MULTILINE)
    assert len(rows) > 8
    for name, oldest, newest in rows:
        specifier = bounds[canonicalize_name(name)].specifier
        assert f">={oldest}" in str(specifier).split(","), f"{name}: {specifier}"
        assert newest in specifier, f"{name}: {specifier}"


# ---- accelerate configs ----


def test_every_accelerate_config_is_tested():
    assert {path.stem for path in (ROOT / "accelerate_configs").glob("*.yaml")} == CONFIGS.keys()


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_config(name):
    """accelerate's own loader refuses unknown keys; its launcher checks that options fit together."""
    distributed_type, processes, use_cpu = CONFIGS[name]
    path = str(ROOT / "accelerate_configs" / f"{name}.yaml")
    config = load_config_from_file(path)
    assert isinstance(config, ClusterConfig)
    assert config.distributed_type == distributed_type
    assert config.num_processes >= processes and (processes > 1 or config.num_processes == 1)
    assert config.use_cpu is use_cpu
    assert config.mixed_precision == "no"  # a value here would overrule the recipe's bf16=False

    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", path, "recipe.py"]))
    assert args.mixed_precision == "no"
    assert (args.multi_gpu, args.use_fsdp, args.use_deepspeed) == tuple(
        distributed_type == kind for kind in ("MULTI_GPU", "FSDP", "DEEPSPEED")
    )
    if name == "fsdp2":
        assert (args.fsdp_version, args.fsdp_auto_wrap_policy) == (2, "NO_WRAP")
    if name == "deepspeed_zero2":
        assert args.zero_stage == 2 and args.gradient_clipping == "auto"


def test_nested_keys_of_accelerate_configs_are_known():
    """The loader takes any key inside these sections; the launcher's options say which exist."""
    options = vars(launch_command_parser().parse_args(["recipe.py"]))
    for path in (ROOT / "accelerate_configs").glob("*.yaml"):
        config = yaml.safe_load(path.read_text())
        for section in ("fsdp_config", "deepspeed_config"):
            assert not config.get(section, {}).keys() - options.keys(), f"{path.name}: {section}"


# ---- GitHub ----


def workflow(name: str) -> dict:
    return yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text())


def commands_of(job: dict) -> str:
    return "\n".join(step.get("run", "") for step in job["steps"])


def test_continuous_integration_runs_targets_that_exist_on_every_python(wheel):
    jobs = workflow("ci")["jobs"]
    classifiers = re.findall(r"^Classifier: .* :: (3\.\d+)$", wheel[1]["METADATA"], flags=re.MULTILINE)
    assert jobs["test"]["strategy"]["matrix"]["python-version"] == classifiers
    targets = re.findall(r"\bmake ([\w-]+)", "\n".join(commands_of(job) for job in jobs.values()))
    known = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert sorted(targets) == ["quality", "test", "test-oldest", "wheel-test"] and set(targets) <= set(known)


@pytest.mark.parametrize("tag, status", [("v0.4.0", 0), ("v0.4.1", 1), ("0.4.0", 1)])
def test_a_release_needs_the_tag_of_its_version(tag, status, tmp_path):
    (script,) = [
        step["run"] for step in workflow("release")["jobs"]["build"]["steps"] if "tag" in step.get("name", "")
    ]
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist" / "lever_grpo-0.4.0-py3-none-any.whl").touch()
    environment = {**os.environ, "GITHUB_REF_NAME": tag}
    done = subprocess.run(["bash", "-ec", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == status and (tag in done.stdout) == bool(status), done.stderr


def test_only_the_job_that_publishes_may_ask_for_an_identity():
    release = workflow("release")
    assert release[True] == {"push": {"tags": ["v*"]}}  # YAML reads the key `on` as a boolean
    assert release["permissions"] == {"contents": "read"} and "permissions" not in release["jobs"]["build"]
    assert release["jobs"]["publish"]["permissions"] == {"id-token": "write"}
    assert "secrets." not in (ROOT / ".github" / "workflows" / "release.yml").read_text()


def test_a_bug_report_asks_for_the_versions():
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug_report.yml").read_text())
    (field,) = [item for item in form["body"] if "lever-grpo env" in item["attributes"].get("label", "")]
    assert field["validations"] == {"required": True}


# ---- files ----


def tracked_files() -> list[Path]:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_file_names_a_machine():
    """Absolute paths of somebody's machine and hosts of package indexes have no place in a repository."""
    roots = "|".join(("home", "root", "work", "Users", "mnt", "workspace", "opt"))
    hosts = "|".join(("pypi", "pythonhosted", "registry.npmjs", "mirrors"))
    forbidden = re.compile(rf"(?<![\w.~)>/-])/(?:{roots})/\w|\b(?:{hosts})\.(?:org|io|com)\b")
    assert forbidden.search('path = "/' + 'home/me/x"') and forbidden.search("https://" + "pypi" + ".org/simple")
    offenders = []
    for path in tracked_files():
        data = path.read_bytes()
        if b"\0" in data[:8192]:
            continue
        for number, line in enumerate(data.decode("utf-8", errors="replace").splitlines(), start=1):
            if forbidden.search(line):
                offenders.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not offenders


def test_relative_links_of_documents_exist():
    broken = []
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "recipes").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8")):
            if "://" not in target and not (path.parent / target).exists():
                broken.append(f"{path.relative_to(ROOT)}: {target}")
    assert not broken


def readme_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)


def test_readme_selector_runs(tmp_path):
    (code,) = [block for block in readme_blocks() if "DemonstrationSelector" in block]
    for name, count in (("candidates", 4), ("queries", 2)):
        rows = [{"id": i, "question": f"{name} {i}?"} | ({"answer": "a"} if count == 4 else {}) for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    header = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from small_language_models import TOKENIZER, llama
from lever_grpo import PointerSelector, PointerSelectorConfig
from lever_grpo.search.features import FeatureEncoder, save_encoders, FeatureMap
import numpy as np
llama().save_pretrained("llama"); TOKENIZER.save_pretrained("llama")
config = PointerSelectorConfig(query_features={{"question": 64}}, candidate_features={{"question": 64}})
PointerSelector(config).save_pretrained("outputs/supersense/grpo")
encoder = FeatureEncoder("hidden_states", model="llama", layers=(1, 2))
whole = FeatureMap(np.zeros((2, 32)), np.ones((2, 32)))
save_encoders("outputs/supersense/grpo", {{"question": encoder}}, {{"question": whole}})
"""
    lines = run_python(header + code, cwd=tmp_path).strip().splitlines()
    assert len(lines) == 2 and all("candidates" in line and "queries" in line for line in lines)


def test_readme_quick_start_runs(tmp_path):
    (block,) = [block for block in readme_blocks() if "Trainer" in block]
    code, replaced = re.subn('report_to="none"', 'report_to="none", max_steps=4, use_cpu=True', block)
    assert replaced == 1
    header = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    check = "\nprint(trainer.state.global_step, PointerSelector.from_pretrained('outputs/quickstart/selector').dtype)"
    assert run_python(header + code + check, cwd=tmp_path).strip().splitlines()[-1] == "4 torch.float32"
