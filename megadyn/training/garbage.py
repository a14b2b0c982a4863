"""When Python collects garbage during training."""

import gc


class Garbage:
    """Collects at every `interval`-th step, and only then, on all ranks alike. 0 leaves it to Python, whose collections come at
    another step on each rank, and each time all ranks wait. Wraps the training loop."""

    def __init__(self, interval: int):
        self.interval = interval

    def __enter__(self) -> "Garbage":
        if self.interval:
            gc.collect()
            gc.disable()
        return self

    def __exit__(self, *_: object) -> None:
        if self.interval:
            gc.enable()

    def after_step(self, number: int) -> None:
        if self.interval and number % self.interval == 0:
            gc.collect()
