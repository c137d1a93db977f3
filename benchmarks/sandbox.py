# SPDX-License-Identifier: Apache-2.0
"""Runs Python programs that nobody has read, such as answers of models to HumanEval.

A program sees the interpreter with its standard library, the system's libraries, and an empty
folder in memory that goes with it; no network, no other file, no other process. Everything it
started ends with it: all of that is in one process namespace, whatever sessions it opened.

Two tools can do this, Bubblewrap (`bwrap`) and `unshare` of util-linux; both need a kernel that
lets this user make namespaces.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from shlex import quote

SECONDS = 10  # of processor time; twice as long by the clock
MEMORY, FILE, FOLDER = 1 << 30, 1 << 20, 64 << 20  # bytes of a process, a file, all files
PROCESSES, OPEN_FILES = 8, 64
TOOLS = ("bwrap", "unshare")
NONE = "none"

COVERS = (
    "no network, no files but Python's and the system's libraries, nothing written but {folder} MB "
    "in memory, at most {processes} processes of {memory} MB, all ended with the program. Not "
    "covered: faults of the kernel, memory that the kernel holds for a program (System V shared "
    "memory, pipes), and how busy the processors are until the time is over."
)
UNCOVERED = (
    "NOT isolated: only time, memory and file sizes of each process are limited. Programs can use "
    "the network, read and write whatever this user can, and leave processes behind."
)

# Whoever is root is never held to a number of processes, so root becomes nobody first, who has to
# reach an interpreter below /root.
NOBODY, BORROWED = "65534", "/mnt"
BECOME_NOBODY = (
    f'mount --rbind "$1" {BORROWED} && shift && '
    f'exec setpriv --reuid={NOBODY} --regid={NOBODY} --clear-groups "$@"'
)
SYSTEM = [Path(path) for path in ("/bin", "/sbin", "/lib", "/lib32", "/lib64")]
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
PREFIX = os.path.realpath(sys.base_prefix)
PYTHON = os.path.realpath(sys.executable)


def choose(unsandboxed: bool = False) -> str:
    """The isolation to use: the first tool that works here.

    Raises:
        RuntimeError: none does, and the caller did not agree to go without.
    """
    if unsandboxed:
        return NONE
    for tool in TOOLS:
        if works(tool):
            return tool
    raise RuntimeError(
        "programs of models cannot be isolated here: neither `bwrap` (Bubblewrap) nor `unshare` "
        "(util-linux) may make namespaces"
    )


def works(tool: str) -> bool:
    """Whether a program can be run under this tool by this user."""
    return shutil.which(tool) is not None and passes("pass", tool)


def described(isolation: str) -> str:
    """What an isolation does and what it does not, for whoever starts a run."""
    if isolation == NONE:
        return f"Programs of models are {UNCOVERED}"
    covers = COVERS.format(folder=FOLDER >> 20, processes=PROCESSES, memory=MEMORY >> 20)
    return f"Programs of models run under {isolation}: {covers}"


def passes(program: str, isolation: str, seconds: int = SECONDS) -> bool:
    """Whether a program ends by itself, in time, with status 0."""
    if "\0" in program:
        return False  # no Python, and no argument of a command
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            command(program, isolation, seconds),
            cwd=folder if isolation == NONE else "/",
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return process.wait(2 * seconds) == 0
        except subprocess.TimeoutExpired:
            return False
        finally:
            end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kills what is left of the process group; a namespace ends with the tool that made it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def command(program: str, isolation: str, seconds: int) -> list[str]:
    limited = ["prlimit", f"--cpu={seconds}", f"--as={MEMORY}", f"--fsize={FILE}", "--core=0"]
    limited += [f"--nofile={OPEN_FILES}"]
    python = [PYTHON, "-I", "-c", program]
    if isolation == NONE:
        return [*limited, *python]  # a number of processes would count all others of this user
    # Set inside, where no others are counted.
    limited += [f"--nproc={PROCESSES}"]
    root = os.geteuid() == 0
    view = under_bwrap if isolation == "bwrap" else under_unshare
    inner = [*view(BORROWED if root else PREFIX), *limited, *python]
    if root:
        return ["unshare", "--mount", "sh", "-c", BECOME_NOBODY, "sh", PREFIX, *inner]
    return inner


def under_bwrap(prefix: str) -> list[str]:
    """Bubblewrap with its arguments.

    Args:
        prefix: where Python's files are found; inside they have their usual place.
    """
    bwrap = ["bwrap", "--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent"]
    bwrap += ["--ro-bind", "/usr", "/usr", "--ro-bind", prefix, PREFIX]
    bwrap += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache", "--proc", "/proc"]
    for path in filter(os.path.lexists, SYSTEM):
        link = path.is_symlink()
        bwrap += ["--symlink", str(path.readlink())] if link else ["--ro-bind", str(path)]
        bwrap += [str(path)]
    for device in DEVICES:
        bwrap += ["--dev-bind", device, device]
    bwrap += ["--size", str(FOLDER), "--tmpfs", "/tmp", "--chdir", "/tmp", "--remount-ro", "/"]
    return bwrap


def under_unshare(prefix: str) -> list[str]:
    """The same with util-linux: a shell, the first process of the namespace, mounts what the
    program sees in place of everything, and gives up the rights to mount more."""
    script = f"""set -e
        see() {{ mkdir -p "new$2"; mount --rbind "$1" "new$2" -o ro,nosuid,nodev; }}
        mount -t tmpfs -o size=1M,mode=755 tmpfs /tmp
        cd /tmp
        mkdir new
        mount --bind new new
        mkdir new/old new/proc new/dev new/tmp
        mount -t proc proc new/proc
        mount -t tmpfs -o size={FOLDER},mode=1777 tmpfs new/tmp
        see /usr /usr
        see {quote(prefix)} {quote(PREFIX)}
        """
    for path in filter(os.path.lexists, SYSTEM):
        link = path.is_symlink()
        script += f"ln -s {path.readlink()} new{path}\n" if link else f"see {path} {path}\n"
    for device in DEVICES:
        script += f"touch new{device}; mount --bind {device} new{device}\n"
    script += """cd new
        pivot_root . old
        umount -l old
        rmdir old
        cd /tmp
        mount -o remount,bind,ro /
        echo 0 > /proc/sys/user/max_user_namespaces
        set +e
        setpriv --no-new-privs --bounding-set=-all --inh-caps=-all "$@"
        exit $?
        """
    namespaces = ("--user", "--mount", "--pid", "--net", "--ipc", "--uts", "--map-root-user")
    return ["unshare", *namespaces, "--fork", "--kill-child", "sh", "-c", script, "sh"]
