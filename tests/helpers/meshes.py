"""A process with 8 host devices, which runs the jobs of a test file: `python -m helpers.meshes`.

How many devices a CPU has JAX learns once, when it starts. So this reads a job a line from its
standard input, as JSON `[name, arguments]`, calls the function of that name, and answers with a
line: null, or the traceback of what it raised.
"""

import json
import os
import platform
import subprocess
import sys
import traceback

from helpers.processes import with_devices


class Worker:
    """The process, as a context."""

    def __enter__(self):
        paths = os.pathsep.join(filter(None, sys.path))
        environment = with_devices(8) | {"PYTHONPATH": paths}
        # By older emitters a shard's program may fuse a product into a sum where the whole's does
        # not: without such instructions neither does, and newer emitters fuse alike.
        if platform.machine() in ("x86_64", "AMD64"):
            environment["XLA_FLAGS"] += " --xla_cpu_max_isa=AVX"
        else:
            environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
        command = [sys.executable, "-m", "helpers.meshes"]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, env=environment, text=True
        )
        return self

    def __call__(self, job, *arguments):
        """Raises AssertionError, with the worker's traceback, where a job fails."""
        self._process.stdin.write(json.dumps([job, arguments]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the worker died of {job} {arguments}"
        error = json.loads(answer)
        assert error is None, error

    def __exit__(self, *_):
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import helpers.quick  # noqa: F401
    from helpers import mesh_jobs

    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            getattr(mesh_jobs, name)(*arguments)
            error = None
        except Exception:
            error = traceback.format_exc()
        answers.write(json.dumps(error) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
