"""Command lines and YAML files: what wins, what is refused and in which words."""

import ast
import dataclasses
import re
import sys
from inspect import cleandoc, getsource
from pathlib import Path

import pytest
import yaml

from dbdist.cli import COMMANDS, main
from dbdist.config.config import Config
from dbdist.config.parse import parse_config
from dbdist.config.sections import classes_of, keys_of, nested_sections
from dbdist.config.yaml_files import write_yaml
from dbdist.errors import ConfigError
from dbdist.parallel.agreement import flat

ROOT = Path(__file__).parent.parent
CLASSES = classes_of({})
KINDS = [Config, *(kind for _, kind in nested_sections(CLASSES))]
DEFAULTS = {
    key: "null" if value is None else str(value)
    for key, value in flat(dataclasses.asdict(Config())).items()
}


def parse(*words):
    return parse_config("dbdist test", "", list(words))


@pytest.fixture
def yaml_file(tmp_path):
    """Writes text to a file and gives its path."""

    def write(text, name="config.yaml"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


# -- what wins -------------------------------------------------------------------------------------


def test_no_words_mean_the_defaults():
    assert parse() == Config()


def test_options_win_over_yaml_and_later_files_over_earlier_ones(yaml_file):
    first = yaml_file(
        "seed: 1\ntrain: {lr: 0.1, eps: 1e-6}\ndata: {augment: {flip: true}}\n", "1.yaml"
    )
    second = yaml_file("train: {lr: 0.2}\n", "2.yaml")
    config = parse("--config", first, "--config", second, "--train.max_steps", "7")
    assert (config.seed, config.train.lr, config.train.eps) == (1, 0.2, 1e-6)
    assert config.train.max_steps == 7
    assert config.data.augment.flip
    assert config.train.batch_size == Config().train.batch_size
    assert parse("--config", first, "--train.lr=0.5").train.lr == 0.5
    assert parse("--seed", "3", "--seed", "4").seed == 4


def test_a_runs_own_file_comes_first(yaml_file):
    own = ["--config", yaml_file("seed: 1\ntrain: {lr: 0.1}\n")]
    config = parse_config("dbdist test", "", ["--train.lr", "0.3"], first=own)
    assert (config.seed, config.train.lr) == (1, 0.3)


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("--model.layers_per_block=[1,2,3]", (1, 2, 3)),
        ("--model.layers_per_block=null", None),
        ("--train.betas=[0.8, 0.95]", (0.8, 0.95)),
        ("--sampler.readout=all", "all"),
        ("--sampler.readout=[0,2]", (0, 2)),
        ("--train.clip_norm=null", None),
        ("--train.max_steps=null", None),
        ("--train.lr=1e-4", 1e-4),
        ("--train.lr=1", 1.0),
        ("--data.augment.flip=true", True),
        ("--data.augment.flip=false", False),
        ("--eval.drop_last=True", True),
        ("--checkpoint.resume=false", False),
        ("--checkpoint.resume=null", None),
        ("--noise.p_mean=-1.2", -1.2),
        ("--seed=-5", -5),
        ("--run_dir=5", "5"),
    ],
)
def test_a_word_becomes_a_value_of_its_type(word, value):
    result = parse(word)
    for name in word[2:].partition("=")[0].split("."):
        result = getattr(result, name)
    assert result == value
    assert type(result) is type(value)


def test_yaml_values_have_the_types_of_their_fields(yaml_file):
    text = """
    model: {layers_per_block: [1, 2], mlp_size: null}
    train: {betas: [0.5, 0.75], lr: 1e-4, clip_norm: null}
    sampler: {readout: [1, 0]}
    checkpoint: {resume: true}
    """
    config = parse("--config", yaml_file(cleandoc(text)))
    assert config.model.layers_per_block == (1, 2)
    assert config.model.mlp_size is None
    assert config.train.betas == (0.5, 0.75)
    assert (config.train.lr, config.train.clip_norm) == (1e-4, None)
    assert config.sampler.readout == (1, 0)
    assert config.checkpoint.resume is True


def test_a_bare_resume_means_true():
    assert parse().checkpoint.resume is None
    assert parse("--checkpoint.resume").checkpoint.resume is True
    config = parse("--checkpoint.resume", "--train.lr", "0.5")
    assert (config.checkpoint.resume, config.train.lr) == (True, 0.5)
    assert parse("--checkpoint.resume", "false").checkpoint.resume is False


# -- what is refused -------------------------------------------------------------------------------


def refusal(*words):
    with pytest.raises(ConfigError) as caught:
        parse(*words)
    return " ".join(str(caught.value).split())


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("train.lrr", "train.lr"),
        ("trian.lr", "train.lr"),
        ("lr", "train.lr"),
        ("num_blocks", "model.num_blocks"),
        ("model.num_block_s", "model.num_blocks"),
        ("data.augment.flop", "data.augment.flip"),
        ("flip", "data.augment.flip"),
        ("confg", "config"),
        ("run-dir", "run_dir"),
        ("parallel.sync-every", "parallel.sync_every"),
    ],
)
def test_an_unknown_option_names_the_nearest(given, nearest):
    assert refusal(f"--{given}", "1") == f"unknown option --{given}; did you mean --{nearest}?"


@pytest.mark.parametrize(
    ("text", "unknown", "nearest"),
    [
        ("sed: 1", "sed", "seed"),
        ("train: {lrr: 1}", "train.lrr", "train.lr"),
        ("trian: {lr: 1}", "trian", "train"),
        ("model: {lr: 1}", "model.lr", ""),
        ("data: {augment: {flop: true}}", "data.augment.flop", "data.augment.flip"),
        ("augment: {flip: true}", "augment", "data.augment"),
    ],
)
def test_an_unknown_yaml_key_or_section_names_the_nearest(yaml_file, text, unknown, nearest):
    message = refusal("--config", yaml_file(text))
    assert message.startswith(f"unknown key {unknown}")
    assert f"did you mean {nearest}" in message


@pytest.mark.parametrize("word", ["--model.num_block=3", "--train.max=3", "--run=x"])
def test_an_abbreviated_option_is_an_unknown_one(word):
    """A key is an interface: what an abbreviation means would change with the next key."""
    assert "did you mean" in refusal(word)


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("--train.lr=fast", "train.lr"),
        ("--train.lr=", "train.lr"),
        ("--train.max_steps=1.5", "train.max_steps"),
        ("--seed=one", "seed"),
        ("--mode=blocks", "mode"),
        ("--train.betas=[0.9]", "train.betas"),
        ("--train.betas=[0.9,0.9,0.9]", "train.betas"),
        ("--model.layers_per_block=[1,x]", "model.layers_per_block"),
        ("--model.layers_per_block=2", "model.layers_per_block"),
        ("--sampler.readout=first", "sampler.readout"),
        ("--data.augment.flip=1", "data.augment.flip"),
        ("--checkpoint.resume=maybe", "checkpoint.resume"),
        ("--train.lr", "train.lr"),
    ],
)
def test_a_wrong_type_is_refused_by_key_and_value(word, key):
    message = refusal(word)
    assert key in message
    assert word.partition("=")[2] in re.sub(r"[ ']", "", message)


@pytest.mark.parametrize(
    "text",
    ["train: {lr: fast}", "train: {lr: true}", "train: {lr: [1]}", "train: {lr: {a: 1}}"],
)
def test_a_wrong_type_in_yaml_is_refused_by_key(yaml_file, text):
    assert "train.lr" in refusal("--config", yaml_file(text))


@pytest.mark.parametrize(
    "text",
    ["train: 5", "train: [1]", "data: {augment: 3}", "model: words", "train: true"],
)
def test_a_section_that_is_no_section_is_refused_by_name(yaml_file, text):
    assert text.partition(":")[0] in refusal("--config", yaml_file(text))


@pytest.mark.parametrize(
    "content",
    [
        b"- 1\n",
        b"a: [\n",
        b"\0",
        b"\xff\xfe\x00",
        b"a: 1\n---\nb: 2\n",
        b"seed",
        b"{",
        b"a: *b",
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path, content):
    (tmp_path / "config.yaml").write_bytes(content)
    assert refusal("--config", str(tmp_path / "config.yaml"))


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path):
    assert "absent.yaml" in refusal("--config", str(tmp_path / "absent.yaml"))
    assert str(tmp_path) in refusal("--config", str(tmp_path))


def test_yaml_executes_nothing(tmp_path, yaml_file):
    apply = "!!python/object/apply:pathlib.Path"
    path = yaml_file(f"run_dir: {apply}.touch [{apply} [{tmp_path}/x]]")
    refusal("--config", path)
    assert not (tmp_path / "x").exists()


def test_a_stray_word_is_refused_by_name():
    assert "configs/digits.yaml" in refusal("configs/digits.yaml")


# -- files -----------------------------------------------------------------------------------------

UNUSUAL = [
    {"run_dir": "5", "seed": -3, "mode": "end_to_end", "device": "cpu"},
    {"run_dir": "a: b # c", "data.root": "null"},
    {"run_dir": "1e3", "data.root": "2024-01-01"},
    {"run_dir": "true", "data.root": " spaced ü "},
    {"model.layers_per_block": (1, 2, 3), "model.mlp_size": 7, "model.dropout": 1 / 3},
    {"model.init": "published", "data.name": "cifar100", "data.image_size": 16},
    {"data.augment.flip": True, "data.augment.crop_padding": 4, "data.num_workers": 2},
    {"noise.p_mean": -1.2, "noise.sigma_min": 1e-5, "noise.partition": "uniform"},
    {"task.weighting": "published", "task.condition_dropout": 0.1},
    {"sampler.readout": (0, 2), "sampler.sigma_start": 5.0, "sampler.num_steps": 12},
    {"sampler.readout": "all", "sampler.num_draws": 8, "sampler.start": "noise"},
    {"train.betas": (0.8, 0.95), "train.eps": 1e-10, "train.clip_norm": None, "train.lr": 1e-4},
    {"train.max_steps": 10, "train.epochs": 0.1 + 0.2, "train.precision": "bf16"},
    {"parallel.sync": "never", "parallel.outer_lr": 0.7, "parallel.timeout_s": 1e9},
    {"checkpoint.resume": True, "checkpoint.every_steps": 5},
    {"checkpoint.resume": False, "eval.drop_last": True, "eval.step": 100},
]


def changed(config, options):
    for key, value in options.items():
        *sections, name = key.split(".")
        owners = [config]
        for section in sections:
            owners.append(getattr(owners[-1], section))
        for owner, field in zip(reversed(owners), [name, *reversed(sections)], strict=True):
            value = dataclasses.replace(owner, **{field: value})
        config = value
    return config


@pytest.mark.parametrize("options", UNUSUAL)
def test_a_written_configuration_is_read_back_equal(tmp_path, options):
    config = changed(Config(), options)
    write_yaml(config, tmp_path / "config.yaml")
    assert parse("--config", str(tmp_path / "config.yaml")) == config
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


def test_a_written_configuration_holds_every_key(tmp_path):
    write_yaml(Config(), tmp_path / "config.yaml")

    def keys(values, prefix=""):
        for key, value in values.items():
            is_section = isinstance(value, dict)
            yield from keys(value, f"{prefix}{key}.") if is_section else [f"{prefix}{key}"]

    written = list(keys(yaml.safe_load((tmp_path / "config.yaml").read_text())))
    assert sorted(written) == sorted(keys_of(CLASSES))


CONFIGS = sorted(ROOT.glob("configs/**/*.yaml"))


def test_there_are_configurations_to_check():
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_documented_configuration_is_valid(path):
    parse("--config", str(path)).validate()


# -- help and exit codes ---------------------------------------------------------------------------


def help_of(capsys, monkeypatch, *words):
    monkeypatch.setenv("COLUMNS", "20000")
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_help_names_every_command(capsys, monkeypatch):
    text = help_of(capsys, monkeypatch, "--help")
    assert all(command in text and meaning in text for command, meaning in COMMANDS.items())


def documented():
    """Field name -> the texts under fields of that name, from the source."""
    texts = {}
    modules = {sys.modules[base.__module__] for kind in KINDS for base in kind.__mro__[:-1]}
    for node in (node for module in modules for node in ast.walk(ast.parse(getsource(module)))):
        if isinstance(node, ast.ClassDef):
            for field, after in zip(node.body, node.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr):
                    text = " ".join(ast.literal_eval(after.value).split())
                    texts.setdefault(ast.unparse(field.target), []).append(text)
    return texts


def test_help_of_train_lists_every_key_with_its_text_and_default(capsys, monkeypatch):
    text = help_of(capsys, monkeypatch, "train", "--help")
    lines = {}
    key = None
    for line in text[text.index("options:") :].splitlines():
        words = line.split()
        if words and words[0].startswith("--"):
            key = words[0][2:]
            lines[key] = ""
        if key:
            lines[key] += " " + " ".join(words)
    texts = documented()
    for key in keys_of(CLASSES):
        assert any(text in lines[key] for text in texts[key.rpartition(".")[2]]), key
        assert f"default: {DEFAULTS[key]}" in lines[key], key


@pytest.mark.parametrize(
    ("module", "words", "parts"),
    [
        ("dbdist.cli", ["nonsense"], ["nonsense"]),
        ("dbdist.train", ["--train.lr", "fast"], ["train.lr", "fast"]),
        ("dbdist.evaluate", ["--run_dir", "does/not/exist"], ["does/not/exist"]),
    ],
)
def test_a_mistake_ends_with_one_line_and_exit_code_2(machine, module, words, parts):
    if module == "dbdist.cli":
        job = machine.script("from dbdist.cli import main; main()", *words)
    else:
        job = machine.python(module, *words)
    assert job.wait(120) == 2
    (line,) = job.printed().splitlines()
    assert line.startswith("dbdist")
    assert "error: " in line
    assert all(part in line for part in parts)


@pytest.mark.parametrize(("words", "code"), [(["--help"], 0), ([], 2)])
def test_without_a_command_the_usage_is_shown(capsys, words, code):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == code
    assert "usage: dbdist COMMAND" in capsys.readouterr().out


def test_the_version_is_the_packages(capsys):
    from dbdist import __version__

    main(["--version"])
    assert capsys.readouterr().out.strip() == __version__
    assert f'version = "{__version__}"' in (ROOT / "pyproject.toml").read_text()
