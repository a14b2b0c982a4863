"""torchrun for `megadyn train --processes`: where a rank failed, its own words stand last, not torchrun's traceback.

python -m megadyn.launch.torchrun [torchrun's options] -m MODULE ARGUMENTS
"""

import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: that of the rank that failed first, or 1 if a signal ended it."""
    try:
        torchrun(argv)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        ended = f"ended with status {failure.exitcode}"
        if failure.exitcode < 0:
            ended = f"was ended by signal {-failure.exitcode}"
        print(f"error: rank {rank} {ended}; what it said stands above", file=sys.stderr)
        return max(1, failure.exitcode)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
