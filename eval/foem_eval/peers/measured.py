"""Run a command and note what it took. Standard library only, and few of it: a process is born with its parent's peak memory.

    python measured.py RESULT.json LOG COMMAND...

RESULT.json: `wall_s`, `user_s` and `system_s` of the command's processor time, `peak_rss` in bytes: the largest resident set of a
process that it consists of, pages of mapped files included. Output goes to LOG. Ends with the command's exit code, or 128 plus
the signal that killed it.
"""
import json
import resource
import subprocess
import sys
import time


def main() -> int:
    result, log, *command = sys.argv[1:]
    with open(log, "w") as file:
        start = time.perf_counter()
        code = subprocess.call(command, stdout=file, stderr=subprocess.STDOUT)
        wall = time.perf_counter() - start
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    with open(result, "w") as file:
        json.dump({"wall_s": wall, "user_s": used.ru_utime, "system_s": used.ru_stime, "peak_rss": used.ru_maxrss * 1024}, file)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
