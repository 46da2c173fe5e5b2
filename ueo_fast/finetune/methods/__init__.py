"""Adaptation methods behind one interface."""

from ueo_fast.finetune.methods.adabn import AdaBN
from ueo_fast.finetune.methods.base import LossMethod, Method
from ueo_fast.finetune.methods.entmin import EntMin
from ueo_fast.finetune.methods.infomax import InfoMax
from ueo_fast.finetune.methods.ueo import UEO
from ueo_fast.finetune.methods.zeroshot import ZeroShot

__all__ = ["UEO", "AdaBN", "EntMin", "InfoMax", "LossMethod", "Method", "ZeroShot"]
