"""Everything that can be chosen about a fine-tuning run: one config, in parts for those who need
them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ueo_fast.finetune.clip.template import split_template
from ueo_fast.finetune.data import Decoding, check_cache
from ueo_fast.finetune.declared_options import (
    build,
    flat,
    options_of,
    rebuild,
    shortest_command,
)
from ueo_fast.finetune.engine.training_config import ImagePass, TrainerConfig
from ueo_fast.finetune.files.run_files import CONFIG
from ueo_fast.ranges import LARGEST_FACTOR, MOST_THREADS, check_count, check_number

if TYPE_CHECKING:
    from ueo_fast.finetune.files.run_folder import RunFolder
    from ueo_fast.finetune.methods.base import Method

MethodName = Literal[
    "zeroshot", "ueo", "infomax", "entmin", "adabn", "tent", "upl", "pouf", "dance", "oracle"
]
Dataset = Literal["office31", "officehome", "visdac", "domainnet"]
Scenario = Literal["CSDA", "CDA", "PDA", "ODA", "OPDA"]
EPS_USERS = ("ueo", "infomax", "entmin", "tent", "pouf", "dance", "oracle")
"""Methods with logarithms in their loss."""


@dataclass(frozen=True)
class DataOptions:
    """The images that a run learns from and is measured on.

    Attributes:
        data: the images: a folder (class folders or not), a list file of 'path label' lines, or a
            CSV with a column 'image' or 'path' and, optionally, 'label'. Labels are used for
            metrics only.
        classes: text file with the names of the classes you know, one per line.
        data_root: folder that the paths in a list or CSV are relative to; default: the file's own
            folder. It has no effect on a folder of images.
        follow_links: follow links that lead out of a folder of images; no file is read twice in any
            case.
        decode: auto: make views from a copy with twice the model's pixels per side, for which a
            JPEG is decoded at 1/2, 1/4 or 1/8 of its size: several times faster for photographs;
            full: make them from all pixels, as the authors do.
        cache: where the copies of --decode auto are kept, so that each image is decoded once and
            not in every epoch. auto: in the run folder until the run is finished; off: nowhere; or
            a folder, which stays and can be shared by several runs. Results are the same.
        cache_limit: gigabytes that the copies may take at most (10,000 photographs: about 8); the
            remaining images are decoded in every epoch. Default: half of the free disk space.
        test_data: labelled images for the metrics, given like --data; default: the images of
            --data.
        dataset: a data set of the paper instead of --data and --classes; needs --domain and --root.
        domain: of the data set, e.g. art, webcam, validation, sketch.
        scenario: which classes of the data set are known and which are among the training images:
            closed set (CSDA), all known (CDA), some known (PDA), all known and some unknown (ODA),
            some known and some unknown (OPDA).
        root: folder of the data set.
        check_counts: refuse a data set whose number of images is not the published one.
        strict: fail at an image that cannot be read instead of skipping it.
    """

    data: str | None = None
    classes: str | None = None
    data_root: str | None = None
    follow_links: bool = False
    decode: Decoding = "auto"
    cache: str = "auto"
    cache_limit: float | None = None
    test_data: str | None = None
    dataset: Dataset | None = None
    domain: str | None = None
    scenario: Scenario = "OPDA"
    root: str | None = None
    check_counts: bool = True
    strict: bool = False

    def check_given(self) -> None:
        """Raise ``ValueError`` unless there are images and classes, given in one way."""
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

    def check_cache(self, method: str) -> None:
        """Raise ``ValueError`` for a choice that has no effect with the others and ``method``."""
        check_cache(self.cache, self.decode)
        if method == "zeroshot" and self.cache not in ("auto", "off"):
            raise ValueError(
                f"cache={self.cache!r} has no effect with method='zeroshot', which sees each image "
                "once: leave it out"
            )
        if self.cache_limit is None:
            return
        check_number("cache_limit", self.cache_limit, sign="positive")
        if self.cache == "off" or self.decode == "full" or method == "zeroshot":
            raise ValueError(
                f"cache_limit={self.cache_limit} has no effect with cache={self.cache!r}, "
                f"decode={self.decode!r} and method={method!r}, where no copies are kept: "
                "leave it out"
            )

    def check_files(self) -> None:
        """Check what can be seen without loading anything.

        Raises:
            OSError, ValueError: a file or folder is missing or cannot be what it is given as, or a
                name is unknown.
        """
        from ueo_fast.finetune.data.benchmarks import check_names
        from ueo_fast.finetune.data.image_list import read_images
        from ueo_fast.finetune.data.labels import read_class_names

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


@dataclass(frozen=True)
class ModelOptions:
    """The model, and the classifier that is made of it.

    Attributes:
        model: name of an open_clip model, or a folder with open_clip_config.json and weights.
        pretrained: open_clip's tag of the weights, a file with them, or tag=file; 'none': random
            weights; default: openai for RN50; a folder brings its own.
        activation: of the model, if a file of weights does not tell.
        prompt_template: {} is the class name; the words before it are where the learned context
            starts.
        affine_scope: which normalisation layers are trained: all, or those with 'bn' or 'ln' in
            their name (authors).
        logit_scale: multiplies the cosines in the predictions that are trained; 100 is the
            authors'; default: the model's own.
        patch: run the image tower with the fused layers of ueo_fast.patch_visual.
    """

    model: str = "RN50"
    pretrained: str | None = None
    activation: Literal["gelu", "quickgelu"] | None = None
    prompt_template: str = "a photo of a {}."
    affine_scope: Literal["all", "authors"] = "all"
    logit_scale: float | None = None
    patch: bool = field(default=True, metadata={"group": "speed"})

    def __post_init__(self) -> None:
        split_template(self.prompt_template)
        if self.logit_scale is not None:
            check_number("logit_scale", self.logit_scale, sign="positive", most=LARGEST_FACTOR)

    @property
    def weights(self) -> str | None:
        """``pretrained``, or the authors' for the default model."""
        return "openai" if self.pretrained is None and self.model == "RN50" else self.pretrained


def _used_by(*methods: str) -> dict[str, Any]:
    return {"methods": methods}


@dataclass(frozen=True)
class MethodOptions:
    """The method and its own choices.

    Attributes:
        method: ueo, or a method to compare with; oracle reads the labels and shows the most that
            weighting can bring.
        train: what is trained: the prompt's context, the scale and shift of the image tower's
            normalisation layers (affine), or both.
        confidence: the images' weights: once, from the zero-shot model, or in each batch, from the
            model as it is (online).
        mcm_scale: multiplies the cosines in the MCM score, which weighs the images and detects
            unknown ones; 1 is the authors', 100 the temperature of OpenAI's models.
        eps: added inside the logarithms; 1e-5 is the authors' released code.
        trade_off: weight of the marginal entropy.
        top_k: pseudo-labelled images per class.
    """

    method: MethodName = "ueo"
    train: Literal["both", "prompt", "affine"] = "both"
    confidence: Literal["zeroshot", "online"] = field(default="zeroshot", metadata=_used_by("ueo"))
    mcm_scale: float = 1.0
    eps: float = field(default=0.0, metadata=_used_by(*EPS_USERS))
    trade_off: float = field(default=1.0, metadata=_used_by("ueo", "infomax", "oracle"))
    top_k: int = field(default=16, metadata=_used_by("upl"))

    def __post_init__(self) -> None:
        check_count("top_k", self.top_k)
        check_number("mcm_scale", self.mcm_scale, sign="positive")
        check_number("eps", self.eps, sign="not negative")
        check_number("trade_off", self.trade_off, sign="any", most=LARGEST_FACTOR)
        only = {"zeroshot": "nothing", "adabn": "no parameter", "tent": "the affine parameters"}
        allowed = ("both", "affine") if self.method == "tent" else ("both",)
        if self.method in only and self.train not in allowed:
            raise ValueError(
                f"method={self.method!r} trains {only[self.method]}, so it has no use for "
                f"train={self.train!r}: leave it out"
            )
        for option in options_of(MethodOptions).values():
            users, value = option.metadata.get("methods", ()), getattr(self, option.name)
            if users and self.method not in users and value != option.default:
                raise ValueError(
                    f"method={self.method!r} has no use for {option.name}={value!r} (used by "
                    f"{', '.join(users)}): leave it out, or choose one of these methods"
                )

    def make(self) -> Method:
        """The method with its own choices.

        Raises:
            ValueError: a choice that the method has no use for.
        """
        from ueo_fast.finetune.methods import METHODS, make_method, option_defaults

        options: dict[str, Any] = {
            "trade_off": self.trade_off,
            "confidence": self.confidence,
            "eps": self.eps,
            "k": self.top_k,
        }
        if "mcm_scale" in option_defaults(METHODS[self.method]):
            options["mcm_scale"] = self.mcm_scale  # else it only scores, which all methods need
        return make_method(self.method, **options)


@dataclass(frozen=True)
class SpeedOptions:
    """Where a run computes, and how much at a time.

    Attributes:
        device: cpu, cuda, cuda:1, ...; default: cuda if there is one.
        threads: CPU threads; default: PyTorch's choice.
        eval_batch_size: images per step of an evaluation.
    """

    device: str | None = None
    threads: int | None = None
    eval_batch_size: int = 192

    def __post_init__(self) -> None:
        check_count("eval_batch_size", self.eval_batch_size)
        if self.threads is not None:
            check_count("threads", self.threads, 1, MOST_THREADS)


@dataclass(frozen=True)
class OutputOptions:
    """What a run writes, and where.

    Attributes:
        out: run folder, new or empty; default: runs/finetune-<date>-<time> in the current folder.
        resume: go on with the run in --out where it was stopped, with its own options, kept in its
            config.json. Other options are not needed: one that differs from the run's is refused,
            and one that has its default value is ignored. Only --cache, --cache-limit, and --model
            with --pretrained may differ: for a model that is elsewhere now, with the same weights.
        eval_every: epochs between two evaluations on labelled images; 0: only at the end.
        tensorboard: log to TensorBoard as well, into the run folder.
        wandb: log to this project of Weights & Biases as well.
    """

    out: str | None = None
    resume: bool = False
    eval_every: int = 10
    tensorboard: bool = False
    wandb: str | None = None

    def __post_init__(self) -> None:
        if self.resume and self.out is None:
            raise ValueError("resume needs --out, the folder of the run to go on with")
        if self.out == "":
            raise ValueError(
                "out is empty: name a folder, or leave it out for a new one under runs/"
            )
        check_count("eval_every", self.eval_every, least=0)


_OWN = ("out", "resume")
"""Options that are not kept in the run folder, so that a rerun gets its own."""


@dataclass(frozen=True)
class FinetuneConfig:
    """Choices of ``ueo-fast finetune``, in parts.

    ``--preset authors`` sets what the authors' released code does otherwise, as far as it can be
    set.

    Raises:
        TypeError, ValueError: a value outside its range, or choices that do not go together.
    """

    data: DataOptions = DataOptions()
    model: ModelOptions = ModelOptions()
    method: MethodOptions = MethodOptions()
    training: TrainerConfig = field(
        default=TrainerConfig(num_workers=2), metadata={"without": ("shuffle",)}
    )
    speed: SpeedOptions = SpeedOptions()
    output: OutputOptions = OutputOptions()

    def __post_init__(self) -> None:
        if not self.output.resume:
            self.data.check_given()
        self.data.check_cache(self.method.method)
        trainer, method = self.trainer, self.method.method
        if method == "tent" and trainer.affine_lr == 0:
            raise ValueError(
                "affine_lr is 0, but tent trains the affine parameters and nothing else: give a "
                "positive affine_lr"
            )
        if method not in ("zeroshot", "adabn") and trainer.prompt_lr == trainer.affine_lr == 0:
            raise ValueError(
                f"nothing to train: of prompt_lr={self.training.prompt_lr} and "
                f"affine_lr={self.training.affine_lr} none is positive for "
                f"train={self.method.train!r}"
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
        if options.get("method", "ueo") in EPS_USERS:
            values["eps"] = 1e-5
        if options.get("dataset") == "domainnet":
            values["epochs"] = 5
        return values

    def check_files(self) -> None:
        """Check what can be seen without loading anything.

        Raises:
            OSError, ValueError: as :meth:`DataOptions.check_files`, or ``out`` is in use.
        """
        from ueo_fast.finetune.files.run_folder import RunFolder

        if self.output.resume:
            assert self.output.out is not None
            RunFolder.open(self.output.out)
            return
        if self.output.out is not None:
            RunFolder.check_free(Path(self.output.out))
        self.data.check_files()

    @property
    def trainer(self) -> TrainerConfig:
        """``training``, with a learning rate of 0 for what ``train`` leaves out."""
        if self.method.train == "affine":
            return replace(self.training, prompt_lr=0.0)
        if self.method.train == "prompt":
            return replace(self.training, affine_lr=0.0)
        return self.training

    @property
    def evaluation(self) -> ImagePass:
        """How images are evaluated."""
        return self.training.image_pass(self.speed.eval_batch_size)

    def as_dict(self) -> dict[str, Any]:
        """What ``--config`` reads back; without ``out`` and ``resume``, so that a rerun gets its
        own folder."""
        return flat(self, without=_OWN)

    @classmethod
    def read(cls, folder: RunFolder) -> FinetuneConfig:
        """The inverse of :meth:`as_dict`: a run's own options, from its ``config.json``.

        Raises:
            BrokenFileError: an option is missing, unknown (of another version), or has a value that
                it cannot have; the message names the file and the option.
        """
        return folder.read_json(CONFIG, rebuild(cls, without=_OWN))

    def resumed(self, folder: RunFolder) -> FinetuneConfig:
        """The options of the run in ``folder``; others given with ``--resume`` must agree.

        Raises:
            ValueError: one does not.
        """
        own, given = self.read(folder).as_dict(), self.as_dict()
        default = build(FinetuneConfig, {"resume": True, "out": self.output.out}).as_dict()
        # Where copies of images are kept changes no result.
        own |= {n: given[n] for n in ("cache", "cache_limit") if given[n] != default[n]}
        for name, value in given.items():
            # A model that moved has another name; it is known by its fingerprint.
            if name not in ("model", "pretrained") and value not in (own[name], default[name]):
                raise ValueError(
                    f"{name}={value!r} differs from {own[name]!r}, which {folder.path} was started "
                    "with: a resumed run keeps its options, so leave it out, or start another run"
                )
        return build(FinetuneConfig, {**own, "out": self.output.out})

    def command(self) -> str:
        """The shortest command that gives the same run; without ``--out``."""
        return shortest_command("finetune", self, without=_OWN)
