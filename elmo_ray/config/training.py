"""Settings of a training run, and of the verbs `evaluate`, `export` and `report`.

Each verb has a root class (`PretrainConfig`, `EvaluateConfig`, ...) that is made of sections. `Root.from_dict` and
`to_dict` convert from and to plain values, and `command_line.load_config` reads YAML and overrides. A setting has the
same name in YAML, overrides, errors and `--help`.

`component_problems` checks the settings of a model's components: what is frozen and what has its own learning rate.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PlainValidator

from elmo_ray.config.model import (
    LARGE,
    ComponentRates,
    DropoutRates,
    ModelConfig,
    Reset,
    Workers,
)
from elmo_ray.config.schema import Allowed, Duration, Globs, Int, Names, Root, Section, as_names, show
from elmo_ray.config.softmax import SoftmaxConfig
from elmo_ray.text.records import FORMATS
from elmo_ray.text.tokenizers import NORMALIZATIONS

SAMPLE = "sample"  # data.train: the built-in corpus
COUNTED = "counted"  # data.vocab of finetune: counted from the new text, and not the SOURCE's

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._=+-]*$"
_NAME_IN_WORDS = "of a-z A-Z 0-9 . _ = + - (first no sign; 200 at most), or null"

TRACKERS = ("tensorboard", "wandb", "mlflow")
"""Trackers that a run can report to."""

SENT_TO = TRACKERS[1:]
"""Trackers to which a process beside the driver sends what the run has written."""

MOST_PROFILED = 100
"""Most steps in a trace, which takes some MB of memory for each."""

StepRange = Annotated[
    tuple[Int, Int] | None,
    BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value),
    Allowed("[first, last] or null"),
]

_MOST_POSITIONS = 1 << 25  # in one step; more would need several GB for indices alone


TrackerNames = Annotated[
    tuple[str, ...] | None,
    BeforeValidator(lambda value: value if value is None else as_names(value)),
    Allowed("names or null"),
]


class StorageConfig(Section):
    """Section `run` as far as every verb with a folder of runs has it."""

    path: ClassVar[str] = "run."
    storage_path: str = Field(
        "runs", min_length=1, description="All runs are written to this folder, and nothing is written outside of it."
    )


class RunConfig(StorageConfig):
    """Section `run` of a training."""

    name: Annotated[str | None, Allowed(_NAME_IN_WORDS)] = Field(
        None,
        pattern=_NAME,
        max_length=200,
        description="The name of the run's folder; null: the date.",
    )
    seed: Int = Field(
        1, ge=0, lt=2**63, description="It decides initial values, order of blocks, dropout and negatives."
    )
    export: bool = Field(True, description="At the end, write export/ with weights.hdf5, options.json and vocab.txt.")
    report_to: TrackerNames = Field(
        None,
        description="Any of tensorboard, wandb, mlflow, which show the run; null: tensorboard if installed.",
    )

    def _contradictions(self) -> Iterator[str]:
        for name in self.report_to or ():
            if name not in TRACKERS:
                yield f"run.report_to={show(name)}: must be among {', '.join(TRACKERS)}"


_FORMATS = ("auto", *FORMATS)
_FORMAT_ENDINGS = [ending for each in FORMATS.values() for ending in each.endings]

_TOKENIZERS = "none, spacy, package.module:function, or null"


def _format(value: Any) -> str:
    """Return the name of a format; raise ValueError for anything else."""
    if value in _FORMATS:
        return str(value)
    raise ValueError("no format")


class FormConfig(Section):
    """Section `data` as far as it says of what form texts are, and how they become sentences of words."""

    path: ClassVar[str] = "data."
    on_error: Literal["fail", "replace"] = Field(
        "fail", description="What happens at bytes that are not UTF-8 and at NULs: an error, or a replacement."
    )
    format: Annotated[str, PlainValidator(_format), Allowed(" or ".join(_FORMATS))] = Field(
        "auto", description=f"Format of the texts; auto: by their names ({', '.join(_FORMAT_ENDINGS)})."
    )
    column: str = Field(
        "text", min_length=1, description="The column of JSONL and Parquet files with the text; a.b is one inside a."
    )
    tokenizer: Annotated[str | None, Allowed(_TOKENIZERS)] = Field(
        None,
        description="Makes sentences of raw text; null: it is tokenised already.",
    )
    language: str | None = Field(None, description="The language of data.tokenizer=spacy, such as en; xx: many.")
    normalize: Names = Field((), description="Steps before the tokenizer: nfc, control, whitespace.")

    def _unused(self) -> dict[str, str]:
        unused = {}
        if self.format == "text":
            unused["column"] = "data.format=text has no columns; remove one of them"
        if self.tokenizer != "spacy":
            unused["language"] = f"data.tokenizer={self.tokenizer or 'null'} has no language; remove one of them"
        return unused

    def _contradictions(self) -> Iterator[str]:
        for step in self.normalize:
            if step not in NORMALIZATIONS:
                yield f"data.normalize={step}: must be among {', '.join(NORMALIZATIONS)}"


class TextConfig(FormConfig):
    """Section `data` as every verb with an index of its text has it."""

    test: Globs = Field((), description="The test text, which is measured by evaluate and at the end of a training.")
    prepared_dir: str | None = Field(
        None, description="The index, unpacked text and vocabulary are here; null: run.storage_path/prepared."
    )
    block_bytes: Int = Field(
        131072, ge=4096, le=16 << 20, description="Text is read in blocks of about this size, in bytes."
    )


class DataConfig(TextConfig):
    """Section `data` of a training."""

    train: Globs = Field(
        (), description="The training text, one sentence in each line; `sample` is the built-in corpus."
    )
    valid: Globs = Field((), description="The held-out text for validation during training.")
    vocab: str | None = Field(
        None,
        description="The vocabulary file; null counts data.train (finetune: null is the SOURCE's, counted counts).",
    )
    streams: Int = Field(
        32, ge=1, le=1 << 20, description="The number of rows of the global batch, which the workers share."
    )
    shuffle: Literal["blocks", "off"] = Field(
        "blocks", description="The order of an epoch: shuffled blocks, or the files in the given order."
    )
    holdout: float = Field(
        0.0, ge=0, lt=0.5, description="This share of data.train is set aside as validation text, documents whole."
    )
    deduplicate: Literal["off", "documents", "sentences"] = Field(
        "off", description="Exact repetitions of these in data.train are left out; the first one stays."
    )
    min_count: Int = Field(
        1, ge=1, le=10**12, description="Words that are seen less often are left out of a counted vocabulary."
    )
    max_vocab: Int | None = Field(
        None, ge=4, le=10**9, description="A counted vocabulary has at most this many lines; null: no limit."
    )

    def _unused(self) -> dict[str, str]:
        why = f"the vocabulary is read from data.vocab={self.vocab}; remove one of them"
        counted = {"min_count": why, "max_vocab": why} if self.vocab not in (None, COUNTED) else {}
        return {**super()._unused(), **counted}

    def _contradictions(self) -> Iterator[str]:
        yield from super()._contradictions()
        if self.valid and self.holdout > 0:
            yield (
                f"data.holdout={self.holdout} and data.valid both name validation text; remove one of them "
                "(data.valid=null, or data.holdout=0)"
            )
        for key in ("train", "valid", "test"):
            globs = getattr(self, key)
            if SAMPLE in globs and len(globs) > 1:
                yield f"data.{key} mixes `sample` with other text; the embedded corpus stands alone"


class ScheduleConfig(Section):
    """Section `optim.schedule`: how the learning rate changes."""

    path: ClassVar[str] = "optim.schedule."
    kind: Literal["constant", "linear", "cosine", "plateau"] = Field(
        "constant", description="How the learning rate changes after the warm-up; plateau: by validation."
    )
    warmup_steps: Int = Field(
        0, ge=0, le=10**12, description="In this many steps the learning rate rises linearly to lr."
    )
    final_ratio: float = Field(0.0, ge=0, le=1, description="The last learning rate, as a fraction of lr.")
    factor: float = Field(0.5, gt=0, lt=1, description="plateau multiplies the learning rate by this factor.")
    min_gain: float = Field(
        1.0, ge=0, le=LARGE, description="plateau: a gain is a perplexity that is lower by more than this."
    )
    patience: Int = Field(
        1, ge=1, le=10**6, description="plateau lowers the rate after this many validations in a row without a gain."
    )

    def _unused(self) -> dict[str, str]:
        if self.kind == "plateau":
            return {"final_ratio": "optim.schedule.kind=plateau ends at no certain rate"}
        why = f"optim.schedule.kind={self.kind} does not follow the validations; set optim.schedule.kind=plateau"
        unused = dict.fromkeys(("factor", "min_gain", "patience"), why)
        if self.kind == "constant":
            unused["final_ratio"] = "optim.schedule.kind=constant has no decay"
        return unused


class OptimConfig(Section):
    """Section `optim`."""

    path: ClassVar[str] = "optim."
    name: Literal["adagrad", "adamw", "sgd"] = Field(
        "adagrad",
        description="adagrad is the original's; adamw trains the dense parameters only; sgd is plain descent.",
    )
    lr: float = Field(0.2, gt=0, le=LARGE, description="The learning rate.")
    table_lr: float | None = Field(
        None, gt=0, le=LARGE, description="The rate of the word tables, which adamw leaves to Adagrad; null: lr or 0.2."
    )
    clip_norm: float = Field(
        10.0, gt=0, le=LARGE, description="Gradients are scaled down where their global norm is above this bound."
    )
    initial_accumulator: float = Field(1.0, gt=0, le=LARGE, description="The first value of Adagrad's sums of squares.")
    weight_decay: float = Field(0.0, ge=0, le=LARGE, description="The weight decay of adamw.")
    momentum: float = Field(0.0, ge=0, lt=1, description="The momentum of sgd: how much of a step goes on in the next.")
    schedule: ScheduleConfig = ScheduleConfig()
    part_lr: ComponentRates = ComponentRates()

    def _unused(self) -> dict[str, str]:
        unused = {}
        if self.name != "adamw":
            unused["weight_decay"] = f"optim.name={self.name} does not use it; set optim.name=adamw or remove it"
        if self.name != "sgd":
            unused["momentum"] = f"optim.name={self.name} does not use it; set optim.name=sgd or remove it"
        else:
            unused["initial_accumulator"] = "optim.name=sgd sums no squares; remove it"
        return unused


class TrainConfig(Section):
    """Section `train`."""

    path: ClassVar[str] = "train."
    unroll: Int = Field(
        20, ge=1, le=1 << 16, description="Positions of a stream in a step: the window of backpropagation."
    )
    reset: Reset = Field(0.01, description="When a stream starts from zero again; a number: chance per step.")
    dropout: DropoutRates = Field(
        0.1,
        description="The share dropped at the LSTM layers' inputs and last output.",
    )
    precision: Literal["fp32", "bf16", "fp64"] = Field(
        "fp32", description="bf16 computes products in bfloat16; fp64 is for tests."
    )
    accumulate: Int = Field(
        1, ge=1, le=1 << 20, description="A worker computes a step in this many micro-batches, to save memory."
    )
    gradients: Literal["full", "bf16"] = Field(
        "full", description="How workers send gradients; bf16 sends half the bytes, rounded."
    )
    kernels: Literal["auto", "off"] = Field(
        "auto", description="auto takes fast paths for the CPU and the GPU where there are any; off: the plain model."
    )
    duration: Duration = Field(Duration(10, "epochs"), description="How long to train.")
    validate_every: Duration | None = Field(Duration(1000, "steps"), description="How often to validate; null: never.")
    validate_positions: Int = Field(
        200_000, ge=1, le=10**15, description="A validation reads this many positions, in whole windows, or all."
    )
    checkpoint_every: Duration = Field(Duration(1000, "steps"), description="How often to write a checkpoint.")
    keep_last: Int = Field(
        3, ge=1, le=10**6, description="This many of the newest checkpoints are kept, and the best by validation."
    )
    log_every: Int = Field(50, ge=1, le=10**9, description="Metrics are recorded once in this many steps.")
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="What happens at a loss or gradient that is not finite: the run stops, or skips the step."
    )
    max_skips: Int = Field(10, ge=1, le=10**9, description="The run ends when this many steps are skipped.")
    profile: StepRange = Field(
        None, description="[first, last]: write a trace of these steps of worker 0, for Perfetto; null: none."
    )
    freeze: Names = Field((), description="These components are not trained, for example [char_cnn, highway, lstm.0].")
    softmax_first: Int | None = Field(
        None, ge=0, le=10**12, description="The softmax first trains alone this long; null: 1000 if it is new."
    )
    patience: Int | None = Field(
        None, ge=1, le=10**6, description="Training ends after this many validations in a row without a new best."
    )

    def _contradictions(self) -> Iterator[str]:
        if self.profile is None:
            return
        first, last = self.profile
        if not 1 <= first <= last:
            yield f"train.profile=[{first}, {last}]: must be the first and the last step, counted from 1"
        elif last - first >= MOST_PROFILED:
            yield f"train.profile=[{first}, {last}] has {last - first + 1} steps: must be <= {MOST_PROFILED}"

    def _unused(self) -> dict[str, str]:
        unused = {}
        if self.validate_every is None:
            unused["validate_positions"] = unused["patience"] = "train.validate_every=null never validates"
        if self.on_nonfinite == "stop":
            unused["max_skips"] = "train.on_nonfinite=stop skips no step"
        return unused


class WorkersConfig(Section):
    """Section `cluster` of every verb: what is said of its workers."""

    path: ClassVar[str] = "cluster."
    workers: Int = Field(
        1, ge=0, le=1 << 16, description="The number of worker processes; 0: the calling process, without Ray."
    )
    cpus_per_worker: float = Field(0.5, gt=0, le=4096, description="Ray reserves this many CPUs for each worker.")


class DeviceConfig(WorkersConfig):
    """Section `cluster` of a verb whose workers hold a model."""

    device: Literal["auto", "cpu", "gpu"] = Field(
        "auto", description="auto uses a GPU for each worker where the cluster has them."
    )
    threads: Int | None = Field(
        None, ge=1, le=4096, description="The number of torch threads of a worker; null: its share of the cores."
    )


class TaskConfig(WorkersConfig):
    """Section `cluster` of a verb whose work needs no device and has an end."""

    max_failures: Int = Field(
        3, ge=0, le=10**6, description="Lost workers are restarted this many times before the command gives up."
    )


class ComputeConfig(DeviceConfig, TaskConfig):
    """Section `cluster` of a verb that computes with a model and has an end."""


class ClusterConfig(ComputeConfig):
    """Section `cluster` of a training."""

    workers: Workers = Field(  # type: ignore[assignment]
        1, description="The processes; 0: this one, no Ray; [min, max]: as many as fit."
    )
    data_cpus: float = Field(
        0.25, gt=0, le=4096, description="Ray reserves this many CPUs for the data task of each worker."
    )
    timeout_s: float = Field(
        300.0, ge=1, le=86400, description="A worker gives up after it has waited this many seconds for another one."
    )
    resize_every_s: float = Field(
        60.0, ge=1, le=86400, description="How often, in seconds, to look for room for more of [min, max] workers."
    )

    network: str | None = Field(
        None,
        min_length=1,
        description="Workers on several hosts use this interface (eth1), or that in this network (10.1.0.0/16).",
    )

    def _unused(self) -> dict[str, str]:
        if self.elastic:
            return {}
        return {"resize_every_s": f"cluster.workers={self.workers} never changes; set it to [min, max]"}

    @property
    def elastic(self) -> bool:
        """Return True if the number of workers may change during the run."""
        return isinstance(self.workers, tuple)

    @property
    def fewest_workers(self) -> int:
        """Return the smallest number of workers."""
        return self.workers[0] if isinstance(self.workers, tuple) else self.workers

    @property
    def most_workers(self) -> int:
        """Return the largest number of workers."""
        return self.workers[1] if isinstance(self.workers, tuple) else self.workers


class EvalConfig(Section):
    """Section `evaluate`: how held-out text is measured."""

    path: ClassVar[str] = "evaluate."
    streams: Int = Field(
        32,
        ge=1,
        le=1 << 20,
        description="The text is read in at most this many streams, each of 200 positions or more.",
    )
    reset: Literal["never", "sentence"] = Field(
        "never",
        description="sentence starts each sentence from a zero state, in evaluate and for the final test text.",
    )
    rows: Int | None = Field(
        None,
        ge=1,
        le=1 << 20,
        description="Streams at a time; the result does not change. null: as suits the device.",
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="bf16 computes products in bfloat16, in evaluate and for the test text after training."
    )

    def _unused(self) -> dict[str, str]:
        return {"streams": "evaluate.reset=sentence depends on no stream"} if self.reset == "sentence" else {}


CheckpointName = Annotated[
    str, Field(min_length=1, description="Which checkpoint of a run to use: best, last, or its name.")
]


class InitConfig(Section):
    """Section `init`: where the weights come from. The key of `source` is `init.from`."""

    path: ClassVar[str] = "init."
    source: str | None = Field(
        None,
        alias="from",
        description="The SOURCE: a run, a checkpoint, or a model of bilm-tf or ELMoForManyLangs.",
    )
    options: str | None = Field(
        None, description="The options.json of bilm-tf's files; null takes the one beside them."
    )
    vocab: str | None = Field(
        None, description="The vocabulary of bilm-tf's files; null takes the vocab.txt beside them."
    )


class PretrainConfig(Root):
    """Configuration of `pretrain`."""

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    softmax: SoftmaxConfig = SoftmaxConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    cluster: ClusterConfig = ClusterConfig()
    evaluate: EvalConfig = EvalConfig()

    def _contradictions(self) -> Iterator[str]:
        if self.cluster.most_workers > self.data.streams:
            yield (
                f"cluster.workers={self.cluster.most_workers} exceeds data.streams={self.data.streams}; "
                "a worker needs a stream at least"
            )
        if self.cluster.most_workers * self.train.accumulate > max(self.data.streams, self.cluster.most_workers):
            yield (
                f"train.accumulate={self.train.accumulate} x cluster.workers={self.cluster.most_workers} exceeds "
                f"data.streams={self.data.streams}; a micro-batch needs a stream at least"
            )
        positions = self.data.streams * self.train.unroll
        if positions > _MOST_POSITIONS:
            yield (
                f"data.streams={self.data.streams} times train.unroll={self.train.unroll} makes steps of {positions} "
                f"positions: must be <= {_MOST_POSITIONS}"
            )
        if self.optim.momentum and self.softmax.facts.samples_words:
            yield (
                f"optim.momentum={self.optim.momentum} moves all rows of the word tables in every step, and "
                f"softmax.kind={self.softmax.kind} only the rows that a step touches; set softmax.kind=full or "
                "optim.momentum=0"
            )
        if self.optim.schedule.kind == "plateau" and self.train.validate_every is None:
            yield "optim.schedule.kind=plateau follows the validations, but train.validate_every=null never validates"
        elif self.optim.schedule.kind == "plateau" and not self._has_valid_text:
            yield "optim.schedule.kind=plateau follows the validations: set data.valid or data.holdout"
        if self.softmax.tied and self.model.input != "words":
            yield "softmax.tied=true needs model.input=words: there is no word table to share"
        yield from self._component_problems()

    def _component_problems(self) -> Iterator[str]:
        return component_problems(self)

    @property
    def _has_valid_text(self) -> bool:
        return bool(self.data.valid) or self.data.holdout > 0 or self.data.train in ((), (SAMPLE,))

    def _unused(self) -> dict[str, str]:
        if self._has_valid_text or self.train.validate_every is None:
            return {}
        why = "there is no validation text; set data.valid or data.holdout, or remove it"
        return {"train.validate_every": why, "train.validate_positions": why, "train.patience": why}

    def required(self) -> dict[str, str]:
        return {} if self.data.train else {"data.train": "set it to a glob of text files, or to `sample`"}


class PrepareConfig(PretrainConfig):
    """Configuration of `prepare`: the file of a pretrain run, of which only run, data and cluster are used."""


class EvaluateConfig(Root):
    """Configuration of `evaluate`."""

    absent = {"run": "evaluate makes no run: of this section it has only run.storage_path; remove it"}

    run: StorageConfig = StorageConfig()
    data: TextConfig = TextConfig()
    evaluate: EvalConfig = EvalConfig()
    cluster: ComputeConfig = ComputeConfig()
    init: InitConfig = InitConfig()
    checkpoint: CheckpointName = "best"

    def required(self) -> dict[str, str]:
        return {} if self.data.test else {"data.test": "set it to a glob of text files, or to `sample`"}


class FormatConfig(Section):
    """Section `export`."""

    path: ClassVar[str] = "export."
    format: Literal["bilm", "checkpoint", "safetensors"] = Field(
        "bilm",
        description="bilm-tf's files; a checkpoint with the optimizer; or a folder for the Hub.",
    )


class ExportConfig(Root):
    """Configuration of `export`."""

    absent = {
        "run": "export writes to OUT and makes no run; remove it",
        "data": "export reads a SOURCE and no text; remove it",
    }

    cluster: TaskConfig = TaskConfig()
    init: InitConfig = InitConfig()
    checkpoint: CheckpointName = "best"
    out: str | None = Field(None, description="OUT: the folder to write.")
    export: FormatConfig = FormatConfig()


class ReportConfig(Root):
    """Configuration of `report`."""

    absent = {
        "run": "report writes to `out` and makes no run; remove it",
        "data": "report reads the records of a RUN and no text; remove it",
        "checkpoint": "report reads the best checkpoint of a RUN; remove it",
        "cluster": "report works in this process alone; remove it",
    }

    runs: Globs = Field((), description="RUN: the folders of runs and of sweeps; a sweep stands for its trials.")
    out: str | None = Field(
        None,
        description="The folder for report.html and its PNGs; null takes that of the RUN, or report-A-B for several.",
    )
    to: Names = Field((), description="Also send what these trackers do not have of each RUN: wandb, mlflow.")
    words: Globs = Field(
        (), description="Show the nearest neighbours of these words; none: of frequent words of the first run."
    )

    def _contradictions(self) -> Iterator[str]:
        for name in self.to:
            if name not in SENT_TO:
                yield f"to={show(name)}: must be among {', '.join(SENT_TO)}"


_TABLES = ("word_embedding", "softmax")


def component_problems(config: PretrainConfig) -> Iterator[str]:
    """Yield a message for each value of `train.freeze`, `train.softmax_first` and `optim.part_lr` that does not fit."""
    components, freeze, rates = config.model.components(), config.train.freeze, config.optim.part_lr
    for component in freeze:
        if component not in components:
            yield f"train.freeze has {component}: the model's components are {', '.join(components)}"
    if set(components) <= set(freeze):
        yield "train.freeze has all components of the model: nothing is left to train"
    if config.train.softmax_first and "softmax" in freeze:
        yield f"train.softmax_first={config.train.softmax_first} trains the softmax, but train.freeze has it"
    if config.softmax.tied and len(set(_TABLES) & set(freeze)) == 1:
        yield "train.freeze: softmax.tied=true makes word_embedding and softmax one table; freeze both or neither"
    layers = config.model.lstm.n_layers
    if isinstance(rates.lstm, tuple) and len(rates.lstm) != layers:
        yield f"optim.part_lr.lstm has {len(rates.lstm)} rates: model.lstm.n_layers={layers}"
    names = [name for name in type(rates).model_fields if name != "lstm"]
    for component in (*names, *(f"lstm.{layer}" for layer in range(layers))):
        if rates.rate(component) is None:
            continue
        key = "optim.part_lr." + component.split(".")[0]
        if component not in components:
            yield f"{key} is set, but the model's components are {', '.join(components)}"
        elif component in freeze:
            yield f"{key} is set, but train.freeze has {component}; remove one of them"
