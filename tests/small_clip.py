"""A tiny CLIP of the real classes, its processor, and rows with images whose colour says what they are worth."""

import io

import numpy as np
import torch
from PIL import Image
from planted import ROWS, to_dataset
from planted import planted_rows as rows_of
from small_language_models import byte_tokenizer
from tokenizers import processors
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

from lever_grpo.data import Example


SIZE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
PIXELS, LONGEST, WIDTH = 8, 40, 6


def make_processor() -> CLIPProcessor:
    tokenizer = byte_tokenizer()
    ends = [("<s>", 0), ("</s>", 1)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=ends
    )
    tokenizer.model_max_length = LONGEST
    square = {"height": PIXELS, "width": PIXELS}
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": PIXELS}, crop_size=square)
    return CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer)


def clip_config() -> CLIPConfig:
    text = {"vocab_size": len(byte_tokenizer()), "max_position_embeddings": LONGEST}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vision = {"image_size": PIXELS, "patch_size": 4}
    return CLIPConfig(text_config=text | SIZE, vision_config=vision | SIZE, projection_dim=WIDTH)


def make_clip(seed: int = 0) -> CLIPModel:
    """With weights large enough for the inputs to matter."""
    torch.manual_seed(seed)
    model = CLIPModel(clip_config()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def png(red: float, green: float, blue: float) -> bytes:
    colour = tuple(round(255 * part) for part in (red, green, blue))
    stream = io.BytesIO()
    Image.new("RGB", (10, 12), colour).save(stream, "PNG")
    return stream.getvalue()


def coloured_examples() -> tuple[list[Example], np.ndarray]:
    """A row for each id of the planted logs, and how red its image is, (ROWS, 1). Every ninth has none."""
    colours = np.random.default_rng(0).random((ROWS, 3))
    examples = [
        Example(
            i, f"what is thing {i}?", (f"thing {i % 7}", "a thing"), image=None if i % 9 == 8 else png(*colours[i])
        )
        for i in range(ROWS)
    ]
    red = np.array([0.0 if row.image is None else colours[row.id, 0] for row in examples])
    return examples, red[:, None]


def coloured_log(red: np.ndarray, queries: list[int], **options):
    """Groups in which red demonstrations are worth more."""
    return to_dataset(rows_of(red, queries, **options))
