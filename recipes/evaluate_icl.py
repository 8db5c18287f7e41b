"""Let a frozen model answer with the demonstrations of every method, and report which selection wins.

    python recipes/evaluate_icl.py --config recipes/evaluate_icl.yaml --selectors sft=outputs/demo/sft \\
        grpo=outputs/demo/grpo [--num_queries 50] [--output_dir outputs/evaluation]
    accelerate launch --num_processes 2 recipes/evaluate_icl.py --config recipes/evaluate_icl.yaml

Several paths of one name are seeds of one method. The same command goes on where it was stopped; a selector that is
added later costs its own prompts only. Ends with `report.json` and `report.html` in the output folder.
"""

import sys

from lever_grpo.cli import main


if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
