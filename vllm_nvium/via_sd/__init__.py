# SPDX-License-Identifier: Apache-2.0
"""VIA-SD in the engine: its options, what a start is refused for, the model runner, the scheduler
and the planner. What happens in a forward pass is in `model_executor/via_sd`.
"""
