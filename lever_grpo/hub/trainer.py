"""A trainer's pushes to the Hub: what fails there is said loudly, and neither stops a training nor loses it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from .cards import Training, selector_card
from .push import CARD_FILE, commit_files, files_of, hub_api, in_words, say_how_to_push
from .resume import BEST, LAST


logger = logging.getLogger(__name__)

_WEIGHTS = ("config.json", "model*.safetensors*", "adapter_*")
_SPEED = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")


class HubTrainer(Trainer):
    """
    A [`~transformers.Trainer`] with pushes that cannot hurt it.

    It departs from the base class as follows: a push that fails raises nothing, it is a warning at a save and at the
    end an error with the command that pushes later; with `hub_strategy="checkpoint"` the best checkpoint goes to the
    Hub beside the last one, as resuming needs both; each save is one commit; the pickle of the arguments, in which
    `hub_token` stands in clear, stays at home; the card is [`~hub.selector_card`].
    """

    push_in_progress: Any = None

    def __init__(self, *args: Any, **kwargs: Any):
        # further files and folders that go with every pushed checkpoint, by their path in the repository
        self.hub_extras: dict[str, Path] = {}
        super().__init__(*args, **kwargs)

    @cached_property
    def _hub(self) -> Any:
        return hub_api()  # with one thread, in which pushes wait for each other

    def init_hf_repo(self, token=None, private=None):
        try:
            self._make_repository(token, private)
        except Exception as error:
            self._warn_of(error)

    def _make_repository(self, token: Any, private: Any) -> None:
        hub_api()  # the base class asks by the same session
        if private is not None:
            self.args.hub_private_repo = private  # from where all versions of the base class take it
        super().init_hf_repo(token)

    def _warn_of(self, error: BaseException) -> None:
        logger.warning(
            "The Hub took nothing (%s). The training goes on; its next save and its end try again.", in_words(error)
        )

    def _say_how_to_push(self, error: BaseException) -> None:
        output = Path(str(self.args.output_dir))
        say_how_to_push(error, output, self.hub_model_id or self.args.hub_model_id or output.absolute().name)

    def _push(
        self,
        files: dict[str, Path],
        message: str,
        failed: Callable[[BaseException], None],
        token: Any = None,
        revision: str | None = None,
    ) -> Future:
        job = self._hub.run_as_future(
            commit_files,
            self.hub_model_id,
            files,
            message,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
        )

        def heard(job: Future) -> None:
            error = job.exception()
            if error is not None:
                failed(error)

        job.add_done_callback(heard)
        return job

    def _push_from_checkpoint(self, checkpoint_folder):
        strategy = HubStrategy(self.args.hub_strategy)
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        if self.hub_model_id is None:  # the Hub did not answer before
            self.init_hf_repo()
        running = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if self.hub_model_id is None or (running and not self.args.hub_always_push):
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        checkpoint = Path(checkpoint_folder)
        files = {name: path for pattern in _WEIGHTS for name, path in files_of(checkpoint, pattern).items()}
        places = dict(self.hub_extras)
        if strategy == HubStrategy.ALL_CHECKPOINTS:
            places[checkpoint.name] = checkpoint
        elif strategy == HubStrategy.CHECKPOINT:
            places[LAST] = checkpoint
            if self.state.best_model_checkpoint is not None:
                places[BEST] = Path(self.state.best_model_checkpoint)
        for name, place in places.items():
            if place.is_dir():
                files |= {f"{name}/{file}": path for file, path in files_of(place, "**/*").items()}
            elif place.exists():
                files[name] = place
        job = self._push(files, f"step {self.state.global_step}", self._warn_of)
        if running:
            self.push_in_progress.jobs.append(job)
        else:
            self.push_in_progress = PushInProgress([job])

    def push_to_hub(
        self, commit_message="End of training", blocking=True, token=None, revision=None, private=None, **kwargs
    ):
        """
        Pushes the policy with its card; `kwargs` are those of `create_model_card`.

        Returns:
            `str`: address of the commit, a `Future` of it without `blocking`; `None` on other processes, and where the
            push failed.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        if self.hub_model_id is None:
            try:
                self._make_repository(token, private)
            except Exception as error:
                self._say_how_to_push(error)
        self.create_model_card(**kwargs)
        self._finish_current_push()
        if self.hub_model_id is None:
            return None
        files = files_of(Path(str(self.args.output_dir)))
        job = self._push(files, commit_message, self._say_how_to_push, token, revision)
        if not blocking:
            return job
        return None if job.exception() is not None else job.result()

    def create_model_card(  # type: ignore[override]
        self, language=None, license=None, tags=None, model_name=None, **others
    ):
        """Writes `README.md` and `curves.png` to the output folder; what fails there is logged and stops nothing. The
        `others` of [`~transformers.Trainer`] are not used: the card says itself what was learned from."""
        if not self.is_world_process_zero():
            return
        if unused := [name for name, value in others.items() if value is not None]:
            logger.warning("The card of a selector has no place for %s; add it to README.md.", ", ".join(unused))
        try:
            tags = [tags] if isinstance(tags, str) else tags or ()
            self._write_card(model_name, language=language, license=license, tags=tags)
        except Exception:
            logger.warning("The model card could not be written; the training is as it was.", exc_info=True)

    def _write_card(self, model_name: str | None, **metadata: Any) -> None:
        from ..report.figures import draw_curves  # imports matplotlib

        args, output = self.args, Path(str(self.args.output_dir))
        log, best = self.state.log_history, self.state.best_global_step
        judged = [entry for entry in log if "eval_loss" in entry]
        kept = ([entry for entry in judged if entry["step"] == best] or judged or [{"step": self.state.global_step}])[
            -1
        ]
        curves = draw_curves({"log_history": log, "kl_band": None, "best_step": best})
        if curves is not None:
            (output / "curves.png").write_bytes(curves)
        own = {f.name for f in fields(args)} - {f.name for f in fields(TrainingArguments)}
        names = ("seed", "learning_rate", "per_device_train_batch_size", "num_train_epochs", "max_steps", *sorted(own))
        training = Training(
            metrics={name: x for name, x in kept.items() if name.startswith("eval_") and name not in _SPEED},
            step=int(kept["step"]),
            settings={name: getattr(args, name) for name in names},
            figures=() if curves is None else ("curves.png",),
        )
        repo_id = self.hub_model_id or model_name or args.hub_model_id or output.absolute().name
        model: Any = self.model
        config = model.config  # that of the selector, also where an adapter is trained
        selector_card(output, repo_id, training=training, config=config, **metadata).save(output / CARD_FILE)
