"""Runs transformers' own model tests on every kind of exported model, and holds them to the table of known failures.

    python -m tests.exports_suite.run [--kind dtf] [--test test_training]

Status 0 if exactly the tests of `known_failures.toml` fail; 1 for one that fails and is not listed, or is listed and passes.
"""

import argparse
import io
import os
import sys
import tomllib
import unittest
import warnings
from pathlib import Path

from megadyn.errors import run_tool
from tests.exports_suite.source import fetch

TABLE = Path(__file__).with_name("known_failures.toml")


def known_failures(kind: str) -> dict[str, str]:
    """Test to reason, of those that must fail for a kind; ValueError for a row that is not whole."""
    found = {}
    for test, row in tomllib.loads(TABLE.read_text()).items():
        if set(row) != {"kinds", "reason"} or not row["reason"]:
            raise ValueError(f"{TABLE.name}: {test} must have kinds and a reason, and nothing else")
        if kind in row["kinds"] or row["kinds"] == ["all"]:
            found[test] = row["reason"]
    return found


def run(kind: str, folder: Path, names: list[str] | None = None) -> tuple[int, int, dict[str, str]]:
    """How many tests ran and how many of these were skipped, and the failures: test to traceback."""
    from tests.exports_suite.suite import suite_of

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = unittest.TextTestRunner(io.StringIO(), verbosity=0, warnings="ignore").run(
            suite_of(kind, folder, names)
        )
    failures: dict[str, str] = {}
    for test, traceback in result.failures + result.errors:
        case = getattr(test, "test_case", test)  # a subtest names the test that it belongs to
        failures[case.id().rsplit(".", 1)[-1]] = traceback
    return result.testsRun, len(result.skipped), failures


def main(argv: list[str] | None = None) -> int:
    os.environ["HF_HUB_OFFLINE"] = "1"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", help="only this kind")
    parser.add_argument("--test", action="append", help="only this test; may be repeated")
    args = parser.parse_args(argv)
    folder = fetch()

    from tests.exports_suite.suite import KINDS

    status = 0
    for kind in [args.kind] if args.kind else list(KINDS):
        ran, skipped, failures = run(kind, folder, args.test)
        known = {
            test: reason
            for test, reason in known_failures(kind).items()
            if not args.test or test in args.test
        }
        print(
            f"{kind}: {ran} tests, {skipped} do not apply, {len(failures)} fail, {len(known)} of them known",
            flush=True,
        )
        for test in sorted(failures.keys() - known.keys()):
            print(f"  {test} fails and is not listed:\n{failures[test]}")
            status = 1
        for test in sorted(known.keys() - failures.keys()):
            print(f"  {test} is listed as a failure ({known[test]}), but passes")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(run_tool(main))
