"""The settings of every verb: typed, frozen, strict; the same names in YAML, overrides, errors and `--help`.

A root class per verb (`PretrainConfig`, `PrepareConfig`, `EvaluateConfig`, ...) is made of sections.
`Root.from_dict` and `to_dict` go to and from plain values; `command_line.load_config` reads YAML and overrides.

Which settings of parts of a model (frozen, with a rate of their own) do not fit the model or each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from elmo_ray.config.model import LARGE, CharCnnConfig, LstmConfig, ModelConfig, PartRates, Reset, Workers
from elmo_ray.config.schema import Allowed, Duration, Globs, Int, Names, Root, Section
from elmo_ray.errors import ConfigError

__all__ = [
    "SAMPLE", "CharCnnConfig", "ClusterConfig", "ComputeConfig", "DataConfig", "Duration", "EvalConfig",
    "EvaluateConfig", "ExportConfig", "FormatConfig", "InitConfig", "LstmConfig", "ModelConfig", "OptimConfig",
    "PrepareConfig", "PretrainConfig", "ReportConfig", "RunConfig", "ScheduleConfig", "SoftmaxConfig", "StorageConfig",
    "TaskConfig", "TextConfig", "TrainConfig",
]  # fmt: skip

SAMPLE = "sample"  # data.train: the embedded corpus
COUNTED = "counted"  # data.vocab of finetune: not the SOURCE's

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._=+-]*$"

_MOST_POSITIONS = 1 << 25  # of a step: some GB of indices before any product


class StorageConfig(Section):
    path: ClassVar[str] = "run."
    storage_path: str = Field("runs", min_length=1, description="folder of all runs; nothing is written outside of it")


class RunConfig(StorageConfig):
    name: Annotated[str | None, Allowed("a file name without a slash, or null")] = Field(
        None,
        pattern=_NAME,
        max_length=200,
        description="the run's folder under run.storage_path; null: made from the date",
    )
    seed: Int = Field(1, ge=0, lt=2**63, description="of initial values, order of blocks, dropout and negatives")
    export: bool = Field(True, description="write export/ with weights.hdf5, options.json and vocab.txt at the end")


class TextConfig(Section):
    """What any verb needs to know about text."""

    path: ClassVar[str] = "data."
    test: Globs = Field((), description="test text, for evaluate")
    prepared_dir: str | None = Field(
        None, description="index, unpacked shards, vocabulary; null: under run.storage_path"
    )
    block_bytes: Int = Field(131072, ge=4096, le=16 << 20, description="size of the blocks that text is read in")
    on_error: Literal["fail", "replace"] = Field("fail", description="what bytes that are not UTF-8, and NULs, do")


class DataConfig(TextConfig):
    train: Globs = Field((), description="training text, one sentence a line; `sample` is the embedded corpus")
    valid: Globs = Field((), description="held-out text for validation while training")
    vocab: str | None = Field(
        None,
        description="vocabulary file; null: counted from data.train (finetune: the SOURCE's; `counted` counts)",
    )
    streams: Int = Field(32, ge=1, le=1 << 20, description="rows of the global batch, dealt to the workers")
    shuffle: Literal["blocks", "off"] = Field(
        "blocks", description="order of an epoch: shuffled blocks, or files as listed"
    )
    holdout: float = Field(0.0, ge=0, lt=0.5, description="share of data.train's blocks set aside as validation text")
    min_count: Int = Field(1, ge=1, le=10**12, description="words seen less often are left out of a counted vocabulary")
    max_vocab: Int | None = Field(
        None, ge=4, le=10**9, description="most lines of a counted vocabulary; null: no limit"
    )

    def _unused(self) -> dict[str, str]:
        why = f"the vocabulary is read from data.vocab={self.vocab}; remove one of them"
        return {"min_count": why, "max_vocab": why} if self.vocab not in (None, COUNTED) else {}

    def _contradictions(self) -> Iterator[str]:
        if self.valid and self.holdout > 0:
            yield f"data.holdout={self.holdout} and data.valid both name validation text; remove one of them"
        for key in ("train", "valid", "test"):
            globs = getattr(self, key)
            if SAMPLE in globs and len(globs) > 1:
                yield f"data.{key} mixes `sample` with other text; the embedded corpus stands alone"


ADAPTIVE_WORDS = 20
"""Fewest words of a vocabulary that an adaptive softmax divides."""


class SoftmaxConfig(Section):
    path: ClassVar[str] = "softmax."
    kind: Literal["sampled", "full", "adaptive"] = Field(
        "sampled",
        description="how losses are computed in training; evaluation is always exact. adaptive: rare words in clusters "
        "with smaller vectors (Grave et al. 2017), for a vocabulary in falling count",
    )
    negatives: Int = Field(
        1024, ge=1, le=1 << 24, description="sampled words of a step and direction, shared by all positions"
    )
    tied: bool = Field(False, description="use the word table of model.input=words as the softmax's weights")

    def _unused(self) -> dict[str, str]:
        unused = {"negatives": f"softmax.kind={self.kind} samples no words; remove one of them"}
        return unused if self.kind != "sampled" else {}

    def _contradictions(self) -> Iterator[str]:
        if self.kind == "adaptive" and self.tied:
            yield "softmax.kind=adaptive has no table for all words, so softmax.tied=true has nothing to share"

    def check_vocabulary(self, n_words: int) -> None:
        """Raises ConfigError where there are not enough words to draw the negatives from."""
        if self.kind == "sampled" and self.negatives >= n_words:
            raise ConfigError(
                f"softmax.negatives={self.negatives}: must be below the number of words in the vocabulary, {n_words}"
            )
        if self.kind == "adaptive" and n_words < ADAPTIVE_WORDS:
            raise ConfigError(
                f"softmax.kind=adaptive needs a vocabulary of {ADAPTIVE_WORDS} words or more to cut into clusters, and "
                f"there are {n_words}; use softmax.kind=full"
            )


class ScheduleConfig(Section):
    path: ClassVar[str] = "optim.schedule."
    kind: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="of the learning rate after the warm-up"
    )
    warmup_steps: Int = Field(0, ge=0, le=10**12, description="steps of linear rise to lr")
    final_ratio: float = Field(0.0, ge=0, le=1, description="last learning rate as a part of lr")

    def _unused(self) -> dict[str, str]:
        return {"final_ratio": "optim.schedule.kind=constant has no decay"} if self.kind == "constant" else {}


class OptimConfig(Section):
    path: ClassVar[str] = "optim."
    name: Literal["adagrad", "adamw"] = Field(
        "adagrad", description="adagrad is the original's; adamw is for dense parameters"
    )
    lr: float = Field(0.2, gt=0, le=LARGE, description="learning rate")
    table_lr: float | None = Field(
        None, gt=0, le=LARGE, description="of the word tables, which keep Adagrad under adamw; null: lr"
    )
    clip_norm: float = Field(10.0, gt=0, le=LARGE, description="bound of the global norm of all gradients")
    initial_accumulator: float = Field(1.0, gt=0, le=LARGE, description="first value of Adagrad's sums of squares")
    weight_decay: float = Field(0.0, ge=0, le=LARGE, description="of adamw")
    schedule: ScheduleConfig = ScheduleConfig()
    part_lr: PartRates = PartRates()

    def _unused(self) -> dict[str, str]:
        if self.name == "adamw":
            return {}
        return {"weight_decay": "optim.name=adagrad does not use it; set optim.name=adamw or remove it"}


class TrainConfig(Section):
    path: ClassVar[str] = "train."
    unroll: Int = Field(
        20, ge=1, le=1 << 16, description="positions of a stream in a step: the window of backpropagation"
    )
    reset: Reset = Field(0.01, description="when a stream starts from zero again (probability per step)")
    dropout: float = Field(0.1, ge=0, lt=1, description="on the input of every LSTM layer and on the last output")
    precision: Literal["fp32", "bf16", "fp64"] = Field("fp32", description="bf16: products only; fp64: for tests")
    accumulate: Int = Field(
        1, ge=1, le=1 << 20, description="parts that a worker computes a step in, one after the other, to save memory"
    )
    gradients: Literal["full", "bf16"] = Field(
        "full", description="how gradients travel between workers; bf16: half the bytes, rounded"
    )
    kernels: Literal["auto", "off"] = Field(
        "auto", description="fast paths for the CPU and the GPU, where there are some; off: the plain model everywhere"
    )
    duration: Duration = Field(Duration(10, "epochs"), description="how long to train")
    validate_every: Duration | None = Field(Duration(1000, "steps"), description="how often to validate; null: never")
    validate_positions: Int = Field(200_000, ge=1, le=10**15, description="most positions of a validation")
    checkpoint_every: Duration = Field(Duration(1000, "steps"), description="how often to write a checkpoint")
    keep_last: Int = Field(3, ge=1, le=10**6, description="checkpoints kept, besides the best by validation")
    log_every: Int = Field(50, ge=1, le=10**9, description="steps between two records of metrics")
    on_nonfinite: Literal["stop", "skip"] = Field("stop", description="what a loss or gradient that is not finite does")
    max_skips: Int = Field(10, ge=1, le=10**9, description="skipped steps that end the run")
    freeze: Names = Field((), description="parts that are not trained, such as [char_cnn, highway, lstm.0]")
    softmax_first: Int | None = Field(
        None, ge=0, le=10**12, description="first steps, of the softmax alone; null: 1000 where it is new"
    )
    patience: Int | None = Field(
        None, ge=1, le=10**6, description="validations in a row without a new best that end training"
    )

    def _unused(self) -> dict[str, str]:
        unused = {}
        if self.validate_every is None:
            unused["validate_positions"] = unused["patience"] = "train.validate_every=null never validates"
        if self.on_nonfinite == "stop":
            unused["max_skips"] = "train.on_nonfinite=stop skips no step"
        return unused


class TaskConfig(Section):
    path: ClassVar[str] = "cluster."
    workers: Int = Field(1, ge=0, le=1 << 16, description="worker processes; 0: in the calling process, without Ray")
    cpus_per_worker: float = Field(0.5, gt=0, le=4096, description="CPUs that Ray reserves for a worker")
    max_failures: Int = Field(3, ge=0, le=10**6, description="restarts after lost workers before giving up")


class ComputeConfig(TaskConfig):
    device: Literal["auto", "cpu", "gpu"] = Field(
        "auto", description="auto: a GPU for each worker where the cluster has them"
    )
    threads: Int | None = Field(
        None, ge=1, le=4096, description="torch threads of a worker; null: its share of the cores"
    )


class ClusterConfig(ComputeConfig):
    workers: Workers = Field(  # type: ignore[assignment]
        1, description="processes; 0: this one, without Ray; [min, max]: as many as fit"
    )
    data_cpus: float = Field(0.25, gt=0, le=4096, description="CPUs of a data task; each worker runs one")
    timeout_s: float = Field(
        300.0, ge=1, le=86400, description="seconds after which a worker that waits for another gives up"
    )
    resize_every_s: float = Field(
        60.0, ge=1, le=86400, description="seconds between two looks for room for more of [min, max] workers"
    )

    def _unused(self) -> dict[str, str]:
        if self.elastic:
            return {}
        return {"resize_every_s": f"cluster.workers={self.workers} never changes; set it to [min, max]"}

    @property
    def elastic(self) -> bool:
        return isinstance(self.workers, tuple)

    @property
    def fewest_workers(self) -> int:
        return self.workers[0] if isinstance(self.workers, tuple) else self.workers

    @property
    def most_workers(self) -> int:
        return self.workers[1] if isinstance(self.workers, tuple) else self.workers


class EvalConfig(Section):
    path: ClassVar[str] = "evaluate."
    streams: Int = Field(
        32, ge=1, le=1 << 20, description="contiguous parts that the text is read in, each from zero states"
    )
    reset: Literal["never", "sentence"] = Field("never", description="sentence: zero states at each sentence")
    rows: Int = Field(128, ge=1, le=1 << 20, description="streams computed at a time; the result does not depend on it")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="bf16: products only; of `evaluate` and of the final test text"
    )

    def _unused(self) -> dict[str, str]:
        return {"streams": "evaluate.reset=sentence depends on no stream"} if self.reset == "sentence" else {}


class InitConfig(Section):
    """Where weights come from; the key of `source` is `init.from`."""

    path: ClassVar[str] = "init."
    source: str | None = Field(
        None, alias="from", description="SOURCE: run, checkpoint, bilm-tf save folder, or weights.hdf5"
    )
    options: str | None = Field(None, description="options.json of bilm-tf's files; null: the one beside them")
    vocab: str | None = Field(None, description="vocabulary of bilm-tf's files; null: a vocab.txt beside them")


class PretrainConfig(Root):
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
                f"data.streams={self.data.streams}; a part needs a stream at least"
            )
        positions = self.data.streams * self.train.unroll
        if positions > _MOST_POSITIONS:
            yield (
                f"data.streams={self.data.streams} times train.unroll={self.train.unroll} makes steps of {positions} "
                f"positions: must be <= {_MOST_POSITIONS}"
            )
        if self.softmax.tied and self.model.input != "words":
            yield "softmax.tied=true needs model.input=words: there is no word table to share"
        yield from self._part_problems()

    def _part_problems(self) -> Iterator[str]:
        return part_problems(self)

    def _unused(self) -> dict[str, str]:
        text = self.data.valid or self.data.holdout > 0 or self.data.train in ((), (SAMPLE,))
        if text or self.train.validate_every is None:
            return {}
        why = "there is no validation text; set data.valid or data.holdout, or remove it"
        return {"train.validate_every": why, "train.validate_positions": why, "train.patience": why}

    def required(self) -> dict[str, str]:
        return {} if self.data.train else {"data.train": "set it to a glob of text files, or to `sample`"}


class PrepareConfig(PretrainConfig):
    """The file of a pretrain run; only run, data and cluster matter to `prepare`."""


class EvaluateConfig(Root):
    run: StorageConfig = StorageConfig()
    data: TextConfig = TextConfig()
    evaluate: EvalConfig = EvalConfig()
    cluster: ComputeConfig = ComputeConfig()
    init: InitConfig = InitConfig()
    checkpoint: str = Field("best", min_length=1, description="of a run: best, last, or a checkpoint's name")

    def required(self) -> dict[str, str]:
        return {} if self.data.test else {"data.test": "set it to a glob of text files, or to `sample`"}


class FormatConfig(Section):
    path: ClassVar[str] = "export."
    format: Literal["bilm", "checkpoint"] = Field(
        "bilm",
        description="bilm: weights.hdf5, options.json, vocab.txt; checkpoint: elmo_ray's, with softmax and slots",
    )


class ExportConfig(Root):
    cluster: TaskConfig = TaskConfig()
    init: InitConfig = InitConfig()
    checkpoint: str = Field("best", min_length=1, description="of a run: best, last, or a checkpoint's name")
    out: str | None = Field(None, description="OUT: the folder to write")
    export: FormatConfig = FormatConfig()


class ReportConfig(Root):
    runs: Globs = Field((), description="RUN ...: folders of runs")
    out: str | None = Field(None, description="folder for report.html and its PNGs; null: the first run's folder")
    words: Globs = Field((), description="words whose nearest neighbours are shown; none: some frequent English ones")


if TYPE_CHECKING:
    pass

_TABLE_PARTS = ("word_embedding", "softmax")


def part_problems(config: PretrainConfig) -> Iterator[str]:
    """Messages for `train.freeze`, `train.softmax_first` and `optim.part_lr`, checked against `config.model`."""
    parts, freeze, rates = config.model.parts(), config.train.freeze, config.optim.part_lr
    for part in freeze:
        if part not in parts:
            yield f"train.freeze has {part}: the model's parts are {', '.join(parts)}"
    if set(parts) <= set(freeze):
        yield "train.freeze has all parts of the model: nothing is left to train"
    if config.train.softmax_first and "softmax" in freeze:
        yield f"train.softmax_first={config.train.softmax_first} trains the softmax, but train.freeze has it"
    if config.softmax.tied and len(set(_TABLE_PARTS) & set(freeze)) == 1:
        yield "train.freeze: softmax.tied=true makes word_embedding and softmax one table; freeze both or neither"
    layers = config.model.lstm.n_layers
    if isinstance(rates.lstm, tuple) and len(rates.lstm) != layers:
        yield f"optim.part_lr.lstm has {len(rates.lstm)} rates: model.lstm.n_layers={layers}"
    for part in (*(name for name in type(rates).model_fields if name != "lstm"), *(f"lstm.{i}" for i in range(layers))):
        if rates.rate(part) is None:
            continue
        key = "optim.part_lr." + part.split(".")[0]
        if part not in parts:
            yield f"{key} is set, but the model's parts are {', '.join(parts)}"
        elif part in freeze:
            yield f"{key} is set, but train.freeze has {part}; remove one of them"
