"""Train the supervised selector (v2) alone: imitate the best beams, then the report.

accelerate launch recipes/sft_v2.py --config recipes/sft_v2.yaml
"""

import sys

from lever_grpo import SelectorSFTConfig
from lever_grpo.pipeline import parse, run


if __name__ == "__main__":
    run(*parse(sys.argv[1:], SelectorSFTConfig))
