"""The choices of a fine-tuning run as one config: which go together, and what is made of them."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ueo_fast.finetune.clip.template import split_template
from ueo_fast.finetune.commands.finetune_options import EPS_USERS, FinetuneOptions
from ueo_fast.finetune.data import check_cache
from ueo_fast.finetune.engine.training_config import TrainerConfig
from ueo_fast.finetune.files.records import as_record
from ueo_fast.finetune.files.run_files import CONFIG
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


@dataclass(frozen=True)
class FinetuneConfig(FinetuneOptions):
    """Choices of ``ueo-fast finetune``.

    ``--preset authors`` sets what the authors' released code does otherwise, as far as it can be
    set.

    Raises:
        ValueError: a value outside its range, or choices that do not go together.
    """

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
        check_cache(self.cache, self.decode)
        if self.method == "zeroshot" and self.cache not in ("auto", "off"):
            raise ValueError(
                f"cache={self.cache!r} has no effect with method='zeroshot', which sees each image "
                "once: leave it out"
            )
        if self.cache_limit is None:
            return
        check_number("cache_limit", self.cache_limit, sign="positive")
        if self.cache == "off" or self.decode == "full" or self.method == "zeroshot":
            raise ValueError(
                f"cache_limit={self.cache_limit} has no effect with cache={self.cache!r}, "
                f"decode={self.decode!r} and method={self.method!r}, where no copies are kept: "
                "leave it out"
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
        from ueo_fast.finetune.data.image_list import read_images
        from ueo_fast.finetune.data.labels import read_class_names
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
        from ueo_fast.finetune.methods import METHODS, make_method, options_of

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
        return folder.read_json(CONFIG, as_record(cls, all_of=names))

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
