# SPDX-License-Identifier: Apache-2.0
"""Batch jobs on Ray Data: a file of requests becomes a file of answers, one for each row and in
order, whatever is killed on the way. `job.py` is the whole of it; nothing here trains or serves."""
