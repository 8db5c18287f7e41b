"""SIGTERM, as schedulers send it before they take a machine back: finish the step, save it, leave."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import TrainerCallback


logger = logging.getLogger(__name__)
EXIT_CODE = 128 + signal.SIGTERM  # as shells count


class TerminateCallback(TrainerCallback):
    """
    On SIGTERM, saves a checkpoint behind the running step and leaves with `SystemExit(143)`; training goes on from
    there as if nothing had happened.

    The signal reaches processes at different moments, so the trainer adds up `asked` over all of them at the begin of
    each step and sets `agreed`, and they leave together. Launchers kill what is still there after a time: 30 seconds
    under torchrun.

    Args:
        accelerator (`accelerate.Accelerator`):
            The trainer's.
    """

    def __init__(self, accelerator):
        self.accelerator = accelerator
        self.agreed = False
        self._asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """
        Inside, SIGTERM is heard; in another thread than the main one it does what it did before. One that came too
        late for another step is sent again behind the training.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.agreed = self._asked = False
        earlier = signal.signal(signal.SIGTERM, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, earlier)
        if self._asked:
            signal.raise_signal(signal.SIGTERM)

    def asked(self, device: torch.device) -> torch.Tensor:
        """Whether this process was asked to end, as a number to be added up."""
        return torch.tensor(int(self._asked), device=device)

    def _ask(self, number, frame):
        self._asked = True

    def on_step_end(self, args, state, control, **kwargs):
        # at the end of an epoch its evaluation and its own checkpoint come first
        if self.agreed and not float(state.epoch).is_integer():
            control.should_save = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.agreed:
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        if not self.agreed:
            return
        self.accelerator.wait_for_everyone()  # the main process is still writing
        logger.warning(
            "SIGTERM: stopped behind step %d, which is saved in %s; go on with --resume_from_checkpoint true.",
            state.global_step,
            args.output_dir,
        )
        raise SystemExit(EXIT_CODE)
