"""Real processes without the seconds that importing torch and transformers takes in each.

The standard library's fork server imports them once; every process here is a fork of it. The server computes nothing
and has no thread but one of pyarrow's allocator, which expects forks, so that a fork can train.
"""

import gc
import importlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path

import huggingface_hub.constants
from matplotlib.figure import Figure
from scheduling import WARM
from transformers import dynamic_module_utils

# Other people's modules only: mxd is imported by each process itself, or not at all where a test hides it.
PRELOADED = [
    "lean_imports", "accelerate", "datasets", "matplotlib.pyplot", "pydantic", "rich.table", "torch._dynamo",
    "transformers.pipelines",
    "torch.distributed.distributed_c10d", "transformers.models.llama.modeling_llama", "transformers.trainer", "typer",
]  # fmt: skip
# Sets and dicts of strings are in another order there than here.
SERVER_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parent)}

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOADED)


def _main(arguments, environment, folder, stdout, stderr):
    """Do in the fork what `python ARGUMENTS` does."""
    gc.freeze()  # what the server imported need not be looked through by every `gc.collect()` of a training
    for number, path in ((1, stdout), (2, stderr)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    Figure.savefig = lambda self, path, **how: Path(path).touch()  # to draw one takes a second
    importlib.reload(huggingface_hub.constants)  # made of environment variables
    modules = str(Path(huggingface_hub.constants.HF_HOME, "modules"))
    dynamic_module_utils.HF_MODULES_CACHE = os.environ.get("HF_MODULES_CACHE", modules)
    if "COVERAGE_PROCESS_CONFIG" not in environment:
        return _run(*arguments)
    import coverage

    measured = coverage.process_startup(force=True)
    try:
        _run(*arguments)
    finally:
        measured.stop()
        measured.save()


def _run(how, *rest):
    if how == "-m":
        sys.argv = list(rest)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif how == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = [how, *rest]
        sys.path.insert(0, str(Path(how).parent))
        runpy.run_path(how, run_name="__main__")


class WarmProcess:
    """`python ARGUMENTS` in a process of its own, as `subprocess.Popen` starts it.

    Args:
        arguments: What follows `python`: `-m MODULE …`, `-c CODE …` or `SCRIPT …`.
        env: All environment variables of the process. Those that a module read when it was imported change nothing,
            but for huggingface_hub's.
        cwd: The folder to start in.
    """

    def __init__(self, *arguments, env=None, cwd=None):
        test = os.environ.get("PYTEST_CURRENT_TEST", "")
        assert not test or any(name in test for name in WARM), f"name {test} in scheduling.WARM"
        self.arguments = [str(argument) for argument in arguments]
        self._folder = tempfile.TemporaryDirectory(prefix="mxd-process-")
        self._files = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        environment = dict(os.environ if env is None else env)
        before = dict(os.environ)
        os.environ.update(SERVER_ENVIRONMENT)
        try:
            forkserver.ensure_running()
        finally:
            os.environ.clear()
            os.environ.update(before)
        files = [str(file) for file in self._files]
        self.process = _context.Process(target=_main, args=(self.arguments, environment, str(cwd or "."), *files))
        self.process.start()

    def wait(self, timeout=300):
        """Return the finished process with its output; kill one that takes longer."""
        self.process.join(timeout)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
            self.process.join()
        out, err = (file.read_text(errors="replace") if file.exists() else "" for file in self._files)
        self._folder.cleanup()
        if code is None:
            raise subprocess.TimeoutExpired(self.arguments, timeout, out, err)
        return subprocess.CompletedProcess(self.arguments, code, out, err)


def run(*arguments, timeout=300, **how):
    """Run `python ARGUMENTS` to its end, as `subprocess.run(…, capture_output=True, text=True)` does."""
    return WarmProcess(*arguments, **how).wait(timeout)
