# SPDX-License-Identifier: Apache-2.0
"""Programs that mean harm, run for real under every isolation that this machine allows."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sandbox

ROOT = Path(__file__).parents[3]
SECONDS = 2
ISOLATED = [
    pytest.param(
        tool,
        marks=pytest.mark.skipif(
            not sandbox.works(tool), reason=f"{tool} is not there, or may make no namespaces"
        ),
    )
    for tool in sandbox.TOOLS
]
isolated = pytest.mark.parametrize("isolation", ISOLATED)
everywhere = pytest.mark.parametrize("isolation", [*ISOLATED, sandbox.NONE])


def passes(program: str, isolation: str) -> bool:
    return sandbox.passes(program, isolation, SECONDS)


def processes_with(mark: str) -> list[int]:
    """Processes of this machine whose command line holds `mark`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = path.read_bytes()
        except OSError:
            continue
        if mark.encode() in arguments and int(path.parent.name) != os.getpid():
            found.append(int(path.parent.name))
    return found


def wait_for_none(mark: str) -> list[int]:
    """What is left after the kernel had time to end a namespace."""
    deadline = time.monotonic() + 5
    while (left := processes_with(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


@everywhere
def test_right_programs_pass_and_wrong_ones_do_not(isolation: str) -> None:
    right = "import math, re, json, collections, random, hashlib, typing\n"
    right += "def f(x):\n    return [i * i for i in range(x)]\nassert f(4) == [0, 1, 4, 9]\n"
    assert passes(right, isolation)
    assert passes(
        "with open('own', 'w') as file: file.write('x')\nassert open('own').read()", isolation
    )
    assert passes("import threading as t; a = t.Thread(target=int); a.start(); a.join()", isolation)
    assert not passes(right + "assert f(4) == [0]", isolation)
    assert not passes("def f(:", isolation)
    assert not passes("'\0'", isolation)
    assert not passes("import os; os.abort()", isolation)


@everywhere
@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(100)",
        "import signal\nfor s in (2, 15, 24): signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
    ],
)
def test_endless_programs_end(isolation: str, program: str) -> None:
    started = time.monotonic()
    assert not passes(program, isolation)
    assert time.monotonic() - started < 2 * SECONDS + 5


@everywhere
def test_huge_output_goes_nowhere_and_memory_and_files_have_a_limit(isolation: str) -> None:
    assert passes("for _ in range(200): print('x' * (1 << 20))", isolation)
    assert not passes(f"x = bytearray({2 * sandbox.MEMORY})", isolation)
    assert not passes(f"open('x', 'wb').write(bytes({2 * sandbox.FILE}))", isolation)


@isolated
def test_many_files_are_full_soon(isolation: str) -> None:
    count = 2 * sandbox.FOLDER // sandbox.FILE
    program = f"""
        for number in range({count}):
            with open(str(number), "wb") as file:
                file.write(bytes({sandbox.FILE}))
    """
    assert not passes(f"if 1:{program}", isolation)


@isolated
def test_daemons_end_with_the_program(isolation: str, tmp_path: Path) -> None:
    mark = f"daemon of {tmp_path}"
    daemon = f"import os, time\n# {mark}\nif os.fork() == 0:\n    os.setsid()\n"
    daemon += "    if os.fork() == 0:\n        time.sleep(100)\n    os._exit(0)\nos.wait()\n"
    assert passes(daemon, isolation)
    assert not wait_for_none(mark)
    assert not passes(daemon + "time.sleep(100)", isolation)
    assert not wait_for_none(mark)


@isolated
def test_a_fork_bomb_stays_small(isolation: str, tmp_path: Path) -> None:
    mark = f"bomb of {tmp_path}"
    # Itself bounded, should nothing else stop it: 2 ** 7 processes.
    bomb = f"import os, time\n# {mark}\nfor _ in range(7): os.fork()\ntime.sleep(100)"
    most, over = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.wait(0.02):
            most = max(most, len(processes_with(mark)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert not passes(bomb, isolation)
    over.set()
    watcher.join()
    # The tools around the program name it too.
    assert 0 < most <= sandbox.PROCESSES + 4
    assert not wait_for_none(mark)


@isolated
def test_nothing_outside_is_written(isolation: str, tmp_path: Path) -> None:
    for folder in (tmp_path, Path("/tmp"), Path.home(), ROOT, Path("/usr"), Path("/var/tmp")):
        target = folder / "written-by-a-program"
        outcome = passes(f"open({str(target)!r}, 'w').write('x')", isolation)
        # Its own /tmp is there for it, and another one.
        assert not target.exists() and outcome == (folder == Path("/tmp"))
    assert not passes(f"import os; os.chmod({sandbox.PYTHON!r}, 0o777)", isolation)
    assert not passes("open('/proc/sys/kernel/core_pattern', 'w').write('|x')", isolation)


@isolated
def test_no_secret_is_read(isolation: str, tmp_path: Path) -> None:
    secret = Path.home() / f".secret-{os.getpid()}"
    try:
        secret.write_text("secret")
        secret.chmod(0o644)
        (tmp_path / "secret").write_text("secret")
        for path in (secret, tmp_path / "secret", Path(__file__), Path("/etc/passwd")):
            assert path.exists() and not passes(f"open({str(path)!r}).read()", isolation)
    finally:
        secret.unlink(missing_ok=True)
    assert passes("import os; assert not {'HOME', 'USER', 'SECRET'} & set(os.environ)", isolation)
    # No process of others to look into.
    assert passes(
        "import os; assert all(int(p) < 99 for p in os.listdir('/proc') if p.isdigit())", isolation
    )


@pytest.fixture
def port() -> Iterator[int]:
    """A server on this machine that takes every connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@isolated
def test_no_server_is_reached(isolation: str, port: int) -> None:
    call = f"import socket; socket.create_connection(('127.0.0.1', {port}), 1)"
    assert passes(call, sandbox.NONE)  # the server is there
    assert not passes(call, isolation)


@isolated
def test_no_rights_are_won_by_another_namespace(isolation: str) -> None:
    program = "import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) != 0"
    assert passes(program, isolation)


def test_without_isolation_nothing_runs_unless_agreed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "TOOLS", ("no-such-tool",))
    with pytest.raises(RuntimeError, match="isolated"):
        sandbox.choose()
    assert sandbox.choose(unsandboxed=True) == sandbox.NONE
    assert "NOT isolated" in sandbox.described(sandbox.NONE)


@isolated
def test_what_is_covered_is_said(isolation: str) -> None:
    assert isolation in sandbox.described(isolation) and "Not covered" in sandbox.described(
        isolation
    )
