"""Everything that can be chosen about a fine-tuning run, with a sentence for each choice."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from ueo_fast.finetune.data import Decoding

MethodName = Literal[
    "zeroshot", "ueo", "infomax", "entmin", "adabn", "tent", "upl", "pouf", "dance", "oracle"
]
Dataset = Literal["office31", "officehome", "visdac", "domainnet"]
Scenario = Literal["CSDA", "CDA", "PDA", "ODA", "OPDA"]
Precision = Literal["fp32", "bf16", "fp16"]
EPS_USERS = ("ueo", "infomax", "entmin", "tent", "pouf", "dance", "oracle")
"""Methods with logarithms in their loss."""


def _help(text: str) -> dict[str, Any]:
    return {"help": text}


def _of(*methods: str, help: str) -> dict[str, Any]:
    """Of an option that only these methods have a use for."""
    return {"help": f"{help} ({', '.join(methods)})", "methods": methods}


@dataclass(frozen=True)
class FinetuneOptions:
    """Each field is a flag of ``ueo-fast finetune``; its help is in the metadata.

    The defaults are the paper's method, with the authors' optimiser and budget.
    """

    data: str | None = field(
        default=None,
        metadata=_help(
            "the images: a folder (class folders or not), a list file of 'path label' lines, or a "
            "CSV with a column 'image' or 'path' and, if you like, 'label'. Labels are used for "
            "metrics only"
        ),
    )
    classes: str | None = field(
        default=None,
        metadata=_help("text file with the names of the classes you know, one per line"),
    )
    out: str | None = field(
        default=None,
        metadata=_help(
            "run folder, new or empty; default: runs/finetune-<date>-<time> in the current folder"
        ),
    )
    resume: bool = field(
        default=False,
        metadata=_help(
            "go on with the run in --out where it was stopped, with its own options, kept in its "
            "config.json. Other options are not needed: one that differs from the run's "
            "is refused, and one that has its default value is ignored. Only --cache, "
            "--cache-limit, and --model with --pretrained may differ: for a model that is "
            "elsewhere now, with the same weights"
        ),
    )
    data_root: str | None = field(
        default=None,
        metadata=_help(
            "folder that the paths in a list or CSV are relative to; default: the file's own "
            "folder. It has no effect on a folder of images"
        ),
    )
    follow_links: bool = field(
        default=False,
        metadata=_help(
            "follow links that lead out of a folder of images; no file is read twice in any case"
        ),
    )
    decode: Decoding = field(
        default="auto",
        metadata=_help(
            "auto: make views from a copy with twice the model's pixels per side, for which a JPEG "
            "is decoded at 1/2, 1/4 or 1/8 of its size: several times faster for photographs; "
            "full: make them from all pixels, as the authors do"
        ),
    )
    cache: str = field(
        default="auto",
        metadata=_help(
            "where the copies of --decode auto are kept, so that each image is decoded once and "
            "not in every epoch. auto: in the run folder until the run is finished; off: nowhere; "
            "or a folder, which stays and can be shared by several runs. Results are the same"
        ),
    )
    cache_limit: float | None = field(
        default=None,
        metadata=_help(
            "most gigabytes that the copies may take (10,000 photographs: about 8); the remaining "
            "images are decoded in every epoch. Default: half of the free disk space"
        ),
    )
    test_data: str | None = field(
        default=None,
        metadata=_help(
            "labelled images for the metrics, given like --data; default: the images of --data"
        ),
    )
    dataset: Dataset | None = field(
        default=None,
        metadata=_help(
            "a data set of the paper instead of --data and --classes; needs --domain and --root"
        ),
    )
    domain: str | None = field(
        default=None, metadata=_help("of the data set, e.g. art, webcam, validation, sketch")
    )
    scenario: Scenario = field(
        default="OPDA",
        metadata=_help(
            "which classes of the data set are known and which are among the training images: "
            "closed set (CSDA), all known (CDA), some known (PDA), all known and some unknown "
            "(ODA), some known and some unknown (OPDA)"
        ),
    )
    root: str | None = field(default=None, metadata=_help("folder of the data set"))
    check_counts: bool = field(
        default=True,
        metadata=_help("refuse a data set whose number of images is not the published one"),
    )
    model: str = field(
        default="RN50",
        metadata=_help(
            "name of an open_clip model, or a folder with open_clip_config.json and weights"
        ),
    )
    pretrained: str | None = field(
        default=None,
        metadata=_help(
            "open_clip's tag of the weights, a file with them, or tag=file; 'none': random "
            "weights; default: openai for RN50; a folder brings its own"
        ),
    )
    activation: Literal["gelu", "quickgelu"] | None = field(
        default=None,
        metadata=_help("of the model, where a file of weights leaves it open"),
    )
    method: MethodName = field(
        default="ueo",
        metadata=_help(
            "ueo, or a method to compare with; oracle reads the labels, to say what is the most "
            "that weighting can bring"
        ),
    )
    train: Literal["both", "prompt", "affine"] = field(
        default="both",
        metadata=_help(
            "what is trained: the prompt's context, the scale and shift of the image tower's "
            "normalisation layers, or both"
        ),
    )
    prompt_template: str = field(
        default="a photo of a {}.",
        metadata=_help(
            "{} is the class name; the words before it are where the learnt context starts"
        ),
    )
    affine_scope: Literal["all", "authors"] = field(
        default="all",
        metadata=_help("which normalisation layers: all, or those with 'bn' or 'ln' in their name"),
    )
    confidence: Literal["zeroshot", "online"] = field(
        default="zeroshot",
        metadata=_of(
            "ueo",
            help="the images' weights: once, from the zero-shot model, or in each batch from the "
            "model as it is",
        ),
    )
    mcm_scale: float = field(
        default=1.0,
        metadata=_help(
            "multiplies the cosines in the MCM score, which weighs the images and tells unknown "
            "ones; 1 is the authors', 100 the temperature of OpenAI's models"
        ),
    )
    logit_scale: float | None = field(
        default=None,
        metadata=_help(
            "multiplies the cosines in the predictions that are trained; 100 is the authors'; "
            "default: the model's own"
        ),
    )
    eps: float = field(
        default=0.0,
        metadata=_of(
            *EPS_USERS,
            help="added inside the logarithms; 1e-5 is the authors' released code",
        ),
    )
    trade_off: float = field(
        default=1.0,
        metadata=_of("ueo", "infomax", "oracle", help="weight of the marginal entropy"),
    )
    top_k: int = field(default=16, metadata=_of("upl", help="pseudo-labelled images per class"))
    epochs: int = field(default=50, metadata=_help("passes over the images"))
    batch_size: int = field(default=64, metadata=_help("images per step"))
    prompt_lr: float = field(default=1e-4, metadata=_help("learning rate of the context"))
    affine_lr: float = field(
        default=1e-4, metadata=_help("learning rate of the normalisation layers")
    )
    momentum: float = field(default=0.0, metadata=_help("of SGD"))
    weight_decay: float = field(default=0.0, metadata=_help("of SGD"))
    schedule: Literal["cosine", "constant"] = field(
        default="cosine", metadata=_help("of the learning rates, per step")
    )
    micro_batch_size: int | None = field(
        default=None,
        metadata=_help(
            "images that go through the image tower at a time, where a whole batch does not fit: "
            "the gradient is that of the whole batch, for one forward pass more"
        ),
    )
    precision: Precision = field(
        default="fp32",
        metadata=_help("of the towers; weights that are trained and the loss stay fp32"),
    )
    channels_last: bool = field(
        default=False, metadata=_help("memory layout of the images (ResNets on a GPU, bf16)")
    )
    compile: bool = field(default=False, metadata=_help("torch.compile the image tower"))
    patch: bool = field(
        default=True,
        metadata=_help("run the image tower with the fused layers of ueo_fast.patch_visual"),
    )
    seed: int = field(default=0, metadata=_help("order of the images, and their augmentation"))
    workers: int = field(
        default=2,
        metadata=_help("processes that load images; at most four per processor are started"),
    )
    device: str | None = field(
        default=None, metadata=_help("cpu, cuda, cuda:1, ...; default: cuda where there is one")
    )
    threads: int | None = field(
        default=None, metadata=_help("CPU threads; default: PyTorch's choice")
    )
    eval_every: int = field(
        default=10,
        metadata=_help("epochs between two evaluations on labelled images; 0: only at the end"),
    )
    eval_batch_size: int = field(default=192, metadata=_help("images per step of an evaluation"))
    checkpoint_every: int = field(
        default=100, metadata=_help("steps between checkpoints; 0: one per epoch")
    )
    early_stop: int | None = field(
        default=None,
        metadata=_help(
            "stop when the mutual information of image and prediction, which needs no labels, has "
            "not risen for so many epochs, and keep the best"
        ),
    )
    strict: bool = field(
        default=False, metadata=_help("fail at an image that cannot be read instead of skipping it")
    )
    tensorboard: bool = field(
        default=False, metadata=_help("log to TensorBoard as well, into the run folder")
    )
    wandb: str | None = field(
        default=None, metadata=_help("log to this project of Weights & Biases as well")
    )
