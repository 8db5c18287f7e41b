"""Post-train a demonstration selector: SFT, then RCE, then offline GRPO, then the report.

    accelerate launch recipes/okvqa_v3.py --config recipes/okvqa_v3.yaml

Without `--beam_data` it runs on the packaged sample; with it, `--embeddings` names the embeddings of the rows. See
`docs/recipes.md` for the commands of single stages, several GPUs and OK-VQA itself.
"""

import sys

from accelerate import PartialState

from lever_grpo import GroupBeamGRPOConfig
from lever_grpo.pipeline import parse, run


if __name__ == "__main__":
    run(*parse(sys.argv[1:], GroupBeamGRPOConfig))
    PartialState().destroy_process_group()  # a process that ends with its threads at work may abort, its work done
