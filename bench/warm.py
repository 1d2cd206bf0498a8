"""Commands of recipes in processes forked from one that has a backend's libraries loaded: most of a short command's
time is spent importing them.

python -m bench.warm BACKEND    reads a request a line; answers with the process's id, and its exit code when it ends
"""

import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Protocol

from fallback.choose import choose

ROOT = Path(__file__).parents[1]
# What train, evaluate and predict import, some of it only after the backend's libraries.
_LATER = (
    "recipes.stages.trainer", "recipes.stages.callbacks", "recipes.stages.losses", "recipes.stages.cli",
    "matplotlib.pyplot", "torch.utils.tensorboard", "transformers.models.gemma2.modeling_gemma2",
    "transformers.models.gemma3.modeling_gemma3", "transformers.models.llama.modeling_llama",
    "transformers.models.gpt_neox.modeling_gpt_neox", "peft.tuners.lora.bnb", "sacrebleu",
)  # fmt: skip


class Process(Protocol):
    """What is asked of a started command: of subprocess.Popen as of a forked one."""

    returncode: int | None

    def poll(self) -> int | None: ...

    def wait(self) -> int: ...

    def send_signal(self, sig: int) -> None: ...


class Warm:
    """One that has the libraries of a backend, and is the parent of one command at a time."""

    def __init__(self, backend: str, env: dict[str, str]):
        self._parent = subprocess.Popen(
            [sys.executable, "-m", "bench.warm", backend],
            cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def start(self, module: str, arguments: list[str], folder: Path, out: Path, err: Path) -> "Forked":
        assert self._parent.stdin is not None
        files = {"folder": str(folder), "out": str(out), "err": str(err)}
        request = {"module": module, "arguments": arguments, **files}
        self._parent.stdin.write(json.dumps(request) + "\n")
        self._parent.stdin.flush()
        return Forked(self._answer(), self)

    def ended(self) -> int:
        return self._answer()

    def close(self) -> None:
        assert self._parent.stdin is not None
        self._parent.stdin.close()
        self._parent.wait()

    def _answer(self) -> int:
        assert self._parent.stdout is not None
        return int(self._parent.stdout.readline())


class Forked:
    def __init__(self, pid: int, parent: Warm):
        # A descriptor stands for this very process, and for no later one of the same number.
        self._process, self._parent = os.pidfd_open(pid), parent
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._process], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = self._parent.ended()
            os.close(self._process)
        return self.returncode

    def send_signal(self, sig: int) -> None:
        signal.pidfd_send_signal(self._process, sig)


def main(backend: Any) -> None:
    # Libraries may print; nobody but us answers here.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    choice = choose("llama", backend)
    choice.module().import_libraries(choice)
    for name in _LATER:
        importlib.import_module(name)
    # Half a second of regular expressions, which transformers compiles when a model is loaded and keeps.
    importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("llama")
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if not pid:
            answers.close()
            become(**request)
            return
        print(pid, file=answers, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers, flush=True)


def become(module: str, arguments: list[str], folder: str, out: str, err: str) -> None:
    """From here on, python -m MODULE ARGUMENTS in that folder."""
    os.chdir(folder)
    write = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    for number, (path, how) in enumerate(((os.devnull, os.O_RDONLY), (out, write), (err, write))):
        opened = os.open(path, how)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = os.fdopen(0, closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1])
