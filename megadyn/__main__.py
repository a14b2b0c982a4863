"""`python -m megadyn`: the command `megadyn`, where it is not on the search path of the shell."""

from megadyn.commands import main

if __name__ == "__main__":
    raise SystemExit(main())
