"""Builds the C++ extension that DeepSpeed compiles at its first start, once per session and before the first test.

Ranks would compile it inside the time limit of a test. Killed there, they leave the `lock` of an older torch behind,
for which every later rank waits without limit. Here it is compiled in a folder of its own and renamed when it is done,
so that what has the name of a build is whole.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

NAME = "deepspeed_shm_comm"
FOLDER = Path(__file__).parents[1] / ".torch_extensions"
CODE = "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder; ShareMemCommBuilder().load()"


def what_is_missing():
    """Return why the extension cannot be built here, or an empty text."""
    from torch.utils.cpp_extension import get_cxx_compiler, is_ninja_available

    if importlib.util.find_spec("deepspeed") is None:
        return "DeepSpeed is not installed"
    compiler, headers = get_cxx_compiler(), sysconfig.get_path("include")
    if not shutil.which(shlex.split(compiler)[0]):
        return f"DeepSpeed compiles C++ here, and there is no compiler {compiler!r} (install g++, or set CXX)"
    if not Path(headers, "Python.h").is_file():
        return f"DeepSpeed compiles C++ here, and {headers} has no Python.h (install python3-dev)"
    if not is_ninja_available():
        return "DeepSpeed compiles C++ here, and there is no ninja (pip install ninja)"
    return ""


class ExtensionBuild:
    """A plugin of pytest: builds if a collected test asks for the fixture `shm_comm`.

    Attributes:
        missing: Why nothing could be built.
        failure: What the compiler said.
    """

    def __init__(self):
        self.missing = self.failure = ""
        self._held = contextlib.ExitStack()
        self._root = self._sessions = None

    def pytest_collection_finish(self, session):
        # Here and not in the fixture, because pytest-timeout counts a fixture into the first test that needs it.
        if session.config.option.collectonly or not any("shm_comm" in _fixtures(item) for item in session.items):
            return
        self.missing = what_is_missing()
        if not self.missing:
            self._root = FOLDER / _versions()
            self._root.mkdir(parents=True, exist_ok=True)
            self._sessions = self._held.enter_context((self._root / "sessions").open("w"))
            os.environ["TORCH_EXTENSIONS_DIR"] = str(self._root)  # for the ranks
            self.make_ready()

    def pytest_sessionfinish(self):
        self._held.close()

    def make_ready(self):
        """Build if that is still to do, and remove a lock that a killed rank left."""
        import fcntl  # which Windows has not

        # The kernel drops it when its holder dies. A session that runs shares it; who has it alone may tidy and build.
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(self._sessions, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _tidy(self._root)
            if not (self._root / NAME).is_dir() and not self.failure:
                self.failure = _compile(self._root)
        fcntl.flock(self._sessions, fcntl.LOCK_SH)  # waits for a build by another session
        if not (self._root / NAME).is_dir():
            self.failure = self.failure or f"another session is done and has not built {NAME}"


def _fixtures(item):
    return getattr(item, "fixturenames", ())  # a doctest has none


def _versions():
    """Return a name that changes with what the extension is linked to, which ninja does not notice."""
    found = [f"{name}-{importlib.metadata.version(name)}" for name in ("torch", "deepspeed")]
    return "-".join([sys.implementation.cache_tag, *found])


def _tidy(root):
    """Remove what a session that was killed left behind."""
    for unfinished in root.glob("unfinished-*"):
        shutil.rmtree(unfinished, ignore_errors=True)  # its compiler may still write; the next session tries again
    (root / NAME / "lock").unlink(missing_ok=True)


def _compile(root):
    """Compile in a folder of its own; return what went wrong."""
    folder = Path(tempfile.mkdtemp(prefix="unfinished-", dir=root))
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(folder), "DS_ACCELERATOR": "cpu"}
    print(f"\nBuilding {NAME} for the tests with DeepSpeed: a minute or more, once", file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True)
    if done.returncode:
        return f"{NAME} was not built:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    (folder / NAME).rename(root / NAME)
    shutil.rmtree(folder)
    return ""
