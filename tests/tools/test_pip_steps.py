# SPDX-License-Identifier: Apache-2.0
"""Commands in an environment: what is kept away from them, and how their failures are explained."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest
from helpers_of_tools import environment, fake_program, pip_steps


def test_what_the_user_set_does_not_leak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package goes into the environment although everything says otherwise."""
    venv = tmp_path / "venv"
    environment._make_venv(environment.Request(venv))
    wheel = tmp_path / "leaf-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("leaf.py", "")
        file.writestr(
            "leaf-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: leaf\nVersion: 1\n"
        )
        file.writestr(
            "leaf-1.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        file.writestr("leaf-1.dist-info/RECORD", "")
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "pip.py").write_text("raise SystemExit('the wrong pip')\n")
    config = tmp_path / "pip.conf"
    config.write_text("[global]\nuser = true\n")
    for name, value in {
        "PIP_CONFIG_FILE": config,
        "PIP_NO_INDEX": "1",
        "PIP_PREFIX": tmp_path / "prefix",
        "PIP_REQUIRE_VIRTUALENV": "1",
        "PIP_TARGET": tmp_path / "target",
        "PIP_USER": "1",
        "PYTHONHOME": tmp_path / "home",
        "PYTHONPATH": tmp_path / "path",
        "PYTHONUSERBASE": tmp_path / "base",
    }.items():
        monkeypatch.setenv(name, str(value))
    request = environment.Request(venv)
    tools = pip_steps.Tools(request.python, venv / "log")
    tools.pip("install", str(wheel), what="installing leaf")
    assert len(list(venv.glob("lib/python*/site-packages/leaf.py"))) == 1
    assert not any((tmp_path / name).exists() for name in ("prefix", "target", "base"))


def test_what_says_how_to_reach_the_index_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {
        "PIP_INDEX_URL": "a",
        "HTTPS_PROXY": "b",
        "PIP_CERT": "c",
        "PIP_REQUIRE_VIRTUALENV": "1",
    }
    for name, value in kept.items():
        monkeypatch.setenv(name, value)
    assert kept.items() <= pip_steps.clean_environment(Path(sys.executable)).items()


PIP_SAYS = {
    "the disk is full": (
        "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"
    ),
    "certificate was refused": (
        "WARNING: Retrying after connection broken by 'SSLError(SSLCertVerificationError(1, "
        "'[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed'))'\n"
        "ERROR: No matching distribution found for torch"
    ),
    "no network": (
        "WARNING: Retrying after connection broken by 'NewConnectionError('Failed to establish a "
        "new connection: [Errno -3] Temporary failure in name resolution')'\n"
        "ERROR: No matching distribution found for torch"
    ),
    "the package index has no torch for Python 3": (
        "ERROR: Could not find a version that satisfies the requirement torch (from versions: "
        "none)\nERROR: No matching distribution found for torch"
    ),
    "compiling failed": "error: command '/usr/bin/gcc' failed with exit code 1",
    "ValueError: of a kind that nobody has seen": (
        "  error: subprocess-exited-with-error\n  ValueError: of a kind that nobody has seen\n"
        "  [end of output]\n" + "  note: This is likely not a problem with pip.\n" * 9
    ),
}


@pytest.mark.parametrize("reason", list(PIP_SAYS))
def test_failure_of_pip_is_explained(reason: str, tmp_path: Path) -> None:
    python = fake_program(tmp_path / "python", PIP_SAYS[reason])
    tools = pip_steps.Tools(python, tmp_path / "log")
    with pytest.raises(pip_steps.StepError, match=f"(?s)^installing torch: .*{reason}") as caught:
        tools.pip("install", "torch", what="installing torch")
    assert str(tools.log) in str(caught.value)
    assert PIP_SAYS[reason] in tools.log.read_text()


def test_disk_full_says_what_is_free_and_what_is_needed(tmp_path: Path) -> None:
    said = pip_steps.explain("OSError: [Errno 28] No space left on device", tmp_path)
    assert f"{pip_steps.free_gib(tmp_path):.1f} GiB free at {tmp_path}" in said
    assert "about 6 GiB with CUDA" in said
    for remedy in ("pip cache purge", "TMPDIR", "D2D_TORCH"):
        assert remedy in said


def test_early_trouble_that_a_retry_cured_is_not_the_reason() -> None:
    output = f"{PIP_SAYS['no network'].splitlines()[0]}\n" + "Downloading\n" * 50 + "ERROR: other"
    assert "no network" not in pip_steps.explain(output, Path())
