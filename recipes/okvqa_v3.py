"""Post-train a demonstration selector: SFT, then RCE, then offline GRPO, then the report.

    accelerate launch recipes/okvqa_v3.py --config recipes/okvqa_v3.yaml

Without `--beam_data` it runs on the packaged sample; with it, `--embeddings` names the embeddings of the rows. See
`recipes/README.md` for the commands of single stages, several GPUs and OK-VQA itself.
"""

import sys

from trl import TrlParser

from lever_grpo import GroupBeamGRPOConfig
from lever_grpo.pipeline import RecipeArguments, run


def parse(arguments: list[str]) -> tuple[RecipeArguments, GroupBeamGRPOConfig]:
    """Arguments of the command line on top of those of `--config`; unknown ones are an error."""
    arguments = [part for argument in arguments for part in _split_config(argument)]
    parser = TrlParser((RecipeArguments, GroupBeamGRPOConfig))
    recipe, args = parser.parse_args_and_config(arguments, fail_with_unknown_args=True)
    return recipe, args


def _split_config(argument: str) -> list[str]:
    # the parser knows `--config FILE` but not `--config=FILE`
    return argument.split("=", 1) if argument.startswith("--config=") else [argument]


if __name__ == "__main__":
    run(*parse(sys.argv[1:]))
