"""What is known about the paper's data sets: domains, numbers of images, where to get them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True)
class DataSet:
    """A data set of several domains.

    Attributes:
        title: as it is written.
        counts: images by domain, (all, all), or (train, test) where ``split``. The domains are
            called, and ordered, as in the authors' code.
        split: training and test images are different ones, told apart by two lists.
        source: where to get it.
        aliases: other names of domains and their folders, without spaces and capitals.
    """

    title: str
    counts: Mapping[str, tuple[int, int]]
    split: bool
    source: str
    aliases: Mapping[str, str]

    def list_names(self, domain: str) -> tuple[tuple[str, str], ...]:
        """List files of ``domain``, for training and test, as the authors call them; Office-31's
        are ``amazon/images_list.txt`` in their code and ``amazon_list.txt`` elsewhere."""
        if self.split:
            return ((f"{domain}_train.txt", f"{domain}_test.txt"),)
        names = (f"{domain}_list.txt", f"{domain}/images_list.txt")
        return tuple((name, name) for name in names)


DATA_SETS: dict[str, DataSet] = {
    "office31": DataSet(
        title="Office-31",
        counts={"amazon": (2817, 2817), "dslr": (498, 498), "webcam": (795, 795)},
        split=False,
        source="https://faculty.cc.gatech.edu/~judy/domainadapt/",
        aliases={},
    ),
    "officehome": DataSet(
        title="Office-Home",
        counts={
            "Art": (2427, 2427),
            "Clipart": (4365, 4365),
            "Product": (4439, 4439),
            "RealWorld": (4357, 4357),
        },
        split=False,
        source="https://www.hemanthdv.org/officeHomeDataset.html",
        aliases={"real": "RealWorld"},
    ),
    "visdac": DataSet(
        title="VisDA-C",
        counts={"train": (152397, 152397), "validation": (55388, 55388)},
        split=False,
        source="https://github.com/VisionLearningGroup/taskcv-2017-public/tree/master/classification",
        aliases={"val": "validation"},
    ),
    "domainnet": DataSet(
        title="DomainNet (cleaned version)",
        counts={
            "clipart": (33525, 14604),
            "infograph": (36023, 15582),
            "painting": (50416, 21850),
            "quickdraw": (120750, 51750),
            "real": (120906, 52041),
            "sketch": (48212, 20916),
        },
        split=True,
        source="http://ai.bu.edu/M3SDA/",
        aliases={},
    ),
}
"""By the names that :data:`ueo_fast.finetune.data.shifts.BENCHMARKS` has.

Sources: the publishers' pages; counts of DomainNet's lists as in the TensorFlow Datasets catalogue.
"""


@cache
def class_names(dataset: str) -> tuple[str, ...]:
    """All classes of a key of :data:`DATA_SETS`, in the authors' order (their ``demo.py``)."""
    path = files("ueo_fast.finetune.data") / "classes" / f"{dataset}.txt"
    lines = path.read_text(encoding="utf-8").splitlines()
    return tuple(line for line in lines if not line.startswith("#"))
