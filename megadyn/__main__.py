"""`python -m megadyn`: the same as the command `megadyn`, for when that is not on the shell's search path."""

from megadyn.commands import main

if __name__ == "__main__":
    raise SystemExit(main())
