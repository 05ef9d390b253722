"""From the command line to a configuration, and from a result to an exit code.

The `main` of every verb is one call of `run_verb`:

def run(config: PretrainConfig, flags: Flags = Flags()) -> PretrainResult: ...
def main(argv: Sequence[str] | None = None) -> int:
    return run_verb("pretrain", PretrainConfig, run, argv)
"""

from __future__ import annotations

import copy
import difflib
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO, TypeVar, runtime_checkable

from elmo_ray import __version__
from elmo_ray.config.schema import REMOVED, RENAMED, Key, Root, is_null, keys, set_nested, unknown_key
from elmo_ray.config.yaml_reader import parse_yaml
from elmo_ray.errors import ConfigError, ElmoRayError, short
from elmo_ray.storage.files import write_json
from elmo_ray.text.records import FORMATS

logger = logging.getLogger(__name__)

RootT = TypeVar("RootT", bound=Root)

_OVERRIDE = re.compile(r"^([A-Za-z_][A-Za-z0-9_.]*)=(.*)$", re.DOTALL)
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_TEXT_ENDS = (".txt", ".gz", ".zst", *(ending for each in FORMATS.values() for ending in each.endings))
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
"""Folder of the configurations that come with the package; in a checkout it is a link to configs/."""

_FLAG_HELP = {
    "dry-run": "Print all settings and what the run would need, and stop.",
    "resume": "Continue the run of this name from its newest whole checkpoint.",
    "fresh": "Start anew instead of continuing what exists.",
    "look": "Show sentences as they are trained on, unknown words, lengths and odd characters.",
    "json": "FILE: also write the result to this file as JSON.",
}


@dataclass(frozen=True)
class Flags:
    """Arguments that are not settings. json: a file for the result, or None."""

    dry_run: bool = False
    resume: bool = False
    fresh: bool = False
    look: bool = False
    json: str | None = None


@dataclass(frozen=True)
class Positional:
    """Argument without a key.

    label: its name in the usage line. key: the setting that it sets. many: it takes all arguments that follow.
    unless: a key; the argument is not expected where the user gives this key as key=value.
    """

    label: str
    key: str
    many: bool = False
    unless: str | None = None


@dataclass(frozen=True)
class Verb:
    """Form of a verb's command line.

    config: CONFIG.yaml is `required`, `optional`, or not taken (`no`). sections: those that --help lists; () means all.
    text, source: keys of the text and of the model, where these are no positionals.
    """

    summary: str
    config: str = "optional"
    positionals: tuple[Positional, ...] = ()
    flags: tuple[str, ...] = ()
    sections: tuple[str, ...] = ()
    text: str | None = None
    source: str | None = None


_SOURCE = Positional("SOURCE", "init.from")
VERBS: dict[str, Verb] = {
    "prepare": Verb(
        "count, index and check a corpus; build its vocabulary; or gather the sample corpus",
        config="required", flags=("dry-run", "fresh", "look", "json"), sections=("run", "data", "cluster"),
        text="data.train",
    ),
    "pretrain": Verb(
        "train a bidirectional language model from scratch, validate and export it",
        config="required", flags=("dry-run", "resume", "fresh", "json"), text="data.train",
    ),
    "finetune": Verb(
        "go on training a model on other text: a run, a checkpoint, or bilm-tf's files",
        config="required", flags=("dry-run", "resume", "fresh", "json"), text="data.train",
        source="init.from",
    ),
    "sweep": Verb(
        "train with other settings, several trials at a time, and keep the best (Ray Tune)",
        config="required", flags=("dry-run", "resume", "fresh", "json"), text="data.train",
        source="init.from",
    ),
    "evaluate": Verb(
        "perplexity of a model on held-out text: forward, backward and both",
        positionals=(_SOURCE,), flags=("dry-run", "json"), text="data.test",
    ),
    "export": Verb(
        "write weights.hdf5, options.json and vocab.txt for bilm-tf, AllenNLP and simple_elmo",
        positionals=(_SOURCE, Positional("OUT", "out")), flags=("json",),
    ),
    "embed": Verb(
        "text to vectors of every word (HDF5, Parquet), most probable words, or surprisal",
        positionals=(_SOURCE, Positional("IN", "in", unless="embed.tokens"), Positional("OUT", "out")),
        flags=("dry-run", "resume", "fresh", "json"),
    ),
    "serve": Verb(
        "vectors of words by HTTP (Ray Serve): tokens in, JSON or safetensors out",
        positionals=(_SOURCE,), flags=("dry-run", "json"),
    ),
    "report": Verb(
        "tables and perplexity curves of runs",
        config="no", positionals=(Positional("RUN", "runs", many=True),), flags=("json",),
    ),
}  # fmt: skip


@runtime_checkable
class Result(Protocol):
    """Result of a verb's `run`: text for the terminal, and plain values for `--json`."""

    def summary(self) -> str:
        """Return the text for the terminal."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""


def run_verb(
    name: str, root: type[RootT], run: Callable[[RootT, Flags], object], argv: Sequence[str] | None = None
) -> int:
    """Parse `argv` (default: the arguments of the process), run the verb, print its result, and return the exit code.

    0: done. 2: mistakes of the user, one line each on stderr. 1: the Ray cluster is lost, in one line. 130:
    interrupted. 141: nobody reads stdout any more. A result may have an `exit_code` of its own. Other exceptions are
    defects and are not caught.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        return print_result(help_text(name, root))
    if "--version" in arguments:
        return print_result(f"elmo_ray {__version__}")
    code = 0
    try:
        set_up_logging()
        config, flags = parse(arguments, name, root)
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a terminal may lack the characters of our curve
        result = run(config, flags)
        if isinstance(result, Result):
            code = print_result(result.summary()) or getattr(result, "exit_code", 0)
            if flags.json is not None:
                write_json(flags.json, result.to_dict())
    except ElmoRayError as error:
        # Ray raises a mixture of its error and ours, with a remote traceback as its text. Our error is its cause.
        cause = getattr(error, "cause", None)
        error = cause if isinstance(cause, ElmoRayError) else error
        print_errors(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        print_errors("interrupted")
        return 130
    return code


def parse(argv: Sequence[str], name: str, root: type[RootT]) -> tuple[RootT, Flags]:
    """Return the configuration and the flags for the arguments of a verb.

    Raises ConfigError, with one line for each mistake.
    """
    verb = VERBS[name]
    words, values = _split(argv, name, verb)
    file: str | None = None
    overrides: list[str] = []
    places: dict[str, Any] = {}
    given = {match[1] for match in map(_OVERRIDE.match, words) if match}
    waiting = [place for place in verb.positionals if place.unless not in given]
    problems: list[str] = []
    for word in words:
        if _OVERRIDE.match(word):
            overrides.append(word)
        elif waiting and waiting[0].many:
            places.setdefault(waiting[0].key, []).append(word)
        elif waiting:
            places[waiting.pop(0).key] = word
        elif verb.config != "no" and file is None and _is_config(word, verb):
            file = word
        elif verb.config == "required" and file is None and _is_name(word):
            file = str(find_config(word))
        elif file is not None and word.endswith((".yaml", ".yml")) and not file.endswith((".yaml", ".yml")):
            problems.append(_misplaced(file, name, verb))
            file = word
        elif file is not None and word.endswith((".yaml", ".yml")):
            problems.append(f"{word}: only one configuration file is read, and {file} is given already")
        else:
            problems.append(_misplaced(word, name, verb))
    usage = _usage(name, verb)
    problems.extend(
        f"{place.label} is missing; usage: {usage}" for place in waiting if place.key not in {*places, *given}
    )
    if file is None and verb.config == "required" and not problems:
        problems.append(f"CONFIG.yaml is missing; usage: {usage}; {_known_configs()}")
    if problems:
        raise ConfigError("\n".join(problems))
    config = load_config(file, overrides, root, places)
    empty = [f"{key} is empty; {cure}" for key, cure in config.required().items()]
    if empty:
        raise ConfigError("\n".join(empty))
    return config, Flags(**values)


def shipped_configs() -> dict[str, Path]:
    """Return the configurations that come with the package, by name."""
    return {path.stem: path for path in sorted(CONFIGS.glob("*.yaml"))}


def find_config(name: str | Path) -> Path:
    """Return the path of a configuration: a file that exists, or else one that comes with the package, by its name.

    Raises ConfigError, with the names that there are, for a bare name that is neither.
    """
    path, shipped = Path(name), shipped_configs()
    if path.exists() or not _is_name(str(name)):
        return path
    if str(name) not in shipped:
        near = difflib.get_close_matches(str(name), shipped, n=1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"{name}: no such file; {meant}{_known_configs()}")
    return shipped[str(name)]


def _known_configs() -> str:
    return f"the configurations that come with elmo_ray are {', '.join(shipped_configs())}"


def _is_name(word: str) -> bool:
    """Return True for a word that can name a configuration of the package: it is no path that exists, and no glob."""
    return re.fullmatch(r"[A-Za-z0-9_-]+", word) is not None and not os.path.exists(word)


def _is_config(word: str, verb: Verb) -> bool:
    """Return True for a file that is read as CONFIG.yaml; other names than *.yaml only where nothing else is a file."""
    if word.endswith((".yaml", ".yml")):
        return True
    is_pipe = os.path.exists(word) and not os.path.isfile(word) and not os.path.isdir(word)
    return is_pipe or (verb.config == "required" and os.path.isfile(word))


def _misplaced(word: str, name: str, verb: Verb) -> str:
    """Return the message for an argument that is neither one of the verb's places nor a file nor a setting."""
    if "=" in word:
        return f"{word}: not of the form key.path=value"
    is_folder = os.path.isdir(word)
    if is_folder and verb.source is not None:
        return f"{word}: is a folder; the model to start from is given as {verb.source}={word}"
    looks_like_text = os.path.isfile(word) or any(sign in word for sign in "/*?") or word.endswith(_TEXT_ENDS)
    if verb.text is not None and looks_like_text and not is_folder:
        return f"{word}: is no CONFIG.yaml; text is given as {verb.text}={word}"
    if is_folder and verb.config == "required":
        inside = os.path.join(word, "config.yaml")
        more = f": name the one in it, {inside}" if os.path.isfile(inside) else ""
        return f"{word}: is a folder, and CONFIG.yaml is a file{more}"
    places = " ".join(place.label for place in verb.positionals)
    if not places or (verb.text is not None and not is_folder):
        return f"{word}: neither a file nor of the form key.path=value"
    more = "; several texts are given as one glob in quotes" if "IN" in places.split() else ""
    return f"{word}: is one too many: {name} takes one {places.replace(' ', ', one ')}{more}"


def load_config(
    path: str | Path | None, overrides: Sequence[str], root: type[RootT], values: Mapping[str, Any] | None = None
) -> RootT:
    """Return the configuration: defaults, then the YAML file, then the dotted `values`, then `key.path=value`.

    ${NAME} in a string is replaced by the environment variable. Raises ConfigError, with one line for each unknown key,
    bad value, contradiction, or variable that is not set. A setting of the file that has no effect beside an override
    is not used, and a log line says so.
    """
    tree: dict[str, Any] = {} if path is None else _read(Path(path))
    base = copy.deepcopy(tree)
    problems: list[str] = []
    for name, value in (values or {}).items():
        set_nested(tree, name, value)
    known = {key.name: key for key in keys(root)}
    for text in overrides:
        try:
            _override(tree, _current(text), root, known)
        except ConfigError as error:
            problems.append(str(error))
    problems.extend(_of_older_versions(tree))
    tree = _expand(tree, "", problems)
    names = [text.partition("=")[0] for text in overrides]
    given = [*(values or {}), *(RENAMED.get(name, name) for name in names)]
    try:
        config, useless = root.from_overridden(_expand(base, "", []), tree, given)
    except ConfigError as error:
        raise ConfigError("\n".join([*problems, str(error)])) from None
    if problems:
        raise ConfigError("\n".join(problems))
    for key, why in useless.items():
        logger.info("%s: %s has no effect in this run: %s", path, key, why.split(";")[0])
    return config


def help_text(name: str, root: type[Root]) -> str:
    """Return the text of `--help`: usage, flags, and all keys of a verb with type, default and description."""
    verb = VERBS[name]
    lines = [f"usage: {_usage(name, verb)}", "", verb.summary[0].upper() + verb.summary[1:] + ".", "", "flags:"]
    flags = [*verb.flags, "help", "version"]
    texts = {**_FLAG_HELP, "help": "Print this text.", "version": "Print the version."}
    lines.extend(f"  --{flag:<10} {texts[flag]}" for flag in flags)
    if verb.config == "required":
        lines.extend(["", "CONFIG.yaml: a file, or the name of one that comes with elmo_ray:"])
        lines.append(f"  {' '.join(shipped_configs())}")
    sets = {place.key: place.label for place in verb.positionals}
    lines.extend(
        ["", "keys (in CONFIG.yaml, or as key.path=value):" if verb.config != "no" else "keys (as key=value):"]
    )
    for key in keys(root):
        if verb.sections and key.name.split(".")[0] not in verb.sections:
            continue
        where = f" (set by {sets[key.name]})" if key.name in sets else ""
        lines.append(f"  {key.name}={key.default}{where}")
        lines.append(f"      [{key.allowed}] {key.field.description}")
    if verb.sections:
        lines.extend(["", "The other keys of a pretrain file are checked and have no effect here."])
    return "\n".join(lines)


def overview() -> str:
    """Return a list of the verbs, with a line for each."""
    lines = ["usage: python -m elmo_ray.VERB ...   (or: elmo-ray VERB ...)", ""]
    lines.extend(f"  {name:<9} {verb.summary}" for name, verb in VERBS.items())
    lines.extend(["", "python -m elmo_ray.VERB --help lists a verb's keys; --version prints the version."])
    return "\n".join(lines)


def text_table(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Return the lines of a table for a result's summary; the first `left` columns are aligned left, the others right.

    rows: the head and the rows, all with the same number of cells.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def print_result(text: str) -> int:
    """Print to stdout and return the exit code.

    It is 0; 141 (as of SIGPIPE) where its reader has gone, as `head` does; 2, with an error on stderr, where stdout
    cannot be written, as on a full disk.
    """
    try:
        return 0 if _print(text, sys.stdout) else 141
    except OSError as error:
        _send_nowhere(sys.stdout)
        print_errors(f"the output cannot be written ({error.strerror})")
        return 2


def print_errors(text: str) -> None:
    """Print each line of the text as an error on stderr."""
    for line in text.split("\n"):
        _print(f"error: {line}", sys.stderr)


def _print(text: str, stream: TextIO) -> bool:
    """Return False where the stream is a pipe that nobody reads."""
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        _send_nowhere(stream)
        return False
    return True


def _send_nowhere(stream: TextIO) -> None:
    """Let what is left in a stream go nowhere: Python flushes it once more when it ends, and would complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def set_up_logging() -> None:
    """Send our log lines to stderr, for a person to read. A program that has its own handlers keeps them."""
    logging.basicConfig(format="%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    logging.getLogger("elmo_ray").setLevel(logging.INFO)


def _usage(name: str, verb: Verb) -> str:
    parts = [f"python -m elmo_ray.{name}"]
    parts.extend(f"{place.label} [{place.label} ...]" if place.many else place.label for place in verb.positionals)
    parts.extend({"required": ["CONFIG.yaml"], "optional": ["[CONFIG.yaml]"]}.get(verb.config, []))
    return " ".join([*parts, "[key.path=value ...]", "[flags]"])


_BILM_TF_FLAGS = {
    "train_prefix": "data.train",
    "test_prefix": "data.test",
    "vocab_file": "data.vocab, or init.vocab beside a trained model,",
    "save_dir": "run.name",
    "batch_size": "data.streams, or evaluate.streams,",
    "outfile": "OUT",
}


def _cure_for_flag(word: str, name: str, verb: Verb) -> str:
    """Return what to write in place of a flag that does not exist."""
    flag, equals, value = word.lstrip("-").partition("=")
    if word == "-":
        return "standard input is not read; name a file"
    near = difflib.get_close_matches(flag, verb.flags, n=1)
    if near:
        return f"did you mean --{near[0]}?"
    if flag in _BILM_TF_FLAGS:
        return f"bilm-tf's --{flag} is {_BILM_TF_FLAGS[flag]} here; settings are written key.path=value"
    if "." in flag:
        return f"a setting is written without -, as {flag}={value if equals else 'VALUE'}"
    return f"{name} has {', '.join('--' + f for f in verb.flags)}; settings are written key.path=value"


def _split(argv: Sequence[str], name: str, verb: Verb) -> tuple[list[str], dict[str, Any]]:
    """Return the arguments that are not flags, and the flags as fields of `Flags`."""
    words: list[str] = []
    values: dict[str, Any] = {}
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            words.append(word)
            continue
        flag, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or flag not in verb.flags:
            raise ConfigError(f"unknown flag {word}; {_cure_for_flag(word, name, verb)}")
        if flag != "json":
            if equals:
                raise ConfigError(f"--{flag} takes no value")
            values[flag.replace("-", "_")] = True
            continue
        if not equals and rest and not rest[0].startswith("-"):
            value = rest.pop(0)
        if not value:
            raise ConfigError("--json needs a file to write")
        values["json"] = value
    if values.get("resume") and values.get("fresh"):
        raise ConfigError("--resume and --fresh exclude each other")
    return words, values


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        known = path.suffix == ".yaml" and path.stem in shipped_configs()
        cure = f"; the one that comes with elmo_ray is called by its name, {path.stem}" if known else ""
        raise ConfigError(f"{path}: no such file{cure}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    hint = "" if path.suffix in (".yaml", ".yml") else f"; is it text? text is given as data.train={path}"
    try:
        tree = parse_yaml(text, str(path))
    except ConfigError as error:
        raise ConfigError(f"{error}{hint}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} line 1: must be a mapping of sections (run:, data:, ...){hint}")
    if "lstm" in tree and "model" not in tree:
        raise ConfigError(
            f"{path}: is an options.json of bilm-tf; its options have other names here, as model.lstm.dim: "
            "see configs/README.md"
        )
    return {str(key): value for key, value in tree.items()}


def _current(override: str) -> str:
    """Return the override with the new name of a renamed setting."""
    name, equals, value = override.partition("=")
    if name in REMOVED:
        raise ConfigError(f"{name} no longer exists: {REMOVED[name]}")
    if name not in RENAMED:
        return override
    logger.warning("%s is called %s now; the old name will go", name, RENAMED[name])
    return f"{RENAMED[name]}{equals}{value}"


def _of_older_versions(tree: Mapping[str, Any]) -> Iterator[str]:
    """Yield a message for each setting of the file that no longer exists, and warn of each that has a new name."""
    for name, cure in {**RENAMED, **REMOVED}.items():
        section, last = name.split(".")
        inside = tree.get(section)
        if not isinstance(inside, Mapping) or last not in inside:
            continue
        if name in REMOVED:
            yield f"{name} no longer exists: {cure}"
        elif _has(tree, cure):
            yield f"{name} and {cure} are one setting; remove {name}"
        else:
            logger.warning("%s is called %s now; the old name will go", name, cure)


def _has(tree: Mapping[str, Any], name: str) -> bool:
    section, last = name.split(".")
    inside = tree.get(section)
    return isinstance(inside, Mapping) and last in inside


def _override(tree: dict[str, Any], text: str, root: type[Root], known: Mapping[str, Key]) -> None:
    name, _, value = text.partition("=")
    if not value.strip():
        unset = f"; {name}=null unsets it" if name in known and known[name].optional else ""
        raise ConfigError(f"{name}= has no value{unset}")
    sections = {key.rsplit(".", depth)[0] for key in known for depth in range(1, key.count(".") + 1)}
    if name not in known and name not in sections:
        raise ConfigError(unknown_key(root, name))
    key = known.get(name)
    if key is not None and key.textual:
        set_nested(tree, name, _text(value, key))
    else:
        parsed = parse_yaml(value, f"{name}={short(value, 100)}")
        if key is not None:
            # A mapping that is one setting, such as a sweep's space, replaces the one in the file.
            set_nested(tree, name, None)
        set_nested(tree, name, parsed)


def _text(value: str, key: Key) -> Any:
    """Return a path, glob or name as it is written, because `*.txt` and 2024 are not strings in YAML.

    Quoted strings and lists are still read as YAML.
    """
    if is_null(value, key) or (key.optional and value in ("null", "~")):
        return None
    if value[0] in "[\"'":
        try:
            parsed = parse_yaml(value, key.name)
        except ConfigError:
            return value
        return parsed if isinstance(parsed, str | list) else value
    return value


def _expand(value: Any, key: str, problems: list[str]) -> Any:
    """Return the value with ${NAME} replaced in all strings; add a problem for each variable that is not set."""
    if isinstance(value, dict):
        return {name: _expand(item, f"{key}.{name}" if key else str(name), problems) for name, item in value.items()}
    if isinstance(value, list):
        return [_expand(item, key, problems) for item in value]
    if not isinstance(value, str):
        return value
    for name in dict.fromkeys(_VARIABLE.findall(value)):
        if name not in os.environ:
            shown = f"{short(key)}={short(value)}"
            problems.append(f"{shown}: the environment variable {name} is not set; set it, or {short(key)}")
    return _VARIABLE.sub(lambda match: os.environ.get(match[1], ""), value)
