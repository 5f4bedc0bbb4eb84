# SPDX-License-Identifier: Apache-2.0
"""``python -m rainfusion_compile``: which commands there are, what wrong arguments say, and what is imported for it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rainfusion_compile
from rainfusion_compile.commands import COMMANDS, main


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_help_names_all_commands_without_importing_torch():
    code = (
        "import sys; from rainfusion_compile.commands import main\n"
        "try: main(['--help'])\n"
        "finally: print('torch' in sys.modules)"
    )
    root = Path(rainfusion_compile.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in COMMANDS)
    assert done.stdout.splitlines()[-1] == "False"


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.strip() == rainfusion_compile.__version__


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "COMMAND"),
        (["docter"], "docter"),
        (["bench", "--grid", "21x45"], "--grid: must be TxHxW in tokens, such as 21x45x80; got '21x45'"),
        (["bench", "--grid", "0x45x80"], "got '0x45x80'"),
        (["bench", "--text", "226"], "--text: must be BEFORE+AFTER in tokens, such as 226+0; got '226'"),
        (["bench", "--heads", "0"], "--heads: must be an integer of at least 1; got '0'"),
        (["bench", "--sparsity", "1.5", "--device", "cpu"], "sparsity must be a number in [0, 1), or several; got 1.5"),
        (["bench", "--head-dim", "20", "--grid", "1x4x4", "--device", "cpu"], "from 16 to 256; got 20"),
        (["bench", "--device", "abacus"], "--device must be one that is here, such as cpu; got 'abacus'"),
        (["bench", "--device", "meta"], "--device must be cpu or cuda; got 'meta'"),
        (["explain", "x:y", "--option", "eror"], "must be name=value; got 'eror'"),
        (["explain", "x:y", "--option", "eror=1"], "unknown option 'eror' (did you mean 'error'?)"),
        (["explain", "x:y", "--option", "error=1", "--error", "0.1"], "error is given more than once"),
    ],
)
def test_wrong_arguments_are_named_with_what_would_be_accepted(capsys, argv, said):
    assert said in error_of(capsys, *argv)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is something to tune")
def test_tune_needs_a_gpu(capsys):
    assert "no GPU here: there is nothing to tune" in error_of(capsys, "tune")
