"""A process whose Hub is not there: it trains and tries to push, and says what it saw as `pusher.py` does."""

import json
import logging
import sys
import time
from pathlib import Path

from planted import Planted, make_trainer, weights_of


def push_to_nobody(paths: dict) -> dict:
    planted, folder = Planted(), Path(paths["folder"])
    records: list[logging.LogRecord] = []
    logging.getLogger("lever_grpo").addHandler(handler := logging.Handler())
    handler.emit = records.append
    alone = make_trainer(folder / "alone", planted)
    alone.train()
    start = time.monotonic()
    trainer = make_trainer(folder / "gone", planted, push_to_hub=True, hub_model_id="me/gone")
    trainer.train()
    weights, expected = weights_of(trainer.model), weights_of(alone.model)
    return {
        "pushed": trainer.push_to_hub(),
        "seconds": time.monotonic() - start,
        "said": [record.getMessage() for record in records if record.levelno >= logging.WARNING],
        "same": all(weights[name].equal(expected[name]) for name in expected),
    }


if __name__ == "__main__":
    print(json.dumps(push_to_nobody(json.loads(Path(sys.argv[1]).read_text()))))
