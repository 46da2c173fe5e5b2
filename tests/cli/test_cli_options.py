"""What the user typed arrives, from a command line and from files; what cannot work is refused."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import get_args

import pytest
import yaml

from ueo_fast.cli.flags import parse
from ueo_fast.cli.option_file import MOST_BYTES
from ueo_fast.finetune.commands.finetune_config import FinetuneConfig, MethodName
from ueo_fast.finetune.commands.options import (
    CompareConfig,
    EvaluateConfig,
    ReportConfig,
    ScoreConfig,
)
from ueo_fast.finetune.declared_options import flat, options_of
from ueo_fast.finetune.demo.config import DemoConfig
from ueo_fast.finetune.engine.training_config import ImagePass, TrainerConfig
from ueo_fast.finetune.methods import METHODS, option_defaults

NEEDED = ("--data", "d", "--classes", "c")
ODD_TEXTS = [
    *("1e3", "-1e3", "010", "0x10", "1_000", "1.0", ".5", ".inf", "NaN", "12:30:00", "2024-01-01"),
    *("no", "yes", "true", "off", "null", "~", "None", "#x", "a #b", "a: b", "[a]", "{a: b}"),
    *("-x", "'q'", '"q"', "''", "*a", "&a", "!t x", "@file", "%x", "`x`", "|", ">", "- x", "?"),
    *("=", "==x", "a=b", "<<", " x ", "größe", "a\tb", "\\n", "${x}", "--"[:1], "\U0001f4f7"),
]


def config_of(*words: str) -> FinetuneConfig:
    return parse(FinetuneConfig, [*NEEDED, *words], prog="ueo-fast finetune", description="")


def finetune(*words: str) -> SimpleNamespace:
    """The options, by the name of their flag."""
    return SimpleNamespace(**flat(config_of(*words)))


def refused(capsys, *words: str, config=FinetuneConfig, needed=NEEDED) -> str:
    with pytest.raises(SystemExit) as exit_:
        parse(config, [*needed, *words], prog="ueo-fast", description="")
    assert exit_.value.code == 2
    message, hint = capsys.readouterr().err.rsplit("\n(", 1)
    assert hint == "ueo-fast --help explains)\n"
    assert len(message) < 600
    return message


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_a_text_arrives_as_it_was_typed(text):
    for field in ("out", "data", "wandb", "domain", "prompt_template"):
        flag = "--" + field.replace("_", "-")
        if field in ("domain", "prompt_template"):  # not without other options
            continue
        assert getattr(finetune(flag, text), field) == text
        assert getattr(finetune(f"{flag}={text}"), field) == text


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_a_text_in_a_file_arrives_as_it_was_written(text, tmp_path):
    path = tmp_path / "options"
    path.write_text(json.dumps({"out": text}))
    assert finetune("--config", str(path)).out == text
    path.write_text(yaml.safe_dump({"out": text}, allow_unicode=True), encoding="utf-8")
    assert finetune("--config", str(path)).out == text


@pytest.mark.parametrize(
    ("written", "text"),
    [
        *((word, word) for word in ("2024-01-01", "010", "0x10", "1_000", "1e3", "yes", "No")),
        *((word, word) for word in ("off", "true", "12:30:00", ".inf", "3.10", "=")),
        *((f"'{word}'", word) for word in ("null", "~", "#x")),
        *((word, None) for word in ("null", "~", "", "NULL", "#x")),
    ],
)
def test_yaml_does_not_choose_the_type(written, text, tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text(f"wandb: {written}\nepochs: 3\n")
    config = finetune("--config", str(path))
    assert (config.wandb, config.epochs) == (text, 3)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("-1", -1.0), ("-1e-3", -1e-3), ("-.5", -0.5), ("-1.e+3", -1e3), ("1E3", 1e3)),
        *(("+1", 1.0), ("1.", 1.0), ("1_000", 1000.0), ("010", 10.0), ("0x10", 16.0), ("-0", 0.0)),
    ],
)
def test_numbers_in_all_spellings(text, value, tmp_path):
    assert finetune("--trade-off", text).trade_off == value
    assert finetune(f"--trade-off={text}").trade_off == value
    for name, content in (("a.yaml", f"trade_off: {text}"), ("b.yaml", f"trade-off: '{text}'")):
        (tmp_path / name).write_text(content)
        assert finetune("--config", str(tmp_path / name)).trade_off == value


@pytest.mark.parametrize("text", ["20", "2e1", "20.0", "+20", "0x14", "2_0", "020"])
def test_whole_numbers_in_all_spellings(text):
    assert finetune("--epochs", text).epochs == 20


@pytest.mark.parametrize("text", ["inf", "-inf", "nan", "1e400", "1,5", "true", "null", "9" * 5000])
def test_what_is_no_finite_number(text, capsys, tmp_path):
    assert "--trade-off: expected a finite number" in refused(capsys, "--trade-off", text)
    (tmp_path / "c.json").write_text(json.dumps({"trade_off": text}))
    wanted = "trade_off: expected a finite number"
    assert wanted in refused(capsys, "--config", str(tmp_path / "c.json"))


def test_a_switch_does_not_swallow_the_word_after_it():
    config = parse(CompareConfig, ["--markdown", "a", "b"], prog="", description="")
    assert (config.runs, config.markdown) == (("a", "b"), True)
    config = parse(CompareConfig, ["a", "--markdown", "off", "b"], prog="", description="")
    assert (config.runs, config.markdown) == (("a", "b"), False)


@pytest.mark.parametrize("words", ["--run a", "a", "--run=a", "--out x --run a", "--out x a"])
def test_a_run_is_named_with_and_without_the_flag(words):
    assert parse(ReportConfig, words.split(), prog="", description="").run == "a"
    assert parse(EvaluateConfig, words.replace("x", "x.csv").split(), prog="", description="").run


@pytest.mark.parametrize("words", ["a b", "--runs a b", "--run a --run b", "a --run b"])
def test_runs_are_named_with_and_without_the_flag(words):
    assert parse(CompareConfig, words.split(), prog="", description="").runs == ("a", "b")


def test_a_run_that_is_named_twice_or_not_at_all(capsys):
    said = refused(capsys, "a", "--run", "b", config=ReportConfig, needed=())
    assert "run is given twice" in said
    said = refused(capsys, config=ScoreConfig, needed=())
    assert "required: --run, --data, --out" in said


# ---- Files --------------------------------------------------------------------------------------


def test_flags_win_over_files_wherever_they_stand(tmp_path):
    for name, values in (("a", {"epochs": 3, "seed": 4}), ("b", {"seed": 5, "eps": 0.1})):
        (tmp_path / name).write_text(json.dumps(values))
    files = ["--config", str(tmp_path / "a"), "--config", str(tmp_path / "b")]
    config = finetune("--eps", "0.2", *files, "--epochs", "9")
    assert (config.epochs, config.seed, config.eps) == (9, 5, 0.2)


def test_what_is_printed_is_read_back(tmp_path, capsys):
    wanted = ["--out", "no", "--wandb", "null", "--trade-off", "-1e-3", "--early-stop", "3"]
    with pytest.raises(SystemExit) as exit_:
        finetune(*wanted, "--print_config")
    assert exit_.value.code == 0
    (tmp_path / "c.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    read = parse(FinetuneConfig, ["--config", str(tmp_path / "c.yaml")], prog="", description="")
    assert read == config_of(*wanted)


BOMB = "a: &a [x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(20)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 20_000, "nested too deeply"),
        ("epochs: " + "[" * 20_000, "nested too deeply"),
        ('{"epochs":' * 5_000, "nested too deeply"),
        ("{" * 20_000, "nested too deeply"),
        (BOMB, "b: an option has one value or a list of values"),
        (BOMB.replace("b: ", "seed: ", 1).partition("\n")[2], "undefined alias"),
        ("epochs: &a [*a]", "epochs: an option has one value or a list of values"),
        ("epochs: " + "9" * 5000, "got '99999999"),
        ('{"epochs": ' + "9" * 5000 + "}", "got '99999999"),
        ("epochs: 1e400", "epochs: expected a whole number, got '1e400'"),
        ("x: y\n" * MOST_BYTES, "more than 100000 bytes"),
        ("epochs: 1\nepochs: 2", "epochs is there twice"),
        ('{"epochs": 1, "epochs": 2}', "epochs is there twice"),
        ('{"epochs": {"a": 1}}', "epochs: an option has one value"),
        ('{"epochs": [[1]]}', "epochs: an option has one value"),
        ("epochs: [1, 2]", "epochs: expected a whole number, got a list"),
        ("epochs:", "epochs: expected a whole number, got nothing"),
        ("strict: maybe", "strict: expected true or false, got 'maybe'"),
        ("method: uoe", "method: expected one of zeroshot, ueo"),
        ("epoch: 1", "unknown option 'epoch'"),
        ("? [a, b]\n: 1", "an option has one value"),
        ("preset: [authors]", "preset: expected one of authors"),
        ("preset: author", "preset: expected one of authors"),
        ("out: !!python/object/apply:os.system ['x']", "got a list"),
        ("out: !!python/name:os.system x", "tag:yaml.org,2002:python/name:os.system is not"),
        ("out: !x y", "the tag !x is not allowed"),
        ('{"out": "a\\u0000b"}', "out: expected a text"),
        ("- epochs", "not a table of options"),
        ("epochs", "not a table of options"),
        ("17", "not a table of options"),
        ("epochs: 'x", "neither JSON nor YAML"),
        ("\x00\x01", "neither JSON nor YAML"),
        (b"\xff\xfeepochs", "not UTF-8"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else None,
)
def test_a_file_that_is_no_table_of_options(content, message, tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    said = refused(capsys, "--config", str(path))
    assert f"config={str(path)!r}: " in said
    assert message in said


def test_a_file_that_is_not_there(tmp_path, capsys):
    assert "No such file" in refused(capsys, "--config", str(tmp_path / "none.yaml"))
    assert "Is a directory" in refused(capsys, "--config", str(tmp_path))
    assert "more than" in refused(capsys, "--config", "/dev/zero")


def test_files_may_be_empty_or_begin_with_a_mark(tmp_path):
    (tmp_path / "a").write_text("")
    (tmp_path / "b").write_text("\ufeffepochs: 3", encoding="utf-8")
    assert finetune("--config", str(tmp_path / "a")) == finetune()
    assert finetune("--config", str(tmp_path / "b")).epochs == 3


# ---- What cannot work ---------------------------------------------------------------------------

CONFIGS = {
    FinetuneConfig: NEEDED,
    DemoConfig: (),
    EvaluateConfig: ("--run", "r"),
    ScoreConfig: ("--run", "r", "--data", "d", "--out", "x.csv"),
}
HOPELESS = {int: ["1e30", "1" + "0" * 29, "-1"], float: ["1e40", "1e-40", "inf", "nan", "-1e40"]}
NUMBERS = [
    (config, option.name, text)
    for config in CONFIGS
    for option in options_of(config).values()
    for text in HOPELESS.get(option.kind, [])
    # A weight of 1e-40 is as good as 0, which is allowed.
    if (option.name, text) != ("trade_off", "1e-40") and option.name not in ("momentum", "severity")
]


@pytest.mark.parametrize(
    ("config", "name", "text"), NUMBERS, ids=lambda value: getattr(value, "__name__", value)
)
def test_no_number_option_takes_what_cannot_work(config, name, text, capsys):
    flag = "--" + name.replace("_", "-")
    said = refused(capsys, f"{flag}={text}", config=config, needed=CONFIGS[config])
    assert name in said.replace("-", "_")
    assert "resume" not in said


def test_every_number_option_is_tried():
    assert {name for config, name, _ in NUMBERS if config is FinetuneConfig} >= {
        *("mcm_scale", "eps", "trade_off", "top_k", "epochs", "batch_size", "prompt_lr", "seed"),
        *("affine_lr", "weight_decay", "micro_batch_size", "workers", "threads", "eval_every"),
        *("eval_batch_size", "checkpoint_every", "early_stop"),
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--workers 100000000", "workers must be at most 1,024, got 100000000"),
        ("--threads 0", "threads must be at least 1, got 0"),
        ("--trade-off 1e31", "trade_off must be from -1e+06 to 1e+06, got 1e+31"),
        ("--prompt-lr 0 --affine-lr 0", "nothing to train"),
        ("--train affine --affine-lr 0", "nothing to train: of prompt_lr=0.0001 and affine_lr=0.0"),
        ("--train prompt --prompt-lr 0 --method upl", "nothing to train"),
        ("--method tent --affine-lr 0", "affine_lr is 0, but tent trains"),
        ("--momentum 1", "momentum must lie in [0, 1), got 1.0"),
    ],
)
def test_what_cannot_work_is_said_with_the_range_or_the_reason(words, message, capsys):
    assert message in refused(capsys, *words.split())


# ---- Methods and presets ------------------------------------------------------------------------


def test_the_options_know_which_methods_use_them():
    assert set(get_args(MethodName)) == set(METHODS)
    known = {
        option.name: option.metadata["methods"]
        for option in options_of(FinetuneConfig).values()
        if "methods" in option.metadata
    }
    assert set(known) == {"confidence", "eps", "trade_off", "top_k"}
    for name, users in known.items():
        option = {"top_k": "k"}.get(name, name)
        assert set(users) == {key for key, of in METHODS.items() if option in option_defaults(of)}


def test_the_preset_of_the_authors():
    config = finetune("--preset", "authors")
    assert (config.eps, config.affine_scope, config.seed) == (1e-5, "authors", 2023)
    assert (config.epochs, config.logit_scale, config.decode) == (50, 100.0, "full")
    assert finetune("--preset", "authors", "--decode", "auto").decode == "auto"
    config = finetune("--seed", "3", "--preset", "authors", "--eps", "0")
    assert (config.eps, config.affine_scope, config.seed) == (0.0, "authors", 3)
    assert finetune("--preset", "authors", "--method", "upl").eps == 0  # has no use for it
    words = "--dataset domainnet --domain sketch --root r --preset authors"
    domainnet = parse(FinetuneConfig, words.split(), prog="", description="")
    assert domainnet.training.epochs == 5
    domainnet = parse(FinetuneConfig, [*words.split(), "--epochs=9"], prog="", description="")
    assert domainnet.training.epochs == 9


def test_a_preset_and_a_file(tmp_path, capsys):
    (tmp_path / "c").write_text(json.dumps({"eps": 0.5, "seed": 7}))
    config = finetune("--preset", "authors", "--config", str(tmp_path / "c"))
    assert (config.eps, config.seed) == (1e-5, 2023)
    (tmp_path / "c").write_text(json.dumps({"eps": 0.5, "preset": "authors"}))
    config = finetune("--config", str(tmp_path / "c"))
    assert (config.eps, config.seed) == (0.5, 2023)
    assert "invalid choice" in refused(capsys, "--preset", "author")
    (tmp_path / "c").write_text(json.dumps({"preset": "author"}))
    assert "preset" in refused(capsys, "--config", str(tmp_path / "c"))


def test_a_run_remembers_the_values_of_a_preset(tmp_path):
    """So that it is resumed, and run again, without naming it."""
    config = config_of("--preset", "authors")
    (tmp_path / "config.json").write_text(json.dumps(config.as_dict()))
    again = ["--config", str(tmp_path / "config.json")]
    assert parse(FinetuneConfig, again, prog="", description="") == config
    assert "--affine-scope authors --logit-scale 100.0 --eps 1e-05 --seed 2023" in config.command()


# ---- Parts --------------------------------------------------------------------------------------


def test_the_training_is_the_trainers_own_config():
    config = config_of("--workers", "3", "--epochs", "7", "--precision", "bf16", "--seed", "5")
    wanted = TrainerConfig(num_workers=3, epochs=7, precision="bf16", seed=5)
    assert config.training == config.trainer == wanted
    assert config_of("--train", "affine").trainer.prompt_lr == 0
    assert config_of("--train", "prompt").trainer.affine_lr == 0
    assert "--workers 3" in config.command()


def test_a_message_names_the_flag_and_not_the_field(capsys):
    assert refused(capsys, "--workers", "-1") == "ueo-fast: workers must be at least 0, got -1"


def test_evaluation_runs_images_as_training_does():
    config = config_of("--eval-batch-size", "5", "--channels-last", "--precision", "bf16")
    wanted = ImagePass(batch_size=5, num_workers=2, precision="bf16", channels_last=True)
    assert config.evaluation == wanted


def test_options_are_flat_however_they_are_grouped():
    values = config_of().as_dict()
    assert not any(isinstance(value, dict) for value in values.values())
    assert {"data", "model", "method", "epochs", "workers", "device", "eval_every"} <= set(values)
    assert not {"out", "resume", "shuffle", "num_workers", "training"} & set(values)
    assert "channels_last" not in options_of(ScoreConfig)
