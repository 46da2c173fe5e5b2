"""Methods by name, with the options of all of them."""

from __future__ import annotations

import dataclasses
import re

import pytest

from ueo_fast.finetune.methods import (
    DANCE,
    METHODS,
    POUF,
    UEO,
    UPL,
    AdaBN,
    EntMin,
    InfoMax,
    Oracle,
    Tent,
    ZeroShot,
    make_method,
)

ALL = {UEO, InfoMax, EntMin, UPL, POUF, DANCE, Tent, AdaBN, ZeroShot, Oracle}

DEFAULTS = {"trade_off": 1.0, "confidence": "zeroshot", "mcm_scale": 1.0, "eps": 0.0, "k": 16}
"""What a command line gives that asks for all the options, and was told nothing."""


def test_every_method_is_there_once():
    assert set(METHODS.values()) == ALL
    assert len(METHODS) == len(ALL)
    assert all(method.name == name for name, method in METHODS.items())
    assert len({method.title for method in ALL}) == len(ALL)
    assert next(iter(METHODS)) == "zeroshot"


@pytest.mark.parametrize("name", METHODS)
def test_defaults_make_every_method(name):
    assert make_method(name) == METHODS[name]()
    assert make_method(name, **DEFAULTS) == METHODS[name]()


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_frozen_values(name):
    method = make_method(name)
    assert hash(method) == hash(make_method(name))
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.eps = 1.0


def test_one_name_means_one_thing():
    """A default that differs between methods would be overruled by the other's."""
    seen = {}
    for method in METHODS.values():
        for field in dataclasses.fields(method):
            assert field.default is not dataclasses.MISSING
            assert seen.setdefault(field.name, field.default) == field.default, field.name


def test_options_reach_the_method_that_has_them():
    options = {**DEFAULTS, "eps": 1e-5}
    assert make_method("ueo", **{**options, "trade_off": 2, "confidence": "online"}) == UEO(
        trade_off=2, confidence="online", eps=1e-5
    )
    assert make_method("tent", **options) == Tent(eps=1e-5)
    assert make_method("dance", temperature=0.1, **options) == DANCE(temperature=0.1, eps=1e-5)
    assert make_method("upl", **{**DEFAULTS, "k": 4}) == UPL(4)


@pytest.mark.parametrize(
    ("name", "option", "value", "users"),
    [
        ("upl", "eps", 1e-5, "tent, entmin, infomax, pouf, dance, ueo, oracle"),
        ("tent", "trade_off", 2.0, "infomax, ueo, oracle"),
        ("pouf", "trade_off", 0.3, "infomax, ueo, oracle"),
        ("infomax", "confidence", "online", "ueo"),
        ("ueo", "k", 8, "upl"),
        ("zeroshot", "mcm_scale", 100.0, "ueo"),
    ],
)
def test_an_option_in_vain_is_refused(name, option, value, users):
    message = f"method={name!r} has no use for {option}={value!r} (used by {users})"
    with pytest.raises(ValueError, match=re.escape(message)):
        make_method(name, **{**DEFAULTS, option: value})


def test_unknown_names_are_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"method='uoe' is unknown: choose one of .*upl.*ueo"):
        make_method("uoe")
    with pytest.raises(TypeError, match=r"no method has the option 'lamda': .*trade_off"):
        make_method("ueo", lamda=1)
    with pytest.raises(ValueError, match="k must be at least 1"):
        make_method("upl", k=0)
