"""The section `checkpoint` of the configuration."""

import re
from dataclasses import dataclass, field

from megadyn.checks import at_least, one_of
from megadyn.errors import ConfigError, did_you_mean
from megadyn.paths import expanded


@dataclass
class AverageConfig:
    """Which averages a run writes; at most one of the two keys is given."""

    last: int | None = None
    """Beside each checkpoint, the average of this many newest good checkpoints of the run (of fewer at its beginning).
    `checkpoint.keep` must keep as many."""
    ema: float | None = None
    """Beside each checkpoint, a moving average over the run's checkpoints: this share of the average before, the rest of
    the new checkpoint. It starts with the first checkpoint."""

    @property
    def is_wanted(self) -> bool:
        return self.last is not None or self.ema is not None

    def check(self) -> None:
        at_least("checkpoint.average.last", self.last, 2)
        if self.ema is not None and not 0 < self.ema < 1:
            raise ConfigError("checkpoint.average.ema", self.ema, "between 0 and 1")
        if self.last is not None and self.ema is not None:
            raise ConfigError(
                "checkpoint.average.ema", self.ema, "left out where checkpoint.average.last is given"
            )


@dataclass
class CheckpointConfig:
    interval: int = 0
    """Steps between checkpoints; 0 saves only at the end (and on SIGTERM). A fault loses at most this many steps."""
    keep: int = 2
    """Number of newest checkpoints to keep; 0 keeps all."""
    keep_every: int = 0
    """In addition, keep checkpoints whose iteration is a multiple of this; 0 for none."""
    background: bool = False
    """Training waits only until a copy is in host memory (12 bytes per parameter, divided among the ranks), and
    continues while it is written. From a GPU the copy goes to page-locked memory, which is kept. A run that
    dies meanwhile resumes from the previous checkpoint."""
    on_error: str = "stop"
    """What to do if a checkpoint cannot be written: `stop`, or `continue` with the earlier ones. The last checkpoint of
    a run must be written in either case."""
    resume: str = "auto"
    """`auto`: resume from the newest good checkpoint in output_dir; if there is none, from that of `mirror`, or start a new
    run. `never`: start a new run, and refuse an output_dir or mirror with checkpoints. A path is short for `fork_from: PATH`
    with `resume: auto`."""
    fork_from: str | None = None
    """Where a new run starts: a checkpoint, or a run's folder. Once the run has its own checkpoints, `resume: auto`
    resumes from those. A checkpoint in the run's own output_dir takes the run back to it, once."""
    allow_other_data: bool = False
    """Resume even if the training data, or their order, differ from those of the checkpoint."""
    init_from: str | None = None
    """Hugging Face folder whose weights the run starts from: an export of megadyn, or a dense Qwen2, Qwen3, Llama, Mistral or
    SmolLM3 of transformers. Or its address on the hub, `ORG/NAME` or `ORG/NAME@REVISION`: one process per machine downloads
    it into the hub's cache."""
    keep_best: str | None = None
    """Name of a validation set (`validation` if it has no name): also keep the checkpoint with the lowest loss on it, causal
    where the model routes. A file `best` in its folder says so. `interval` must be a multiple of `training.eval_interval`."""
    mirror: str | None = None
    """Address of a folder that gets a copy of each checkpoint, average and export, in the background: `s3://BUCKET/FOLDER`,
    `gs://BUCKET/FOLDER`, `file:///FOLDER`, or another protocol of fsspec that can be written. It keeps what `keep`, `keep_every`
    and `keep_best` keep. A run without checkpoints in `output_dir` resumes from it, unless `resume` is `never`."""
    mirror_wait_s: float = 1800.0
    """How long the end of a run waits for its last copies. A run that was told to stop waits within `training.grace_s`."""
    average: AverageConfig = field(default_factory=AverageConfig)
    """Averages of the run's weights (arXiv 1803.05407), written to OUTPUT_DIR/averages after each checkpoint, and kept like
    checkpoints. Each is read back from disk, so it costs no device memory."""

    def check(self) -> None:
        for name in ("resume", "fork_from", "init_from"):
            if (path := getattr(self, name)) is not None:
                setattr(self, name, expanded(path, f"checkpoint.{name}"))
        if self.resume not in ("auto", "never"):
            if self.fork_from not in (None, self.resume):
                raise ConfigError(
                    "checkpoint.resume",
                    self.resume,
                    f"auto or never with checkpoint.fork_from = {self.fork_from}",
                )
            self.fork_from, self.resume = self.resume, "auto"
        if self.fork_from is not None and self.init_from is not None:
            raise ConfigError(
                "checkpoint.init_from",
                self.init_from,
                "null with checkpoint.fork_from (or a path in "
                "checkpoint.resume): a run starts with the weights of only one of the two",
            )
        at_least("checkpoint.interval", self.interval, 0)
        at_least("checkpoint.keep", self.keep, 0)
        at_least("checkpoint.keep_every", self.keep_every, 0)
        one_of("checkpoint.on_error", self.on_error, ("stop", "continue"))
        at_least("checkpoint.mirror_wait_s", self.mirror_wait_s, 0)
        self._check_mirror()
        self.average.check()
        if self.average.is_wanted and not self.interval:
            raise ConfigError(
                "checkpoint.interval",
                self.interval,
                "above 0 with checkpoint.average: there would be one checkpoint",
            )
        if self.average.last is not None and 0 < self.keep < self.average.last:
            raise ConfigError(
                "checkpoint.keep",
                self.keep,
                f"0 or at least checkpoint.average.last = {self.average.last}, so that these checkpoints remain",
            )

    def _check_mirror(self) -> None:
        if self.mirror is None:
            return
        self.mirror = expanded(self.mirror, "checkpoint.mirror").rstrip("/")
        found = re.fullmatch(r"([a-z][a-z0-9+.-]*)://(/?)[^/].*", self.mirror)
        if not found or (found[2] and found[1] not in ("file", "local", "memory")):
            raise ConfigError(
                "checkpoint.mirror", self.mirror, "an address such as s3://BUCKET/FOLDER or file:///FOLDER"
            )
        if found[1] in ("http", "https", "hf"):
            raise ConfigError(
                "checkpoint.mirror",
                self.mirror,
                f"an address to which files can be written, which {found[1]}:// is not: s3://, gs://, file:// or another",
            )

    def check_best(self, eval_interval: int, names: list[str]) -> None:
        """Whether `keep_best` names one of the validation sets, and each checkpoint is evaluated."""
        if self.keep_best is None:
            return
        if self.keep_best not in names:
            known = f"one of {', '.join(names)}" if names else "null, because there is no validation set"
            raise ConfigError(
                "checkpoint.keep_best", self.keep_best, f"{known}{did_you_mean(self.keep_best, names)}"
            )
        if not eval_interval or not self.interval or self.interval % eval_interval:
            raise ConfigError(
                "checkpoint.interval",
                self.interval,
                f"a multiple of training.eval_interval = {eval_interval}, both above 0, with checkpoint.keep_best: each "
                "checkpoint must be evaluated",
            )
