"""YAML, overrides, environment, flags, help and exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from elmo_ray import __main__, __version__
from elmo_ray.config import EvaluateConfig, ExportConfig, PrepareConfig, PretrainConfig, ReportConfig
from elmo_ray.config.command_line import VERBS, Flags, help_text, load_config, parse, run_verb
from elmo_ray.config.finetune import FinetuneConfig
from elmo_ray.config.schema import Root, keys
from elmo_ray.config.yaml_reader import parse_yaml
from elmo_ray.embed.config import EmbedConfig
from elmo_ray.errors import ConfigError, DataError
from elmo_ray.serve.config import ServeConfig
from elmo_ray.sweep.config import SweepConfig

ROOTS: dict[str, type[Root]] = {
    "prepare": PrepareConfig,
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
    "sweep": SweepConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "embed": EmbedConfig,
    "serve": ServeConfig,
    "report": ReportConfig,
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text("data:\n  train: text.txt\n  shuffle: off\noptim: {lr: 3e-4}\n", encoding="utf-8")
    return path


def mistakes(overrides: list[str], path: Path | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, PretrainConfig)
    return str(caught.value).split("\n")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("off", "off"), ("no", "no"), ("yes", "yes"), ("on", "on"), ("y", "y"),
        ("true", True), ("False", False), ("~", None), ("null", None), ("none", "none"), ("", None), ('"null"', "null"),
        ("3e-4", 3e-4), ("1e9", 1e9), ("1.", 1.0), (".5", 0.5), ("-1.5E+3", -1500.0), ("1_000", 1000), ("010", 10),
        ("0o10", "0o10"), ("1:30", "1:30"), ("2024-01-02", "2024-01-02"), ("1e", "1e"), ("'7'", "7"),
        ("[1, a, 2.5]", [1, "a", 2.5]), ("{a: {b: off}}", {"a": {"b": "off"}}),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    parsed = parse_yaml(text, "text")
    assert parsed == value and type(parsed) is type(value)


def test_defaults_then_file_then_overrides(file: Path) -> None:
    config = load_config(file, ["optim.lr=0.5", "data.streams=1_6", "train.validate_every=null"], PretrainConfig)
    assert config.optim.lr == 0.5 and config.data.streams == 16 and config.train.validate_every is None
    assert config.data.shuffle == "off" and config.data.train == ("text.txt",) and config.train.unroll == 20
    assert load_config(file, [], PretrainConfig).optim.lr == 3e-4


def test_overrides_are_read_by_field() -> None:
    config = load_config(
        None,
        [
            "data.train=*.txt", "data.test=[ab]*.txt", "data.valid=[a.txt, b.txt]", "run.name=2024",
            "data.vocab='null'", "data.prepared_dir=none", "train.duration=1e3 positions",
            "model.char_cnn.filters=[[1, 4], [2, 8]]", "optim.schedule={kind: linear, warmup_steps: 5}",
        ],
        PretrainConfig,
    )  # fmt: skip
    assert config.data.train == ("*.txt",) and config.data.test == ("[ab]*.txt",)
    assert config.data.valid == ("a.txt", "b.txt") and config.run.name == "2024"
    assert config.data.vocab == "null" and config.data.prepared_dir is None
    assert str(config.train.duration) == "1000 positions" and config.model.char_cnn.filters == ((1, 4), (2, 8))
    assert config.optim.schedule.kind == "linear" and config.optim.schedule.warmup_steps == 5


def test_none_is_null_where_it_is_no_value_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("data: {tokenizer: none, prepared_dir: none, max_vocab: None}\ntrain: {validate_every: none}\n")
    config = load_config(file, ["run.name=none", "data.valid=none"], PretrainConfig)
    assert config.data.tokenizer == "none" and config.run.name is None and config.data.valid == ()
    assert config.data.prepared_dir is config.data.max_vocab is config.train.validate_every is None
    assert PretrainConfig.from_dict(parse_yaml(config.to_yaml(), "again")) == config
    assert load_config(None, ["data.tokenizer=none"], PretrainConfig).data.tokenizer == "none"
    assert load_config(file, ["data.tokenizer=null"], PretrainConfig).data.tokenizer is None


def test_a_setting_that_moved_to_another_section(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("embed: {column: body}\n")
    assert load_config(file, [], EmbedConfig).data.column == "body"
    assert load_config(None, ["embed.column=words"], EmbedConfig).data.column == "words"
    assert caplog.text.count("embed.column is called data.column now") == 2
    file.write_text("embed: {column: body}\ndata: {column: text}\n")
    with pytest.raises(ConfigError, match="embed.column and data.column are one setting; remove embed.column"):
        load_config(file, [], EmbedConfig)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("optim.lrr=1", "unknown key optim.lrr; did you mean optim.lr?"),
        ("optim.lr=", "optim.lr= has no value"),
        ("run.name=", "run.name= has no value; run.name=null unsets it"),
        ("optim.lr=fast", "optim.lr=fast: must be a number > 0"),
        ("train.dropout=1.5", "train.dropout=1.5: must be a number >= 0 and < 1"),
        ("optim.lr=null", "optim.lr=null: must be a number > 0"),
        ("model.char_cnn.filters=[[1,", "model.char_cnn.filters=[[1, line 1:"),
    ],
)
def test_bad_override(override: str, line: str) -> None:
    (found,) = mistakes([override])
    assert found.startswith(line)


def test_several_mistakes_at_once(file: Path) -> None:
    lines = mistakes(["optim.lrr=1", "optim.lr=", "train.dropout=2", "data.vocab=${ELMO_TEST_UNSET}/v"], file)
    assert [line.split()[0] for line in lines] == [
        "unknown",
        "optim.lr=",
        "data.vocab=${ELMO_TEST_UNSET}/v:",
        "train.dropout=2:",
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"optim:\n  lr: 1\n  lr: 2\n", ["line 3", "lr is given twice"]),
        (b"optim: {lr: 1}\noptim: {lr: 2}\n", ["line 2", "optim is given twice"]),
        (b"- a\n- b\n", ["line 1", "must be a mapping"]),
        (b"just text", ["must be a mapping"]),
        (b"optim:\n  lr: [1\n", ["line 3"]),
        (b"a: &x [*x]\nb: *y\n", ["line 2", "y"]),
        (b"optim:\n\tlr: 1\n", ["line 2"]),
        (b"\xff\xfe", ["UTF-8"]),
        (b"a: 1\n---\nb: 2\n", ["document"]),
        (b"optim: !!python/object:os.system x\n", ["line 1"]),
    ],
)
def test_bad_file(tmp_path: Path, content: bytes, words: list[str]) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    (line,) = mistakes([], path)
    assert line.startswith(str(path)) and all(word in line for word in words), line


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert mistakes([], tmp_path / "no.yaml") == [f"{tmp_path / 'no.yaml'}: no such file"]
    assert mistakes([], tmp_path)[0].startswith(f"{tmp_path}: cannot be read")


def test_empty_file_is_all_defaults(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing\n")
    assert load_config(path, [], PretrainConfig) == PretrainConfig()


def test_environment(monkeypatch: pytest.MonkeyPatch, repository: Path) -> None:
    big = repository / "configs" / "big.yaml"
    monkeypatch.delenv("ELMO_CORPUS", raising=False)
    lines = mistakes([], big)
    assert lines and all("ELMO_CORPUS is not set" in line for line in lines)
    assert any(line.startswith("data.train=") for line in lines)
    monkeypatch.setenv("ELMO_CORPUS", "/corpus")
    config = load_config(big, [], PretrainConfig)
    assert config.data.train == ("/corpus/train-*",)
    assert (config.data.streams, config.model.lstm.dim, config.softmax.negatives) == (384, 4096, 8192)
    monkeypatch.delenv("ELMO_CORPUS")
    assert load_config(big, ["data.train=a", "data.valid=b"], PretrainConfig).data.train == ("a",)


@pytest.mark.parametrize("name", ["quickstart", "small", "big"])
def test_shipped_configs(name: str, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELMO_CORPUS", "/corpus")
    path = repository / "configs" / f"{name}.yaml"
    config, _ = parse([str(path)], "pretrain", PretrainConfig)
    assert config.run.name == name
    parse([str(path)], "prepare", PrepareConfig)


def test_flags_and_positionals(file: Path) -> None:
    config, flags = parse([str(file), "--resume", "optim.lr=0.1", "--json", "o.json"], "pretrain", PretrainConfig)
    assert flags == Flags(resume=True, json="o.json") and config.optim.lr == 0.1
    export, _ = parse(["runs/lr=1", "out", "checkpoint=last"], "export", ExportConfig)
    assert (export.init.source, export.out, export.checkpoint) == ("runs/lr=1", "out", "last")
    report, flags = parse(["a", "b", "out=c.png", "--json=x"], "report", ReportConfig)
    assert report.runs == ("a", "b") and report.out == "c.png" and flags.json == "x"


@pytest.mark.parametrize(
    ("verb", "argv", "words"),
    [
        ("pretrain", [], ["CONFIG.yaml is missing"]),
        ("pretrain", ["FILE", "optim.lr"], ["optim.lr: neither a file nor of the form key.path=value"]),
        ("pretrain", ["FILE", "FILE"], ["only one configuration file"]),
        ("pretrain", ["FILE", "--dryrun"], ["unknown flag --dryrun; did you mean --dry-run?"]),
        ("pretrain", ["FILE", "-x"], ["unknown flag -x"]),
        ("pretrain", ["FILE", "--json"], ["--json needs a file"]),
        ("pretrain", ["FILE", "--resume", "--fresh"], ["exclude each other"]),
        ("pretrain", ["FILE", "--resume=yes"], ["takes no value"]),
        ("pretrain", ["FILE", "data.train=[]"], ["data.train is empty"]),
        ("evaluate", [], ["SOURCE is missing"]),
        ("evaluate", ["runs/x"], ["data.test is empty"]),
        ("export", ["runs/x"], ["OUT is missing"]),
        ("export", ["runs/x", "out", "--resume"], ["unknown flag --resume"]),
        ("report", [], ["RUN is missing"]),
    ],
)
def test_usage_errors_exit_2(
    verb: str, argv: list[str], words: list[str], file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(file) if word == "FILE" else word for word in argv]
    assert run_verb(verb, ROOTS[verb], lambda config, flags: pytest.fail("ran"), arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and len(err.splitlines()) == 1
    assert all(word in err for word in words), err


class _Result:
    def summary(self) -> str:
        return "done ✓"

    def to_dict(self) -> dict[str, Any]:
        return {"perplexity": 3.5}


def test_result_is_printed_and_written(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "deep" / "o.json"
    code = run_verb("pretrain", PretrainConfig, lambda config, flags: _Result(), [str(file), "--json", str(target)])
    assert code == 0 and capsys.readouterr().out == "done ✓\n"
    assert json.loads(target.read_text()) == {"perplexity": 3.5}
    assert [path.name for path in target.parent.iterdir()] == ["o.json"]


def test_users_mistakes_inside_a_run_exit_2_and_defects_do_not_hide(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Remote(DataError):
        """As Ray raises it: ours by type, a remote traceback by text."""

        def __init__(self, cause: Exception) -> None:
            super().__init__("remote\ntraceback")
            self.cause = cause

    def bad(config: PretrainConfig, flags: Flags) -> None:
        raise Remote(DataError("text.txt line 3: not UTF-8"))

    def broken(config: PretrainConfig, flags: Flags) -> None:
        raise ZeroDivisionError

    assert run_verb("pretrain", PretrainConfig, bad, [str(file)]) == 2
    assert capsys.readouterr().err == "error: text.txt line 3: not UTF-8\n"
    with pytest.raises(ZeroDivisionError):
        run_verb("pretrain", PretrainConfig, broken, [str(file)])


@pytest.mark.parametrize("verb", ROOTS)
def test_help_lists_every_key(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb(verb, ROOTS[verb], lambda config, flags: None, ["whatever", "--help"]) == 0
    text = capsys.readouterr().out
    assert text == help_text(verb, ROOTS[verb]) + "\n" and len(max(text.splitlines(), key=len)) <= 120
    sections = VERBS[verb].sections
    for key in keys(ROOTS[verb]):
        if not sections or key.name.split(".")[0] in sections:
            assert f"  {key.name}={key.default}" in text and str(key.field.description) in text
    assert all(f"--{flag}" in text for flag in VERBS[verb].flags)


def test_verbs_are_listed_and_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main([]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {verb} " in listed for verb in VERBS)
    assert __main__.main(["--version"]) == 0 and capsys.readouterr().out == f"elmo_ray {__version__}\n"
    assert __main__.main(["train"]) == 2 and "unknown verb train" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verb", "arguments", "line"),
    [
        ("evaluate", ["a", "text.txt"], "text.txt: is no CONFIG.yaml; text is given as data.test=text.txt"),
        ("evaluate", ["a", "none*.txt"], "none[*].txt: is no CONFIG.yaml; text is given as data.test=none[*].txt"),
        ("evaluate", ["a", "folder"], "folder: is one too many: evaluate takes one SOURCE"),
        ("export", ["a", "b", "c"], "c: is one too many: export takes one SOURCE, one OUT"),
        ("embed", ["a", "1.txt", "2.txt", "out"], "out: .* one SOURCE, one IN, one OUT; .* glob in quotes"),
        ("export", ["a", "b", "run.storage_path=x"], "run.storage_path: export writes to OUT and makes no run; remove"),
        ("embed", ["a", "i", "o", "run.storage_path=x"], "run.storage_path: embed writes to OUT and makes no run"),
        ("embed", ["a", "i", "o", "data.test=x"], "data.test: the text of embed is IN"),
        ("evaluate", ["a", "data.test=t", "run.name=x"], "run.name: evaluate makes no run: .* only run.storage_path"),
        ("report", ["a", "checkpoint=last"], "checkpoint: report reads the best checkpoint of a RUN; remove it"),
        ("pretrain", ["text.txt"], "text.txt line 1: must be a mapping .* text is given as data.train=text.txt"),
        ("pretrain", ["text.txt", "c.yaml"], "text.txt: is no CONFIG.yaml; text is given as data.train=text.txt"),
        ("pretrain", ["colons.txt"], "colons.txt line 1: .* text is given as data.train=colons.txt"),
        ("pretrain", ["folder"], "folder: is a folder, and CONFIG.yaml is a file$"),
        ("finetune", ["folder", "c.yaml"], "folder: is a folder; the model to start from is given as init.from=folder"),
    ],
)  # fmt: skip
def test_arguments_in_the_wrong_place(
    verb: str, arguments: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.txt").write_text("the cat sat\nand slept\n")
    (tmp_path / "colons.txt").write_text("he said : this : that\n- and : so on\n")
    (tmp_path / "c.yaml").write_text("data: {train: t.txt, valid: v.txt}\n")
    with pytest.raises(ConfigError) as caught:
        parse(arguments, verb, ROOTS[verb])
    (found, *more) = str(caught.value).split("\n")
    assert re.match(line, found), found
    assert not [other for other in more if "missing" not in other]


@pytest.mark.parametrize("verb", ROOTS)
def test_each_verb_is_a_module_with_help(verb: str, repository: Path) -> None:
    command = [sys.executable, "-m", f"elmo_ray.{verb}", "--help"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: python -m elmo_ray.{verb} ")


@pytest.mark.parametrize(("arguments", "code"), [
    (["elmo_ray.pretrain", "--help"], 141), (["elmo_ray"], 141), (["elmo_ray", "--version"], 141),
    (["elmo_ray", "nonsense"], 2),
])  # fmt: skip
def test_a_pipe_that_nobody_reads(arguments: list[str], code: int, repository: Path) -> None:
    """`--help | head` ends without a word; the exit code of a mistake stays where its message finds no reader."""
    reader, writer = os.pipe()
    os.close(reader)
    streams = {"stdout": writer, "stderr": subprocess.PIPE} if code == 141 else {"stderr": writer}
    command = [sys.executable, "-m", *arguments]
    try:
        done = subprocess.run(command, cwd=repository, timeout=120, check=False, **streams)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr or b"") == (code, b"")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["c.yaml", "--data.train=t.txt"],
            "unknown flag --data.train=t.txt; a setting is written without -, as data.train",
        ),
        (
            ["c.yaml", "--vocab_file", "v"],
            "unknown flag --vocab_file; bilm-tf's --vocab_file is data.vocab, or init.vocab",
        ),
        (["c.yaml", "--workers", "2"], r"unknown flag --workers; pretrain has .*; settings are written key.path=value"),
        (["c.yaml", "-"], "unknown flag -; standard input is not read; name a file"),
        (["run"], "run: is a folder, and CONFIG.yaml is a file: name the one in it, run/config.yaml"),
        (["options.json"], "options.json: is an options.json of bilm-tf; its options have other names here, as model."),
        (["c.yaml", "train.batch_size=3"], "unknown key train.batch_size; here it is data.streams or evaluate.streams"),
        (["c.yaml", "learning_rate=3"], "unknown key learning_rate; here it is optim.lr"),
        (["c.yaml", "n_epochs=3"], "unknown key n_epochs; here it is train.duration"),
    ],
)
def test_habits_of_other_programs(
    arguments: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("data: {train: t.txt, valid: v.txt, streams: 2}\n")
    (tmp_path / "options.json").write_text('{"bidirectional": true, "lstm": {"dim": 8}, "n_epochs": 10}')
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    with pytest.raises(ConfigError, match=line) as caught:
        parse(arguments, "pretrain", ROOTS["pretrain"])
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_output_to_a_full_disk(repository: Path) -> None:
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "elmo_ray", "--version"]
        done = subprocess.run(
            command, cwd=repository, stdout=full, stderr=subprocess.PIPE, timeout=120, check=False, text=True
        )
    assert (done.returncode, done.stderr) == (2, "error: the output cannot be written (No space left on device)\n")


LEFT_OVER = """
data: {train: a.txt, valid: b.txt, min_count: 2}
softmax: {negatives: 64}
optim: {name: adamw, weight_decay: 0.1}
model: {char_cnn: {n_highway: 1}}
train: {validate_every: 50 steps, validate_positions: 2000, patience: 3, on_nonfinite: skip, max_skips: 2}
"""


@pytest.mark.parametrize(
    ("overrides", "useless"),
    [
        (["train.validate_every=null"], ["train.validate_positions", "train.patience"]),
        (["data.valid=null"], ["train.validate_every", "train.validate_positions", "train.patience"]),
        (["softmax.kind=full", "optim.name=adagrad"], ["softmax.negatives", "optim.weight_decay"]),
        (["model.input=words"], ["model.char_cnn"]),
        (["data.vocab=v.txt", "train.on_nonfinite=stop"], ["data.min_count", "train.max_skips"]),
    ],
    ids=lambda values: values[0],
)
def test_settings_of_the_file_that_an_override_makes_useless_are_a_note(
    overrides: list[str], useless: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(LEFT_OVER, encoding="utf-8")
    with caplog.at_level("INFO"):
        config = load_config(path, overrides, PretrainConfig)
    assert [record.getMessage().split(" has no effect")[0] for record in caplog.records] == [
        f"{path}: {key}" for key in useless
    ]
    assert not any("remove" in record.getMessage() for record in caplog.records)
    assert PretrainConfig.from_dict(config.to_dict()) == config


def test_a_text_of_the_file_beside_tokens_of_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "embed.yaml"
    path.write_text("in: text.txt\nembed: {tokens: v.txt}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="in is set, but embed.tokens names the words"):
        load_config(path, ["out=v.hdf5"], EmbedConfig)
    path.write_text("in: text.txt\nembed: {layers: top}\n", encoding="utf-8")
    config = load_config(path, ["embed.tokens=v.txt", "out=v.hdf5"], EmbedConfig)
    assert config.texts == () and config.embed.layers == "all" and config.embed.tokens == "v.txt"


def test_what_the_file_or_the_command_line_contradicts_itself_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(LEFT_OVER, encoding="utf-8")
    assert mistakes(["softmax.kind=full", "softmax.negatives=5"], path) == [
        "softmax.negatives is set, but softmax.kind=full samples no words; remove one of them"
    ]
    assert mistakes(["model.input=words", "model.char_cnn.n_highway=3"], path)[0].startswith("model.char_cnn is set")
    assert mistakes(["train.validate_every=null", "optim.lr=-1"], path)[-1].startswith("optim.lr=-1: must be")
    path.write_text(LEFT_OVER + "evaluate: {reset: sentence, streams: 4}\n", encoding="utf-8")
    assert mistakes(["train.validate_every=null"], path)[-1].startswith("evaluate.streams is set, but")


def test_a_value_of_a_sweep_may_make_a_setting_of_the_file_useless(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(LEFT_OVER + "sweep: {space: {softmax.kind: {choice: [sampled, full]}}}\n", encoding="utf-8")
    config = load_config(path, [], SweepConfig)
    assert config.trial({"softmax.kind": "full"}).softmax.kind == "full"
    assert config.trial({"softmax.kind": "sampled"}).softmax.negatives == 64
