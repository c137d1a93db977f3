# SPDX-License-Identifier: Apache-2.0
"""What runs inside a forward pass: models, layers, tensor functions. It is installed as
`vllm_nvium.model_executor`; of the rest of `vllm_nvium` it imports `errors` and `files` only."""
