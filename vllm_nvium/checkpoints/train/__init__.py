# SPDX-License-Identifier: Apache-2.0
"""`vllm-nvium train`: loss, controller of the exits, retrofit of dense models, distillation."""
