"""Trains a tiny CLIP in forked children, which the test kills: ``kill_training.py``.

Reads one folder per line from its input, and forks a child that trains there, or goes on where an
earlier one was killed. Says ``started <pid>`` and, when the child has ended, ``ended <status>``.
Imports are paid once, in the parent.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from engine_problem import Remembering, infomax, make_classifier, make_images

from ueo_fast.finetune.clip.model import adapted_state
from ueo_fast.finetune.engine.checkpoint import SafetensorsCheckpoints
from ueo_fast.finetune.engine.hooks import Hooks, combine
from ueo_fast.finetune.engine.tracking import JsonLinesTracker
from ueo_fast.finetune.engine.trainer import TrainerConfig, train
from ueo_fast.finetune.files.run_folder import RunFolder
from ueo_fast.finetune.files.tensor_file import write_tensors

STEPS, STEPS_PER_EPOCH = 88, 4
CONFIG = TrainerConfig(
    epochs=STEPS // STEPS_PER_EPOCH,
    batch_size=3,
    prompt_lr=0.05,
    affine_lr=0.02,
    momentum=0.9,
    checkpoint_every=3,
    early_stop=STEPS,
)


def run(folder: Path) -> None:
    images, classifier = make_images(12), make_classifier()
    hooks = combine(
        JsonLinesTracker(RunFolder(folder)).hooks(),
        Hooks(checkpoints=SafetensorsCheckpoints(folder)),
    )
    objective = Remembering(infomax(images), len(images))
    train(classifier, images, objective, config=CONFIG, hooks=hooks)
    write_tensors(folder / "final.safetensors", adapted_state(classifier))


def main() -> None:
    torch.set_num_threads(1)  # no thread pool, which would not survive the fork
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                run(Path(line.strip()))
                status = 0
            finally:
                os._exit(status)  # none of the parent's buffers and handlers
        print(f"started {child}", flush=True)
        print(f"ended {os.waitpid(child, 0)[1]}", flush=True)


if __name__ == "__main__":
    main()
