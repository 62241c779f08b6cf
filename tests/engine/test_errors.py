# SPDX-License-Identifier: Apache-2.0
"""What a command prints and returns when its work fails."""

import pytest

from d2_decouple.config import ConfigError
from d2_decouple.engine import TrainingStoppedError, run_command


def _raise(error):
    raise error


def test_the_exit_status_is_that_of_the_work():
    assert run_command(lambda: None) == 0
    assert run_command(lambda: 4) == 4


@pytest.mark.parametrize(
    ("error", "more", "status"),
    [
        (ConfigError("no such key"), (), 1),
        (TrainingStoppedError("stopped", 143), (), 143),
        (PermissionError("no such right"), (OSError,), 1),
    ],
)
def test_an_expected_error_is_its_message(error, more, status, capsys, monkeypatch):
    monkeypatch.delenv("D2D_TRACEBACK", raising=False)
    assert run_command(lambda: _raise(error), *more) == status
    assert capsys.readouterr().err == f"error: {error}\n"


@pytest.mark.parametrize(("value", "shown"), [("1", True), ("0", False), ("", False)])
def test_where_it_arose_is_shown_on_request(value, shown, capsys, monkeypatch):
    monkeypatch.setenv("D2D_TRACEBACK", value)
    assert run_command(lambda: _raise(ConfigError("no such key"))) == 1
    said = capsys.readouterr().err
    assert said.endswith("error: no such key\n")
    assert ("in _raise" in said) is shown


def test_other_errors_are_not_hidden():
    with pytest.raises(ValueError, match="a mistake of ours"):
        run_command(lambda: _raise(ValueError("a mistake of ours")), OSError)
