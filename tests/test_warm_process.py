"""Forks of the warm process behave as `python …` does: tests of kills and of repos without the library rely on it."""

import signal

import warm_process


def test_a_new_process_with_its_own_arguments_environment_and_folder_has_not_imported_mxd(tmp_path):
    code = "import os, sys; print(os.getcwd(), os.environ['A'], *sys.argv[1:]); sys.exit('mxd' in sys.modules)"
    done = warm_process.run("-c", code, "x", env={"A": "1"}, cwd=tmp_path)
    assert (done.returncode, done.stdout.split()) == (0, [str(tmp_path), "1", "x"]), done.stderr


def test_errors_and_signals_are_told_by_the_exit_code():
    failed = warm_process.run("-c", "raise ValueError('mine')")
    assert failed.returncode == 1 and "ValueError: mine" in failed.stderr
    killed = warm_process.run("-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert killed.returncode == -signal.SIGKILL
