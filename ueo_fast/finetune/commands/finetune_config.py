"""Everything that can be chosen about a fine-tuning run, with a sentence for each choice."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ueo_fast.finetune.clip.template import split_template
from ueo_fast.finetune.engine.training_config import TrainerConfig
from ueo_fast.finetune.files.records import as_record
from ueo_fast.ranges import (
    LARGEST_FACTOR,
    MOST_THREADS,
    MOST_WORKERS,
    check_count,
    check_number,
)

if TYPE_CHECKING:
    from ueo_fast.finetune.files.run_folder import RunFolder
    from ueo_fast.finetune.methods.base import Method

MethodName = Literal[
    "zeroshot", "ueo", "infomax", "entmin", "adabn", "tent", "upl", "pouf", "dance", "oracle"
]
Dataset = Literal["office31", "officehome", "visdac", "domainnet"]
Scenario = Literal["CSDA", "CDA", "PDA", "ODA", "OPDA"]
Precision = Literal["fp32", "bf16", "fp16"]
_EPS_USERS = ("ueo", "infomax", "entmin", "tent", "pouf", "dance", "oracle")


def _help(text: str) -> dict[str, Any]:
    return {"help": text}


def _of(*methods: str, help: str) -> dict[str, Any]:
    """Of an option that only these methods have a use for."""
    return {"help": f"{help} ({', '.join(methods)})", "methods": methods}


@dataclass(frozen=True)
class FinetuneConfig:
    """Choices of ``ueo-fast finetune``; each field is a flag, its help is in the metadata.

    The defaults are the paper's method, with the authors' optimiser and budget; ``--preset
    authors`` sets what their released code does otherwise, as far as it can be set.

    Raises:
        ValueError: a value outside its range, or choices that do not go together.
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
    decode: Literal["auto", "full"] = field(
        default="auto",
        metadata=_help(
            "auto: make views of a copy with twice the model's pixels per side, for which a JPEG "
            "is decoded at 1/2, 1/4 or 1/8 of its size, several times faster for photographs; "
            "full: make them of all pixels, as the authors do"
        ),
    )
    cache: str = field(
        default="auto",
        metadata=_help(
            "keeps the copies that --decode auto makes, so that each image is decoded once and not "
            "in every epoch: auto, in the run folder until the run is finished; off; or a folder, "
            "which is kept and may serve several runs. Results are the same"
        ),
    )
    cache_limit: float | None = field(
        default=None,
        metadata=_help(
            "gigabytes that the copies take at most (10,000 photographs: about 8); the other "
            "images are decoded in every epoch. Default: half of what is free on the disk"
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
            *_EPS_USERS,
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

    def __post_init__(self) -> None:
        if self.resume and self.out is None:
            raise ValueError("resume needs --out, the folder of the run to go on with")
        if not self.resume:
            self._check_data()
        if self.out == "":
            raise ValueError(
                "out is empty: name a folder, or leave it out for a new one under runs/"
            )
        self._check_ranges()
        self._check_cache()
        self._check_train()
        self._check_used()
        split_template(self.prompt_template)
        self._check_rates(self.trainer())

    def _check_ranges(self) -> None:
        for name in ("epochs", "batch_size", "eval_batch_size", "top_k"):
            check_count(name, getattr(self, name))
        for name in ("eval_every", "checkpoint_every"):
            check_count(name, getattr(self, name), least=0)
        for name in ("micro_batch_size", "early_stop"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        check_count("workers", self.workers, 0, MOST_WORKERS)
        if self.threads is not None:
            check_count("threads", self.threads, 1, MOST_THREADS)
        check_count("seed", self.seed, 0, 2**63 - 1)
        check_number("mcm_scale", self.mcm_scale, sign="positive")
        if self.logit_scale is not None:
            check_number("logit_scale", self.logit_scale, sign="positive", most=LARGEST_FACTOR)
        check_number("eps", self.eps, sign="not negative")
        check_number("trade_off", self.trade_off, sign="any", most=LARGEST_FACTOR)
        for name in ("prompt_lr", "affine_lr", "weight_decay"):
            check_number(name, getattr(self, name), sign="not negative", most=LARGEST_FACTOR)

    def _check_cache(self) -> None:
        if self.decode == "full" and self.cache not in ("auto", "off"):
            raise ValueError(
                f"cache={self.cache!r} keeps small copies of images, but decode='full' makes views "
                "of all pixels: leave out one of the two"
            )
        if self.cache_limit is None:
            return
        check_number("cache_limit", self.cache_limit, sign="positive")
        if self.cache == "off" or self.decode == "full":
            raise ValueError(
                f"cache_limit={self.cache_limit} has no effect with cache={self.cache!r} and "
                f"decode={self.decode!r}, where no copies are kept: leave it out"
            )

    PRESETS: ClassVar[Mapping[str, str]] = {
        "authors": "what the authors' released code does, as far as it can be set (docs/guide.md "
        "has a table)"
    }

    @staticmethod
    def preset(name: Literal["authors"], options: Mapping[str, Any]) -> dict[str, Any]:
        """The options of a preset, given the user's own."""
        assert name == "authors"
        values: dict[str, Any] = {
            "decode": "full",
            "affine_scope": "authors",
            "logit_scale": 100.0,
            "seed": 2023,
        }
        if options.get("method", "ueo") in _EPS_USERS:
            values["eps"] = 1e-5
        if options.get("dataset") == "domainnet":
            values["epochs"] = 5
        return values

    def _check_data(self) -> None:
        if self.dataset is None:
            if self.domain is not None or self.root is not None:
                raise ValueError(
                    f"domain={self.domain!r} and root={self.root!r} are for --dataset "
                    "(office31, officehome, visdac, domainnet); for your own images give --data "
                    "and --classes"
                )
            if self.scenario != "OPDA":
                raise ValueError(
                    f"scenario={self.scenario!r} chooses classes of a data set of the paper, so it "
                    "needs --dataset; your own images are taken as they are: leave it out"
                )
            if self.data is None or self.classes is None:
                raise ValueError(
                    f"data={self.data!r} and classes={self.classes!r}: give --data, the images, "
                    "and --classes, a text file with one class name per line; or --dataset, "
                    "--domain and --root for a data set of the paper"
                )
        elif self.data is not None or self.classes is not None or self.test_data is not None:
            raise ValueError(
                f"dataset={self.dataset!r} brings its own images and classes: leave out --data, "
                "--classes and --test-data"
            )
        elif self.domain is None or self.root is None:
            raise ValueError(
                f"dataset={self.dataset!r} needs --domain and --root, the folder that has it"
            )

    def _check_train(self) -> None:
        only = {"zeroshot": "nothing", "adabn": "no parameter", "tent": "the affine parameters"}
        allowed = ("both", "affine") if self.method == "tent" else ("both",)
        if self.method in only and self.train not in allowed:
            raise ValueError(
                f"method={self.method!r} trains {only[self.method]}, so it has no use for "
                f"train={self.train!r}: leave it out"
            )

    def _check_rates(self, trainer: TrainerConfig) -> None:
        if self.method == "tent" and trainer.affine_lr == 0:
            raise ValueError(
                "affine_lr is 0, but tent trains the affine parameters and nothing else: give a "
                "positive affine_lr"
            )
        if self.method not in ("zeroshot", "adabn") and trainer.prompt_lr == trainer.affine_lr == 0:
            raise ValueError(
                f"nothing to train: of prompt_lr={self.prompt_lr} and affine_lr={self.affine_lr} "
                f"none is positive for train={self.train!r}"
            )

    def _check_used(self) -> None:
        for item in fields(self):
            users, value = item.metadata.get("methods", ()), getattr(self, item.name)
            if users and self.method not in users and value != item.default:
                raise ValueError(
                    f"method={self.method!r} has no use for {item.name}={value!r} (used by "
                    f"{', '.join(users)}): leave it out, or choose one of these methods"
                )

    def check_files(self) -> None:
        """Check what can be seen without loading anything.

        Raises:
            OSError, ValueError: a file or folder is missing or cannot be what it is given as, a
                name is unknown, or ``out`` is in use.
        """
        from ueo_fast.finetune.data.benchmarks import check_names
        from ueo_fast.finetune.data.image_list import read_class_names, read_images
        from ueo_fast.finetune.files.run_folder import RunFolder

        if self.resume:
            assert self.out is not None
            RunFolder.open(self.out)
            return
        if self.out is not None:
            RunFolder.check_free(Path(self.out))
        if self.dataset is not None:
            assert self.domain is not None
            assert self.root is not None
            check_names(self.dataset, self.domain, self.scenario, self.root)
            return
        assert self.classes is not None
        read_class_names(self.classes)
        for source in (self.data, self.test_data):
            if source is not None and not os.path.exists(source):
                read_images(source)  # says so

    @property
    def weights(self) -> str | None:
        """``pretrained``, or the authors' for the default model."""
        return "openai" if self.pretrained is None and self.model == "RN50" else self.pretrained

    def make_method(self) -> Method:
        """The method with its own choices.

        Raises:
            ValueError: a choice that the method has no use for.
        """
        from ueo_fast.finetune.methods.registry import METHODS, make_method, options_of

        options: dict[str, Any] = {
            "trade_off": self.trade_off,
            "confidence": self.confidence,
            "eps": self.eps,
            "k": self.top_k,
        }
        if "mcm_scale" in options_of(METHODS[self.method]):
            options["mcm_scale"] = self.mcm_scale  # else it only scores, which all methods need
        return make_method(self.method, **options)

    def trainer(self) -> TrainerConfig:
        """Budget and optimiser."""
        return TrainerConfig(
            epochs=self.epochs,
            batch_size=self.batch_size,
            prompt_lr=0.0 if self.train == "affine" else self.prompt_lr,
            affine_lr=0.0 if self.train == "prompt" else self.affine_lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            schedule=self.schedule,
            micro_batch_size=self.micro_batch_size,
            precision=self.precision,
            channels_last=self.channels_last,
            compile=self.compile,
            seed=self.seed,
            num_workers=self.workers,
            checkpoint_every=self.checkpoint_every,
            early_stop=self.early_stop,
        )

    def as_dict(self) -> dict[str, Any]:
        """What ``--config`` reads back; without ``out`` and ``resume``, so that a rerun gets its
        own folder."""
        values = asdict(self)
        del values["out"], values["resume"]
        return values

    @classmethod
    def read(cls, folder: RunFolder) -> FinetuneConfig:
        """The inverse of :meth:`as_dict`: a run's own options, from its ``config.json``.

        Raises:
            BrokenFileError: an option is missing, unknown (of another version), or has a value that
                it cannot have; the message names the file and the option.
        """
        names = [item.name for item in fields(cls) if item.name not in ("out", "resume")]
        return folder.read_json("config.json", as_record(cls, all_of=names))

    def command(self) -> str:
        """The shortest command that gives the same run; without ``--out``."""
        words = ["ueo-fast", "finetune"]
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in ("out", "resume") or value == item.default or value is MISSING:
                continue
            text = str(value).lower() if isinstance(value, bool) else str(value)
            words += ["--" + item.name.replace("_", "-"), text]
        return shlex.join(words)
