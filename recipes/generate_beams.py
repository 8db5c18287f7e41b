"""Search demonstrations with a frozen model and write the beam log that selectors are trained on.

    accelerate launch recipes/generate_beams.py --config recipes/generate_beams.yaml

The same as `lever-grpo generate`; on several GPUs the queries are divided. Killed or stopped (`--max_hours`), the same
command goes on. `--help` lists every option.
"""

import sys

from lever_grpo.cli import main


if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
