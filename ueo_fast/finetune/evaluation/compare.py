"""`ueo-fast compare`: runs side by side, with mean and spread, and what cannot be compared."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ueo_fast.finetune.data.names import plural
from ueo_fast.finetune.evaluation.results_table import ResultsTable, doubts, escaped, verdict
from ueo_fast.finetune.files.records import BrokenFileError
from ueo_fast.finetune.files.run_files import (
    MEASURED,
    METRICS,
    PROBLEM,
    MetricsRecord,
    ProblemSummary,
)
from ueo_fast.finetune.files.run_folder import RunFolder

if TYPE_CHECKING:
    from ueo_fast.finetune.commands.options import CompareConfig

COLUMNS = {name: metric.heading for name, metric in METRICS.items() if name != "aupr"}
SAME = 1e-3
"""Zero-shot metrics that differ by less, a tenth of a point, differ by rounding."""

# Results under different values of these answer different questions.
_QUESTION = (
    *("data", "test_data", "dataset", "domain", "scenario"),
    *("model", "pretrained", "prompt_template", "mcm_scale"),
)
_QUESTION_PATHS = ("data", "test_data", "model", "pretrained")
_QUESTION_COUNTS = ("known", "unknown", "train_images", "test_images")  # of problem.json

# These change where and how fast a run goes, not what comes out but for rounding; the class list
# is compared by what is in it. All other options are settings, those of later versions included:
# what is not known is not averaged over.
_NOT_SETTINGS = {
    *("out", "resume", "config", "method", "seed", "classes", "data_root", "root", "check_counts"),
    *("workers", "device", "threads", "compile", "patch", "channels_last", "micro_batch_size"),
    *("eval_every", "eval_batch_size", "checkpoint_every", "strict", "tensorboard", "wandb"),
    *_QUESTION,
}


@dataclass(frozen=True)
class LeftOut:
    """A run that has nothing to compare.

    Attributes:
        run: the folder.
        reason: why, and what can be done about it.
    """

    run: Path
    reason: str


@dataclass(frozen=True)
class Outcome:
    """Metrics of one method at the end of one run, on one set of images.

    Attributes:
        run: the folder.
        record: the metrics, of the method or of the zero-shot model that the run started with.
        title: for people; says so where predictions were made during the adaptation.
        split: ``"test"`` or ``"train"`` images.
        question: what has to agree for numbers to be comparable.
        settings: what has to agree for two seeds of a method to be averaged.
    """

    run: Path
    record: MetricsRecord
    title: str
    split: str
    question: Mapping[str, Any]
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Group:
    """Runs whose numbers answer the same question.

    Attributes:
        title: what the images are.
        question: what the runs have in common.
        runs: their folders.
        verdict: a sentence about the best method; empty where none is adapted.
        table: methods against metrics, mean and spread over seeds.
        seeds: the same, one row per method and seed; ``None`` where no method has two.
    """

    title: str
    question: Mapping[str, Any]
    runs: tuple[Path, ...]
    verdict: str
    table: ResultsTable
    seeds: ResultsTable | None


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare_runs` found.

    Attributes:
        groups: at least one, in the order of the runs.
        differences: what the groups do not have in common, a sentence each.
        left_out: runs without numbers, with the reason.
        notes: what else a reader must know, a sentence each.
    """

    groups: tuple[Group, ...]
    differences: tuple[str, ...]
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...]

    def text(self) -> str:
        """Tables for a terminal."""
        parts = ["\n".join(self._remarks())]
        for group in self.groups:
            parts += [group.title, group.verdict, group.table.text()]
            if group.seeds is not None:
                parts += ["seed by seed", group.seeds.text()]
            parts.append(group.table.convention())
        return "\n\n".join(filter(None, parts))

    def markdown(self) -> str:
        """The same as GitHub tables."""
        # Two spaces at the end break a line.
        parts = ["  \n".join(f"> {line}" for line in self._remarks())]
        for group in self.groups:
            parts += [f"### {escaped(group.title)}", escaped(group.verdict), group.table.markdown()]
            if group.seeds is not None:
                parts += ["#### Seed by seed", group.seeds.markdown()]
            parts.append(group.table.convention())
        return "\n\n".join(filter(None, parts))

    def _remarks(self) -> list[str]:
        lines = [f"left out: {each.run}: {each.reason}" for each in self.left_out]
        lines += [f"note: {note}" for note in self.notes]
        if len({_frozen(group.question) for group in self.groups}) > 1:
            lines.append("these runs cannot be compared with each other in one table, because of")
            lines += [f"  {difference}" for difference in self.differences]
        return lines


def run(config: CompareConfig) -> None:
    """Print the tables."""
    comparison = compare_runs(config.runs)
    print(comparison.markdown() if config.markdown else comparison.text())


def compare_runs(paths: Iterable[str | os.PathLike[str]]) -> Comparison:
    """Compare runs of ``ueo-fast finetune``.

    Numbers are put into one table only where the data, the classes, the model and its weights, the
    prompt, the scale of the score and the numbers of images agree. Seeds are averaged only where
    all other options agree too; otherwise the rows of a method name what differs. The zero-shot
    model does not depend on the seed, so its row appears once and without a spread, unless the runs
    disagree about it.

    Args:
        paths: run folders; one that is named twice counts once.

    Raises:
        FileNotFoundError, NotADirectoryError: it is not the folder of a run.
        ValueError: no folder, a run of another kind, or none with metrics.
    """
    folders = list(dict.fromkeys(Path(os.path.normpath(path)) for path in paths))
    if not folders:
        raise ValueError("runs is empty: give at least one run folder")
    read = [_read(folder) for folder in folders]
    left_out = tuple(found for found in read if isinstance(found, LeftOut))
    outcomes = [each for found in read if not isinstance(found, LeftOut) for each in found]
    if not outcomes:
        reasons = "; ".join(f"{each.run}: {each.reason}" for each in left_out)
        raise ValueError(
            f"none of the {plural(len(folders), 'run')} has metrics to compare: {reasons}"
        )
    grouped: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        key = (_frozen(outcome.question), outcome.split)
        grouped.setdefault(key, []).append(outcome)
    questions = [group[0].question for group in grouped.values()]
    differing = _differing(questions)
    notes: list[str] = []
    groups = tuple(_group(group, questions, notes) for group in grouped.values())
    return Comparison(
        groups,
        tuple(f"{key}: {' / '.join(values)}" for key, values in differing.items()),
        left_out,
        tuple(dict.fromkeys(notes)),
    )


def _read(path: Path) -> list[Outcome] | LeftOut:
    """Of the zero-shot model and of the run's method, on test images and, where these are others,
    training images; or why there are none: no labels, not finished, damaged files."""
    folder = RunFolder.open(path)
    config = folder.read_config()
    try:
        problem = folder.read_json(PROBLEM, ProblemSummary)
        if not problem.labelled:
            return LeftOut(path, "its images have no labels, so it has no metrics")
        records = folder.read_json_lines(MEASURED, MetricsRecord)
    except FileNotFoundError as error:
        return LeftOut(path, f"it is not finished: there is no {Path(error.filename).name}")
    except OSError as error:
        return LeftOut(path, f"{error.filename} cannot be read ({error.strerror})")
    except BrokenFileError as error:
        return LeftOut(path, str(error))
    outcomes = _outcomes(path, config, problem, records)
    if not any(outcome.record.method == config["method"] for outcome in outcomes):
        return LeftOut(
            path,
            "it is not finished: there are no metrics from its end; go on with "
            f"ueo-fast finetune --resume --out {shlex.quote(str(path))}",
        )
    return outcomes


def _outcomes(
    path: Path,
    config: Mapping[str, Any],
    problem: ProblemSummary,
    records: Iterable[MetricsRecord],
) -> list[Outcome]:
    question = _question(config, problem)
    settings = {key: value for key, value in config.items() if key not in _NOT_SETTINGS}
    # A line that was written again by a resumed run replaces the first one.
    final = {
        (record.method, record.split): record
        for record in records
        if record.stage == ("before" if record.method == "zeroshot" else "after")
    }
    # Online predictions are of the training images, which may be the test images too.
    online = "train" if any(split == "train" for _, split in final) else "test"
    return [
        Outcome(
            run=path,
            record=record,
            title=f"{record.title}, online" if split == "online" else record.title,
            split=online if split == "online" else split,
            question=question,
            settings={} if method == "zeroshot" else settings,
        )
        for (method, split), record in final.items()
    ]


def _question(config: Mapping[str, Any], problem: ProblemSummary) -> dict[str, Any]:
    values = {key: config.get(key) for key in _QUESTION}
    for key in _QUESTION_PATHS:
        value = values[key]
        if isinstance(value, str):
            values[key] = os.path.normpath(value)
    if values["dataset"] is None:  # then it says nothing
        values["scenario"] = None
    return {**values, **{key: getattr(problem, key) for key in _QUESTION_COUNTS}}


def _group(
    outcomes: Sequence[Outcome], questions: Sequence[Mapping[str, Any]], notes: list[str]
) -> Group:
    question = outcomes[0].question
    before = [outcome for outcome in outcomes if outcome.record.method == "zeroshot"]
    adapted = [outcome for outcome in outcomes if outcome.record.method != "zeroshot"]
    zero_shot = _zero_shot(before, notes)
    rows, seeds = list(zero_shot), list(zero_shot)
    for label, members in _rows(adapted).items():
        once: dict[int, Outcome] = {}
        for outcome in members:
            seed = outcome.record.seed
            first = once.setdefault(seed, outcome)
            if first is not outcome:
                notes.append(
                    f"{outcome.run} repeats {first.run} ({label}, seed {seed}, the same settings) "
                    "and is left out"
                )
        title = f"{label} ({plural(len(once), 'seed')})"
        for seed, outcome in once.items():
            values = outcome.record.values
            found = doubts(classes=question["known"], auroc=values["auroc"])
            notes += [f"{outcome.run}: {text}" for text in found]
            rows.append({**values, "method": title})
            seeds.append({**values, "method": f"{label}, seed {seed}"})
    table = ResultsTable.from_records(rows, COLUMNS)
    return Group(
        title=_title(outcomes[0], questions),
        question=question,
        runs=tuple(dict.fromkeys(outcome.run for outcome in outcomes)),
        verdict=_verdict(table, [record["method"] for record in zero_shot]),
        table=table,
        seeds=ResultsTable.from_records(seeds, COLUMNS) if len(seeds) > len(table.rows) else None,
    )


def _verdict(table: ResultsTable, zero_shot: Sequence[str]) -> str:
    """The method of the highest HM (accuracy, where there is no HM) next to zero-shot, by means."""
    means = {
        method: {key: None if spread is None else spread.mean for key, spread in row.items()}
        for method, row in table.rows.items()
    }
    before = next((means[method] for method in zero_shot), None)
    adapted = {method: row for method, row in means.items() if method not in zero_shot}
    if not adapted:
        return ""
    key = "hm" if any(row["hm"] is not None for row in adapted.values()) else "per_class_accuracy"
    best = max(adapted, key=lambda method: adapted[method][key] or 0.0)
    of = f"Best of {len(adapted)} by {COLUMNS[key]}, {best}. " if adapted.keys() - {best} else ""
    return of + verdict(best, before, adapted[best])


def _zero_shot(outcomes: Sequence[Outcome], notes: list[str]) -> list[dict[str, Any]]:
    """One record, or one per seed where seeds disagree: every run measured the same model again."""
    by_seed: dict[int, Outcome] = {}
    for outcome in outcomes:
        first = by_seed.setdefault(outcome.record.seed, outcome)
        if not _same(first, outcome):
            notes.append(
                f"{first.run} and {outcome.run} are of the same images, model and seed, but have "
                "different zero-shot metrics: images or weights have changed between them; the "
                f"zero-shot row is that of {first.run}"
            )
    different = list(by_seed.values())
    if all(_same(different[0], outcome) for outcome in different[1:]):
        different = different[:1]
    else:
        notes.append(
            "the zero-shot metrics differ between seeds, though no seed plays a part in them: "
            "images or weights have changed between the runs"
        )
    return [{**outcome.record.values, "method": outcome.title} for outcome in different]


def _same(first: Outcome, second: Outcome) -> bool:
    pairs = [(getattr(first.record, key), getattr(second.record, key)) for key in COLUMNS]
    return all(
        one == other if None in (one, other) else abs(one - other) <= SAME for one, other in pairs
    )


def _rows(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """Outcomes by title, with the settings in which those of one title differ."""
    titles: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        titles.setdefault(outcome.title, []).append(outcome)
    rows: dict[str, list[Outcome]] = {}
    for title, members in titles.items():
        keys = _differing([outcome.settings for outcome in members])
        for outcome in members:
            values = ", ".join(f"{key}={outcome.settings.get(key)}" for key in keys)
            rows.setdefault(f"{title}, {values}" if values else title, []).append(outcome)
    return rows


def _differing(mappings: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Keys whose values are not all equal, with the different values as texts."""
    differing = {}
    for key in dict.fromkeys(key for mapping in mappings for key in mapping):
        values = [mapping.get(key) for mapping in mappings]
        if any(value != values[0] for value in values[1:]):
            differing[key] = list(dict.fromkeys(_shown(value, values) for value in values))
    return differing


def _shown(value: Any, others: Sequence[Any]) -> str:
    """A value; of a list of names how many, and the first few that not all of the others have."""
    if not isinstance(value, list | tuple):
        return str(value)
    names = [str(name) for name in value]
    common = set(names).intersection(
        *(map(str, other) for other in others if isinstance(other, list | tuple))
    )
    special = [name for name in names if name not in common]
    dots = ", ..." if len(special) > 3 else ""
    if special:
        return f"{len(value)} with {', '.join(special[:3])}{dots}"
    return f"{len(names)}, {names[0]} to {names[-1]}" if names else "0"


def _title(outcome: Outcome, questions: Sequence[Mapping[str, Any]]) -> str:
    """What the numbers are about, with all in which it differs from the other ``questions``."""
    question = outcome.question
    named = {"dataset", "domain", "scenario", "model", "pretrained"}
    if question["dataset"] is not None:
        where = f"{question['dataset']} {question['domain']}, {question['scenario']}"
    else:
        key = "test_data" if outcome.split == "test" and question["test_data"] else "data"
        named.add(key)
        where = str(question[key])
    kind = "test" if outcome.split == "test" else "training"
    words = [
        f"{where}: {plural(question[f'{outcome.split}_images'], f'{kind} image')}",
        f"{plural(len(question['known']), 'known class')} and {len(question['unknown'])} unknown",
        str(question["model"]) + (f" ({question['pretrained']})" if question["pretrained"] else ""),
    ]
    for key in _differing(questions):
        if key not in named:
            others = [other[key] for other in questions]
            words.append(f"{key} {_shown(question[key], others)}")
    return "; ".join(words)


def _frozen(question: Mapping[str, Any]) -> str:
    return repr(sorted(question.items()))
