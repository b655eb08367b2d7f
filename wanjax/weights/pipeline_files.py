"""The files of the Diffusers layout that belong to no network: pipeline, schedule, image processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wanjax.config import CLIPConfig, DiTConfig
from wanjax.weights.layouts import Settings
from wanjax.weights.mapping import DIFFUSERS_VERSION


def model_index(
    dit: DiTConfig, clip: CLIPConfig | None, tokenizer: Path, boundary: float | None = None
) -> dict[str, Any]:
    """`model_index.json`: which class loads which folder; `boundary` is that of two experts."""
    config = tokenizer / "tokenizer_config.json"
    tokenizer_class = Settings(config).get("tokenizer_class") if config.is_file() else None
    index: dict[str, Any] = {
        "_class_name": "WanPipeline" if dit.in_channels == dit.out_channels else "WanImageToVideoPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
    }
    if dit.in_channels != dit.out_channels:
        index["image_encoder"] = ["transformers", "CLIPVisionModel"] if clip else [None, None]
        index["image_processor"] = ["transformers", "CLIPImageProcessor"] if clip else [None, None]
    if boundary is not None:
        index |= {"boundary_ratio": boundary, "transformer_2": ["diffusers", "WanTransformer3DModel"]}
    return index | {
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", tokenizer_class or "T5TokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }


def scheduler_config(flow_shift: float) -> dict[str, Any]:
    """`scheduler/scheduler_config.json`, the published releases' choice with this shift."""
    return {
        "_class_name": "UniPCMultistepScheduler",
        "_diffusers_version": DIFFUSERS_VERSION,
        "final_sigmas_type": "zero",
        "flow_shift": flow_shift,
        "lower_order_final": True,
        "num_train_timesteps": 1000,
        "predict_x0": True,
        "prediction_type": "flow_prediction",
        "solver_order": 2,
        "solver_type": "bh2",
        "timestep_spacing": "linspace",
        "use_flow_sigmas": True,
    }


def image_processor_config(clip: CLIPConfig) -> dict[str, Any]:
    """`image_processor/preprocessor_config.json`: CLIP's mean and standard deviation, bicubic."""
    return {
        "crop_size": {"height": clip.image_size, "width": clip.image_size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "CLIPImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": clip.image_size},
    }


def default_flow_shift(dit: DiTConfig, experts: int = 1) -> float:
    """What the official command lines take: 16 for first and last frame, 5 otherwise (Wan2.1 `generate.py`); 12 for
    text to video by two experts (Wan2.2 `wan_t2v_A14B.py`).
    """
    if dit.task == "flf2v":
        return 16.0
    return 12.0 if experts == 2 and dit.task == "t2v" else 5.0
