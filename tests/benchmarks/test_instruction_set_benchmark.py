"""Measuring with a lower instruction set: all contenders keep to it, and what the docs count."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ueo_fast
from benchmarks import __main__, instruction_set, instructions
from ueo_fast import backends

ROOT = Path(__file__).resolve().parents[2]

needs_avx2 = pytest.mark.skipif(
    backends.cpu_capability() not in ("avx2", "avx512"), reason="the C++ loops have no AVX2 here"
)


def run(code, **variables):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **variables},
    )


@needs_avx2
def test_a_restricted_process_and_what_it_compiles_keep_to_avx2():
    done = run(
        "from benchmarks import instruction_set\n"
        "instruction_set.restrict('avx2')\n"
        "print(instruction_set.describe())\n"
        "from torch._inductor import cpp_builder, cpu_vec_isa\n"
        "options = cpp_builder.CppTorchOptions(vec_isa=cpu_vec_isa.pick_vec_isa())\n"
        "print(*options.get_cflags(), *options.get_passthrough_args())\n"
    )
    assert done.returncode == 0, done.stderr
    described, flags = done.stdout.splitlines()
    assert described in ("avx2", "avx2 (of a processor that has avx512)")
    assert "march=x86-64-v3" in flags.split()
    assert "-mavx2" in flags.split()
    assert "avx512" not in flags
    assert "native" not in flags


@pytest.mark.skipif(backends.cpu_capability() != "avx512", reason="this machine has no AVX-512")
def test_a_process_restricted_by_half_does_not_measure():
    done = run(
        "from benchmarks import instruction_set; instruction_set.verify()",
        UEO_FAST_CPU_CAPABILITY="avx2",
    )
    assert done.returncode != 0
    assert "instruction set avx2 was asked for, but this process runs PyTorch avx512" in done.stderr


def test_only_the_loss_is_measured_with_another_instruction_set(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "affine", "--instruction-set", "avx2"])
    monkeypatch.setattr(instruction_set, "restrict", lambda name: pytest.fail("too late"))
    with pytest.raises(SystemExit):
        __main__.main()
    assert "python -m benchmarks loss --instruction-set avx2" in capsys.readouterr().err


@needs_avx2
@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
def test_the_counted_loops_are_found_in_the_library():
    rows = instructions.rows(str(Path(ueo_fast.__file__).parent / "_cpu.so"))
    assert [row["loop"] for row in rows] == [loop.name for loop in instructions.LOOPS]
    for row in rows:
        kinds = sum(float(str(row[kind])) for kind in instructions.KINDS)
        assert 1 <= kinds <= float(str(row["instructions"])) + 0.1
    exponentials = rows[1]
    assert float(str(exponentials["multiply"])) >= 6  # two of the reduction, two terms, and power
