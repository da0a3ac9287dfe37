"""A reader of the pages: the built wheel, an empty folder, and a home that takes no file."""

import json
import os
import subprocess
import sys
import sysconfig
import venv

# Folders of Linux's kernel, in which root too can make nothing.
HOME = "/sys"
# Runs the blocks of each job in its folder, warnings being errors, and answers with what failed.
INTERPRETER = """
import json, os, sys, traceback, warnings
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # What blocks print is no answer.
for line in sys.stdin:
    job, names, failed = json.loads(line), {}, None
    os.chdir(job["folder"])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            # Packages are compiled when they are first imported.
            warnings.filterwarnings("ignore", "invalid escape sequence")
            for block in job["blocks"]:
                exec(block, names)
    except BaseException:
        failed = traceback.format_exc()
    print(json.dumps(failed), file=answers, flush=True)
"""


class Reader:
    """An environment with a wheel, and one interpreter of it, which every page goes through."""

    def __init__(self, build_wheel, folder):
        """Installs what `build_wheel(folder)` returns; the dependencies are this environment's."""
        self.prefix = folder / "environment"
        venv.create(self.prefix, symlinks=True)
        self.python = self.prefix / "bin" / "python"
        self.environment = self._environment()
        (folder / "dist").mkdir()
        pip = [sys.executable, "-m", "pip", "--python", self.python, "install", "--quiet"]
        alone = ["--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check"]
        subprocess.run([*pip, *alone, build_wheel(folder / "dist")], check=True)
        # Not read for files like itself, so that what is installed editable here is not seen.
        (packages,) = self.prefix.glob("lib/python3*/site-packages")
        (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
        self.errors = folder / "errors.txt"
        with self.errors.open("w") as errors:
            self.interpreter = subprocess.Popen(
                [self.python, "-c", INTERPRETER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=folder,
                env=self.environment,
            )

    def _environment(self):
        """The variables: a user's, but for those that let programs compile fast."""
        ours = (
            "PYTHON",
            "XDG_",
            "FLASH_WTCONV_",
            "VIRTUAL_ENV",
            "MPLCONFIGDIR",
            "PYTEST_",
            "TRITON_",
        )
        kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        kept |= {"HOME": HOME, "PATH": f"{self.prefix / 'bin'}{os.pathsep}{os.environ['PATH']}"}
        if os.environ["JAX_PLATFORMS"] == "cpu":
            kept["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
        return kept

    def run(self, blocks, folder):
        """Runs blocks of Python in a folder, one after the other; returns the traceback or None."""
        job = {"blocks": blocks, "folder": str(folder)}
        self.interpreter.stdin.write(json.dumps(job) + "\n")
        self.interpreter.stdin.flush()
        answer = self.interpreter.stdout.readline()
        return json.loads(answer) if answer else self.errors.read_text()[-2000:]

    def call(self, command, folder):
        """Runs a line of a shell in a folder; returns what it says where it fails, else None."""
        done = subprocess.run(
            ["sh", "-c", command],
            cwd=folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return done.stdout if done.returncode else None

    def close(self):
        """Ends the interpreter."""
        self.interpreter.communicate()
