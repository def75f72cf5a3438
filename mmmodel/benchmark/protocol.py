"""What the benchmark measures, and with which settings; all of them were chosen on validation concepts."""

from __future__ import annotations

from dataclasses import dataclass, field

from mmmodel.finetuning.config import FinetuneConfig

INPUTS = {"image": ("image",), "text": ("text",), "speech": ("audio",), "all": ("text", "image", "audio")}
ARMS = ("baseline", "pretrained")  # the baseline: the same model with its initial weights


@dataclass(frozen=True)
class Protocol:
    """Two runs of the benchmark are comparable when these are equal."""

    label: str = "category"
    language: str = "fr"  # of the captions and recordings beside the pictures, in classification
    labels_per_class: tuple[int, ...] = (5, 20, 0)  # of a probe: training samples of each class; 0: all
    finetune_labels: tuple[int, ...] = (20,)  # of a full fine-tuning, likewise
    seeds: int = 5  # of probes: which labels
    finetune_seeds: int = 5  # which labels, which order, and the weights that start at random
    strengths: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 0.01, 0.1, 1.0)  # inverse regularisation of probes, tried in turn
    # lr and layer_decay are each arm's own: a baseline with the other's would be a straw man.
    finetune: dict[str, FinetuneConfig] = field(
        default_factory=lambda: {
            "baseline": FinetuneConfig(lr=3e-3, layer_decay=1.0, epochs=25, patience=6),
            "pretrained": FinetuneConfig(lr=1e-3, layer_decay=0.8, epochs=25, patience=6),
        }
    )
    finetune_inputs: tuple[str, ...] = ("image",)
    resamples: int = 2000  # of the bootstrap over concepts


def budget_name(labels_per_class: int) -> str:
    return str(labels_per_class) if labels_per_class else "all"
