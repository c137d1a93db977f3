# SPDX-License-Identifier: Apache-2.0
"""`vllm-nvium eval`: perplexity, exits and expected speed-up of a checkpoint, without vLLM."""
