"""Adaptation methods behind one interface."""

from ueo_fast.finetune.methods.adabn import AdaBN
from ueo_fast.finetune.methods.base import LossMethod, Method
from ueo_fast.finetune.methods.dance import DANCE
from ueo_fast.finetune.methods.entmin import EntMin
from ueo_fast.finetune.methods.infomax import InfoMax
from ueo_fast.finetune.methods.oracle import Oracle
from ueo_fast.finetune.methods.pouf import POUF
from ueo_fast.finetune.methods.registry import METHODS, make_method
from ueo_fast.finetune.methods.tent import Tent
from ueo_fast.finetune.methods.ueo import UEO
from ueo_fast.finetune.methods.upl import UPL
from ueo_fast.finetune.methods.zeroshot import ZeroShot

__all__ = [
    "DANCE",
    "METHODS",
    "POUF",
    "UEO",
    "UPL",
    "AdaBN",
    "EntMin",
    "InfoMax",
    "LossMethod",
    "Method",
    "Oracle",
    "Tent",
    "ZeroShot",
    "make_method",
]
