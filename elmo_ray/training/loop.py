"""The training loop of one worker, with or without Ray: take a batch, step, log, validate, save."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from elmo_ray.checkpoints.identity import (
    SOURCE_WORDS,
    conditions,
    identity,
    is_initial,
    saved_settings,
    start_messages,
)
from elmo_ray.checkpoints.read import Checkpoint, open_checkpoint
from elmo_ray.config.schema import Duration
from elmo_ray.data.corpus import Corpus
from elmo_ray.data.encode import thread_source
from elmo_ray.data.streams import (
    StreamCursors,
    StreamLoader,
    StreamPlan,
    fewer_streams_note,
    held_out_streams,
    split_evenly,
)
from elmo_ray.data.vocabulary import Vocabulary
from elmo_ray.elmo.scoring import LossSums, Validation, character_table
from elmo_ray.errors import CheckpointError, ElmoRayError, TrainingError
from elmo_ray.machine import keep_freed_memory, memory_in_use
from elmo_ray.model.bilm import BiLM
from elmo_ray.storage.local_copy import local_copy_of
from elmo_ray.training.assembler import StepAssembler
from elmo_ray.training.capacities import Capacities
from elmo_ray.training.captured_step import captured_by
from elmo_ray.training.cuda_graphs import record_for
from elmo_ray.training.feeding import Feeder, ReadyBatch
from elmo_ray.training.flops import FlopCounter, peak_tflops
from elmo_ray.training.metrics import MetricsWriter, not_finite, sinks_of, train_record, valid_record
from elmo_ray.training.plan import TrainPlan, Worker
from elmo_ray.training.profile import TracedSteps, no_trace
from elmo_ray.training.ranks import Exchange, Flags, Ranks
from elmo_ray.training.saver import Saver, claim_attempt
from elmo_ray.training.snapshot import MOST_AMOUNT, Progress, Snapshot, load_model
from elmo_ray.training.step import DTYPES, TrainStep
from elmo_ray.training.step_input import StepInput

LAST_SAVE_PAUSES_S = (0.5, 5.0, 30.0)
"""Pauses before further attempts at the last checkpoint; without it all steps since the one before would be lost."""

_PUSHED = ("metrics/*", "tensorboard/*", "logs/*", "profile/*")
"""Files that a run in an object store copies there while it goes on."""


def train(plan: TrainPlan, worker: Worker) -> dict[str, Any]:
    """Train to the end of `train.duration`, or until a stop is requested.

    Training continues from the newest whole checkpoint of the run. Returns plain values, among them steps, positions,
    finished, stopped, best_perplexity, best_step, checkpoint and seconds. Raises the same ElmoRayError on all ranks.
    """
    keep_freed_memory()
    return _Run(plan, worker).run()


class _Run:
    def __init__(self, plan: TrainPlan, worker: Worker):
        self.plan, self.worker, self.config = plan, worker, plan.config
        self.ranks = Ranks(worker.rank, worker.world, self.config.cluster.timeout_s)
        error: ElmoRayError | None = None
        try:
            self._read_data()
        except ElmoRayError as problem:
            error = problem
        self.ranks.agree(error)
        self.attempt = self.ranks.run_on_rank_zero(partial(claim_attempt, plan.run_dir))
        self.step = self._build_step()
        self.progress = Progress()
        self.cursors = StreamCursors.start(len(self.streams))
        # [D + 1] loss of each direction and positions of this rank since the last record, of finite steps only
        self.sums = torch.zeros(self.model.directions + 1, dtype=torch.float64, device=worker.device)
        # step, norm and losses of the first step that was not finite since they were last read; step 0: there was none
        self.first_bad = torch.zeros(2 + self.model.directions, dtype=torch.float64, device=worker.device)
        self.not_finite = torch.zeros((), dtype=torch.int64, device=worker.device)
        self.seen_not_finite = 0
        self.files = local_copy_of(plan.run_dir)
        self.files.keep_pushing(*_PUSHED)
        self.metrics: MetricsWriter | None = None
        if worker.rank == 0:
            self.metrics = MetricsWriter(self.files.folder, self.attempt, sinks_of(self.config.run.report_to))
            peak_tflops(worker.device, self.config.train.precision)  # measured before the first step is timed
        self.flops = FlopCounter(self.model, self.config)
        self.speeds: list[tuple[float, float]] = []  # TFLOP/s of a worker and share of its peak, of each record
        self.saver = Saver(plan.run_dir, self.attempt, self.ranks, self.config.train.keep_last, worker.register)
        # before each checkpoint, so that the store never has a checkpoint without the metrics before it
        self.saver.writer.before = partial(self.files.push, *_PUSHED)
        self.start_checkpoint: Checkpoint | None = None  # of a model that was trained before, to be measured first
        self.measured_otherwise: list[str] = []  # how held-out text was measured before this start, where it differs
        self._resume()
        self.started = time.monotonic()
        self.window_start, self.window_pause, self.window_waited = self.started, 0.0, 0.0
        self.save_wanted = self.best_wanted = False
        self.best_before: tuple[float | None, int | None] = None, None

    def _read_data(self) -> None:
        """Open the vocabulary and the texts, and derive from them the streams and numbers of steps."""
        config, worker = self.config, self.worker
        self.vocabulary = Vocabulary.read(self.plan.vocabulary_path)
        config.softmax.check_vocabulary(self.vocabulary.size)
        corpus = Corpus.load(self.plan.corpus_path)
        corpus.check_files()
        seed, duration = config.run.seed, config.train.duration
        whole = duration.unit == "epochs" and duration.amount == int(duration.amount)
        self.streams_plan = StreamPlan(
            corpus, config.data.streams, seed, config.data.shuffle == "blocks", int(duration.amount) if whole else None
        )
        self.total_steps = self._steps(duration)
        self.checkpoint_every = self._steps(config.train.checkpoint_every)
        self.streams = split_evenly(config.data.streams, worker.world)[worker.rank]
        self.dtype = torch.bfloat16 if config.train.precision == "bf16" else None
        self.valid_plan, self.valid_note = None, None
        if self.plan.valid_path is not None and config.train.validate_every is not None:
            text, most = Corpus.load(self.plan.valid_path), config.evaluate.streams
            # A function of the text and the settings alone, so that it is equal on all ranks and after a resume.
            positions = min(text.positions, config.train.validate_positions)
            self.valid_plan = StreamPlan(text, held_out_streams(positions, most), 0, False, 1)
            self.valid_note = fewer_streams_note("a validation reads", positions, most)
            self.validate_every = self._steps(config.train.validate_every)

    def _steps(self, duration: Duration) -> int:
        if duration.unit == "epochs":
            return max(1, self.streams_plan.steps(duration.amount, self.config.train.unroll))
        return duration.steps(self.config.data.streams * self.config.train.unroll, self.streams_plan.positions)

    def _build_step(self) -> TrainStep:
        config, worker = self.config, self.worker
        model = BiLM(config.model, config.softmax, self.vocabulary.size).to(DTYPES[config.train.precision])
        model.reset_parameters(config.run.seed)
        self.model = model.to(worker.device)
        capture = captured_by(worker.record or record_for(config, self.model))
        step = TrainStep(config, self.model, len(self.streams), worker.rank, worker.world, self.total_steps, capture)
        self.validation: Validation | None = None
        if self.valid_plan is not None:
            # read in this process and not by Ray tasks, whose CPUs the paused training pipeline holds
            source = partial(
                thread_source,
                vocabulary=self.vocabulary,
                max_characters=config.model.char_cnn.max_characters,
                look_ahead=2,
                on_error=config.data.on_error,
            )
            self.validation = Validation(
                self.valid_plan,
                split_evenly(self.valid_plan.n_streams, worker.world)[worker.rank],
                source,
                self.vocabulary,
                config.train.unroll,
                config.train.validate_positions,
                self.model,
                self.dtype,
            )
        return step

    # ---------------------------------------------------------------- start

    def _identity(self) -> dict[str, Any]:
        return identity(self.config, self.streams_plan.corpus.fingerprint, self.vocabulary.sha256)

    def _resume(self) -> None:
        path = self.ranks.run_on_rank_zero(self.saver.newest)
        error: ElmoRayError | None = None
        checkpoint: Checkpoint | None = None
        try:
            if path is not None:
                checkpoint = open_checkpoint(path, verify=False)  # rank 0 has verified it
                snapshot = Snapshot.load(checkpoint, self._identity(), self.step, self.streams)
                self.saver.last, self.saver.last_step = checkpoint, checkpoint.step
                self.progress, self.cursors, self.sums = snapshot.progress, snapshot.cursors, snapshot.window_sums
        except ElmoRayError as problem:
            error = problem
        self.ranks.agree(error)
        self.step.optimizer.rate_factor = self.progress.rate_factor
        if path is not None and checkpoint is not None:
            self.resumed_from = start = path
            best_step = self.progress.best_step
            self.ranks.run_on_rank_zero(lambda: self.saver.restore_best(start, best_step))
            self.start_checkpoint = self.saver.last if is_initial(checkpoint) else None
            self.measured_otherwise = self._measure_changes(checkpoint)
        for message in start_messages(checkpoint, self.config, self.total_steps, self.ranks.world, self._conditions()):
            self._event(message)
        if self.valid_note is not None:
            self._event(self.valid_note)

    def _measure(self) -> dict[str, Any] | None:
        """Return what decides how a validation measures; perplexities of two validations compare if it is equal."""
        if self.valid_plan is None:
            return None
        text, positions = self.valid_plan.corpus, self.config.train.validate_positions
        return {
            "text": text.fingerprint,
            "streams": self.valid_plan.n_streams,
            "positions": min(text.positions, positions),
        }

    def _measure_changes(self, checkpoint: Checkpoint) -> list[str]:
        """Return in which respects validations before this checkpoint measured in another way, as text."""
        now = self._measure()
        before = checkpoint.manifest.get("validation")
        if now is None or self.progress.best_perplexity is None:
            return []
        if not isinstance(before, dict):
            # An older version did not write it, and took evaluate.streams for a text of any length.
            before = {"streams": saved_settings(checkpoint).get("evaluate.streams", now["streams"])}
        return [
            "another text" if key == "text" else f"{key} {before[key]} -> {value}"
            for key, value in now.items()
            if before.get(key, value) != value
        ]

    def _conditions(self) -> dict[str, Any]:
        return conditions(self.worker.device, self.config.train.precision)

    def _event(self, message: str) -> None:
        if self.metrics is not None:
            self.metrics.write({"kind": "event", "step": self.progress.step, "message": message})

    # ---------------------------------------------------------------- loop

    def run(self) -> dict[str, Any]:
        """Train from where the run is to its end or to a stop, and return what `train` returns."""
        if self._is_over():
            self._close(stopped=False)
            return self._result(stopped=False)
        if self.start_checkpoint is not None and self.validation is not None:
            self._measure_start(self.start_checkpoint)
        if self.measured_otherwise:
            self._measure_best_again()
        feeder, traced = self._feeder(), self._traced_steps()
        train_on = self._train_on if traced is None else traced
        first = True
        for ready in feeder:
            if self._is_over():
                continue  # the feeder is some steps ahead on all ranks, and ends by the flag that stops it
            if self.step.begin(self.progress.step) or first:
                self.step.settle(ready.batch)
            if first:
                first = False
                self._start_clock()
                ready.waited = 0.0  # a wait for the start of everything, not for text
            train_on(ready)
            self.saver.poll(ready.flags)
            self._note_lost_best()
            if self._is_log_step():
                if traced is not None:
                    self.window_pause += traced.seconds
                    traced.seconds = 0.0
                self._log(ready.batch)
            if self.validation is not None and self._is_due(self.validate_every):
                self._validate()
            self._save_if_due(ready.flags)
        if traced is not None:
            traced.close()
        # The feeder may also end because a stop came while it waited for text.
        stopped = not self._is_over()
        self._save_last()
        self._note_early_end()
        self._close(stopped)
        return self._result(stopped)

    def _feeder(self) -> Feeder:
        """Return the batches of all steps that are left, which are made ahead of the training."""
        config, n_words = self.config, self.vocabulary.size
        characters = character_table(self.model, self.vocabulary)
        loader = StreamLoader(
            self.streams_plan,
            self.streams,
            self.cursors,
            self.worker.source,
            self.vocabulary,
            config.train.unroll,
            characters,
            self.model.directions,
        )
        assembler = StepAssembler(config, n_words, self.streams, Exchange(self.ranks))
        steps = range(self.progress.step, self.total_steps)
        capacities = Capacities.of(config, n_words, characters, len(self.streams)) if self.step.captured else None
        device, own_process = self.worker.device, self.worker.feed_process
        if own_process is None:
            # there the training thread only launches; on a CPU it computes, and a process more takes a core from it
            own_process = device.type == "cuda" and capacities is not None
        return Feeder(loader, assembler, steps, self._flags, device, capacities=capacities, own_process=own_process)

    def _start_clock(self) -> None:
        """Measure time from here, the first step of this start."""
        self.started = self.window_start = time.monotonic()
        self.window_pause = 0.0

    def _is_due(self, every: int) -> bool:
        """Return whether what is done every so many steps, and after the last one, is to be done now."""
        step = self.progress.step
        return step % every == 0 or step == self.total_steps

    def _save_if_due(self, flags: Flags) -> None:
        """Start to save a checkpoint if one is wanted and the one before it is written."""
        if self._is_due(self.checkpoint_every) or flags.save:
            self.save_wanted = True
        if self.best_wanted and self.saver.busy:
            self.saver.finish()  # wait, for the weights after the next step are no longer the best ones
            self._note_lost_best()
        stopping = flags.stop and not self._is_over()  # then `_save_last` follows
        if self.save_wanted and not self.saver.busy and not stopping:
            self._save()

    def _note_early_end(self) -> None:
        """Log that training ends before the last step, if it does."""
        progress = self.progress
        if self._is_over() and progress.step < self.total_steps:
            self._event(
                f"{progress.stale} validations without a better perplexity than that of step {progress.best_step}: "
                f"training ends at step {progress.step} (train.patience)"
            )

    def _traced_steps(self) -> TracedSteps | None:
        """Return the function that trains and traces the steps of `train.profile`; None where there are none."""
        steps = self.config.train.profile
        if steps is None or self.worker.rank > 0:
            return None
        if line := no_trace(*steps, self.progress.step, self.total_steps):
            self._event(line)
        return TracedSteps(self._train_on, self.progress, *steps, self.files.folder, self._event)

    def _is_over(self) -> bool:
        """Return whether all steps are done, or validation has not improved for too long."""
        patience = self.config.train.patience
        return self.progress.step >= self.total_steps or (patience is not None and self.progress.stale >= patience)

    def _measure_start(self, checkpoint: Checkpoint) -> None:
        """Validate before the first step; the initial model is the best one until another is better."""
        self._validate()
        self.save_wanted = self.best_wanted = False
        words = checkpoint.manifest.get(SOURCE_WORDS)
        self.progress.initial = {**self.progress.last_valid, **(words if isinstance(words, dict) else {})}
        self.progress.stale = self.progress.plateau_stale = 0
        if self.progress.best_step == 0:
            self.ranks.run_on_rank_zero(lambda: self.saver.copy_to_best(checkpoint))

    def _measure_best_again(self) -> None:
        """Validate the best checkpoint as this start does; its perplexity of another measure says nothing here."""
        progress, before = self.progress, self.progress.best_perplexity
        best = self.ranks.run_on_rank_zero(lambda: self.saver.best_of_step(progress.best_step))
        found = None
        if best is not None:
            self._load_model(best)
            found = self._held_out().perplexities()["perplexity"]
            self._load_model(self.resumed_from)
        step, progress.initial = progress.best_step, {}
        progress.plateau_best = None  # the next validation is the first one of this measure
        if found is None or found >= MOST_AMOUNT:
            progress.best_perplexity, progress.best_step = None, None
            outcome = "the next validation is the best so far"
        else:
            progress.best_perplexity = found
            outcome = f"the best checkpoint, of step {step}, has perplexity {found:.2f} in place of {before:.2f}"
        changes = ", ".join(self.measured_otherwise)
        self._event(f"held-out text is measured in another way than before this start ({changes}): {outcome}")

    def _load_model(self, place: str) -> None:
        """Put the parameters of a checkpoint into the model; raise the same CheckpointError on all ranks."""
        error: CheckpointError | None = None
        try:
            load_model(open_checkpoint(place, verify=False), self.model.state_dict())
        except CheckpointError as problem:
            error = problem
        self.ranks.agree(error)

    def _save_last(self) -> None:
        """Wait for the checkpoint of the last step, or write it; try again for a while if storage fails."""
        self.saver.finish()
        if self.progress.step == 0:
            return  # a stop came before the first step
        for pause in (0.0, *LAST_SAVE_PAUSES_S):
            if self.saver.last_step == self.progress.step:
                return
            time.sleep(pause)
            if self.saver.best_lost and self.progress.best_step == self.progress.step:
                self.best_wanted = True
            self._note_lost_best()
            self._save()
            self.saver.finish()
        if self.saver.last_step != self.progress.step:
            raise TrainingError(f"step {self.progress.step}: the last checkpoint could not be written; see the log")

    def _flags(self) -> Flags:
        return self.saver.flags(self.worker.stop_requested() or self._is_over(), self.worker.save_requested())

    def _train_on(self, ready: ReadyBatch) -> None:
        self.ranks.step = self.progress.step
        with self.ranks.waiting("the sum of gradients"):
            output = self.step.run(ready.batch)
        self.cursors = ready.cursors
        progress = self.progress
        progress.step += 1
        # a step that is not finite must not enter the running sums
        sums = torch.cat([output.loss_sums.double(), ready.batch.lengths.sum().double().view(1)])
        self.sums += torch.where(output.finite, sums, 0.0)
        self.not_finite += ~output.finite
        bad = torch.cat([torch.full_like(sums[:1], progress.step), output.norm.double().view(1), sums[:-1]])
        self.first_bad = torch.where(output.finite | (self.first_bad[0] > 0), self.first_bad, bad)
        progress.positions += ready.batch.positions
        progress.window_positions += ready.batch.positions
        self.window_waited += ready.waited
        self.last = output
        # reading a number waits for the device, so on a GPU only the log steps do it
        if self.worker.device.type == "cpu" or self._is_log_step():
            self._check_finite()

    def _is_log_step(self) -> bool:
        return self._is_due(self.config.train.log_every)

    def _check_finite(self) -> None:
        count = int(self.not_finite)
        if count == self.seen_not_finite:
            return
        self.progress.skipped += count - self.seen_not_finite
        self.seen_not_finite = count
        step, norm, *sums = self.first_bad.tolist()
        self.first_bad.zero_()
        losses = self.ranks.gather(sums)
        config = self.config.train
        fatal = config.on_nonfinite == "stop" or self.progress.skipped >= config.max_skips
        if fatal:
            self.saver.finish()
        last = self.saver.last_step
        message = not_finite(int(step), norm, losses, last)
        if config.on_nonfinite == "stop":
            raise TrainingError(message + "; lower optim.lr, or set train.on_nonfinite=skip")
        self._event(f"{message} (skip {self.progress.skipped} of {config.max_skips})")
        if fatal:
            raise TrainingError(f"{message}; train.max_skips={config.max_skips} reached")

    # ---------------------------------------------------------------- records

    def _log(self, batch: StepInput) -> None:
        """Write the record of the steps since the last one. batch: of this worker's last step."""
        progress = self.progress
        replaced = torch.tensor([self.cursors.replaced.sum()], dtype=torch.float64)
        totals = self.ranks.sum(torch.cat([self.sums.cpu(), replaced]))
        now = time.monotonic()
        seconds = max(1e-9, now - self.window_start - self.window_pause)
        record = train_record(
            progress,
            (totals[:-2] / totals[-2].clamp(min=1)).tolist(),
            norm=float(self.last.norm),
            lr=self.step.optimizer.rate_at(self.config.optim.lr, progress.step - 1, self.total_steps),
            seconds=seconds,
            waited=self.window_waited,
            replaced=int(totals[-1]),
            memory=memory_in_use(self.worker.device),
        )
        if self.metrics is not None:
            record["tflops"] = self.flops.tflops(batch, record["positions_per_second"], self.ranks.world)
            peak = peak_tflops(self.worker.device, self.config.train.precision, record["tflops"])
            record["mfu"] = record["tflops"] / peak
            self.speeds.append((record["tflops"], record["mfu"]))
        self._write(record)
        progress.window_positions = 0
        self.sums.zero_()
        self.window_start, self.window_pause, self.window_waited = now, 0.0, 0.0

    def _write(self, record: dict[str, Any]) -> None:
        if self.metrics is not None:
            epoch = self.progress.positions / self.streams_plan.positions
            more = {"epoch": epoch, "elapsed": self._elapsed(), "total_steps": self.total_steps, "time": time.time()}
            self.metrics.write({**record, **more})

    def _elapsed(self) -> float:
        """Return the seconds of training over all starts of the run: each from its first step, with validations."""
        return self.progress.seconds + time.monotonic() - self.started

    def _held_out(self) -> LossSums:
        """Return the sums of the held-out text over all ranks; raise the same ElmoRayError on all of them."""
        assert self.validation is not None
        error: ElmoRayError | None = None
        losses = LossSums([0.0] * self.model.directions, 0)
        try:
            losses = self.validation.losses()
        except ElmoRayError as problem:
            error = problem
        self.ranks.agree(error)
        totals = self.ranks.sum(torch.tensor([*losses.nats, losses.positions], dtype=torch.float64)).tolist()
        return LossSums(totals[:-1], int(totals[-1]))

    def _validate(self) -> None:
        assert self.valid_plan is not None
        start = time.monotonic()
        total = self._held_out()
        pause = time.monotonic() - start
        self.window_pause += pause
        values = total.perplexities()
        progress = self.progress
        self._write(valid_record(progress.step, total, self.valid_plan.n_streams, pause))
        # JSON has no infinity, and an infinite perplexity is never the best
        finite = {name: v if v is not None and v < MOST_AMOUNT else None for name, v in values.items()}
        progress.last_valid = {"step": progress.step, **finite}
        now = finite["perplexity"]
        if now is not None and (progress.best_perplexity is None or now < progress.best_perplexity):
            if not self.saver.saving_best:  # while a best is being saved, it may be lost, too
                self.best_before = progress.best_perplexity, progress.best_step
            progress.best_perplexity, progress.best_step = now, progress.step
            self.save_wanted = self.best_wanted = True
            progress.stale = 0
        else:
            progress.stale += 1
        if self.config.optim.schedule.kind == "plateau":
            self._follow_plateau(now)

    def _follow_plateau(self, perplexity: float | None) -> None:
        """Lower the learning rates if `optim.schedule.patience` validations in a row brought no gain."""
        progress, schedule = self.progress, self.config.optim.schedule
        best = progress.plateau_best
        if perplexity is not None and (best is None or best - perplexity > schedule.min_gain):
            progress.plateau_best, progress.plateau_stale = perplexity, 0
            return
        progress.plateau_stale += 1
        if progress.plateau_stale < schedule.patience:
            return
        progress.plateau_stale = 0
        progress.rate_factor *= schedule.factor
        self.step.optimizer.rate_factor = progress.rate_factor
        validations = f"{schedule.patience} validation{'s' if schedule.patience > 1 else ''}"
        self._event(
            f"held-out perplexity fell by no more than {schedule.min_gain:g} in {validations}: "
            f"the learning rates are now {progress.rate_factor:.4g} of the first ones (optim.schedule)"
        )

    # ---------------------------------------------------------------- checkpoints

    def _save(self) -> None:
        progress, config = self.progress, self.config
        self._check_finite()  # on a GPU a step that was not finite may not have been noticed yet
        if self.metrics is not None:
            self.metrics.sync()  # a resumed run does not record these steps again
        progress.finished = self._is_over()
        snapshot = Snapshot(replace(progress, seconds=self._elapsed()), self.cursors, self.sums)
        tensors = snapshot.stream_tensors(self.step.state, self.streams)
        texts: dict[str, str] = {}
        if self.ranks.rank == 0:
            tensors |= snapshot.model_tensors(self.step)
            texts = snapshot.texts(config, self.vocabulary)
        fields = {"streams": config.data.streams, "identity": self._identity(), **self._conditions()}
        fields["validation"] = self._measure()
        self.saver.start(progress.step, tensors, texts, fields, self.best_wanted)
        self.save_wanted = self.best_wanted = False

    def _note_lost_best(self) -> None:
        """Restore the best perplexity of `best/` if a better checkpoint could not be written."""
        if self.saver.best_lost and not self.best_wanted:
            self.progress.best_perplexity, self.progress.best_step = self.best_before
            self.saver.best_lost = False

    def _close(self, stopped: bool) -> None:
        self.progress.seconds = self._elapsed()
        if stopped:
            saved = "the state is saved, " if self.progress.step else "nothing is trained yet, "
            self._event(f"stopped at step {self.progress.step} as asked; {saved}go on with --resume")
        if self.metrics is not None:
            self.metrics.close()
        self.files.close(*_PUSHED)

    def _result(self, stopped: bool) -> dict[str, Any]:
        progress = self.progress
        last = self.saver.last
        tflops, mfu = map(statistics.median, zip(*self.speeds, strict=True)) if self.speeds else (None, None)
        return {
            "steps": progress.step,
            "total_steps": self.total_steps,
            "positions": progress.positions,
            "finished": self._is_over(),
            "stopped": stopped,
            "best_perplexity": progress.best_perplexity,
            "best_step": progress.best_step,
            "initial": progress.initial,
            "last_valid": progress.last_valid,
            "seconds": progress.seconds,
            "tflops": tflops,
            "mfu": mfu,
            "checkpoint": None if last is None else last.place,
        }
