# SPDX-License-Identifier: Apache-2.0
"""What a batch job tells of an error that comes from another process."""

import pytest

pytest.importorskip("ray", reason="the extra [ray]")

from vllm_nvium.batch.pipeline import _last_line

TRACE = """\x1b[36mray::ReadRows()\x1b[39m (pid=26282, ip=10.0.0.2)
  File "feed.py", line 50, in _read
    rows = [row for row in read_block(path)]
{}
"""
ADVICE = "\nTo change retry attempts, configure `ray.data.DataContext`.\n"


@pytest.mark.parametrize("advice", ["", ADVICE])
def test_a_stack_trace_is_told_by_its_exception(advice: str) -> None:
    error = RuntimeError(TRACE.format("pyarrow.lib.ArrowException: no such column.") + advice)
    assert _last_line(error) == "pyarrow.lib.ArrowException: no such column"


def test_an_error_without_a_stack_trace_is_told_by_its_last_line() -> None:
    assert _last_line(RuntimeError("The actor died.\n  Its worker was killed by SIGKILL.")) == (
        "Its worker was killed by SIGKILL"
    )
    assert _last_line(ConnectionError("")) == "ConnectionError"
