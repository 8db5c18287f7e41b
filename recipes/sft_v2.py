"""Train the supervised selector (v2) alone: imitate the best beams, then the report.

accelerate launch recipes/sft_v2.py --config recipes/sft_v2.yaml
"""

import sys

from accelerate import PartialState

from lever_grpo import SelectorSFTConfig
from lever_grpo.pipeline import parse, run


if __name__ == "__main__":
    run(*parse(sys.argv[1:], SelectorSFTConfig))
    PartialState().destroy_process_group()  # a process that ends with its threads at work may abort, its work done
