"""`megadyn preprocess` as a script."""

from megadyn.commands.preprocess import main, parse_args

__all__ = ["main", "parse_args"]

if __name__ == "__main__":
    raise SystemExit(main())
