"""Beam logs as datasets of groups, the embeddings that go with them, and batches of both."""

from .beam_json import BeamJson, BeamJsonConfig, load_beams, log_metadata
from .collator import DataCollatorForBeams
from .embeddings import EmbeddingStore
from .estimates import complete_scores, fully_scored
from .examples import Example
from .export import export_lever_lm, export_lever_plus
from .inspect import LogReport, inspect_log, print_report
from .orders import parse_log_name, to_prompt_order, to_search_order
from .raw_collator import DataCollatorForRawBeams
from .records import BeamDataError
from .sample import SampleTask, list_samples, load_sample
from .splits import drop_candidates, keep_sequences, keep_sources, split_by_query
from .tasks import load_examples, load_okvqa, load_vqa, load_vqav2, sample_examples


__all__ = [
    "BeamDataError",
    "BeamJson",
    "BeamJsonConfig",
    "DataCollatorForBeams",
    "DataCollatorForRawBeams",
    "EmbeddingStore",
    "Example",
    "LogReport",
    "SampleTask",
    "complete_scores",
    "drop_candidates",
    "export_lever_lm",
    "export_lever_plus",
    "fully_scored",
    "inspect_log",
    "keep_sequences",
    "keep_sources",
    "list_samples",
    "load_beams",
    "load_examples",
    "load_okvqa",
    "load_sample",
    "load_vqa",
    "load_vqav2",
    "log_metadata",
    "parse_log_name",
    "print_report",
    "sample_examples",
    "split_by_query",
    "to_prompt_order",
    "to_search_order",
]
