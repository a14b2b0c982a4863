"""What a tool ends with."""

import errno

import pytest

from megadyn.errors import RunError, UserError, run_tool


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (None, 0, ""),
        (UserError("no such key"), 2, "error: no such key\n"),
        (RunError("a rank died"), 1, "error: a rank died\n"),
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), 2, "error: /a/b: Permission denied\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: No space left on device\n"),
    ],
)
def test_a_users_mistake_is_one_line(
    raised: Exception | None, status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        if raised:
            raise raised

    assert run_tool(main) == status
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("raised", [ConnectionResetError(errno.ECONNRESET, "reset"), TypeError("ours")])
def test_a_mistake_of_ours_keeps_its_traceback(raised: Exception) -> None:
    def main() -> None:
        raise raised

    with pytest.raises(type(raised)):
        run_tool(main)
