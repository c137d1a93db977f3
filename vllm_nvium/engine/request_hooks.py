# SPDX-License-Identifier: Apache-2.0
"""Names of vLLM on the way of a request from HTTP to the engine and back: how its options are
checked, and what it is told of its own tokens. A part of the table of both methods, see `hooks.py`.
"""

from vllm_nvium.engine.hooks import Hook, table

NOT_TOLD = "a request that asks is told nothing of its exits or tiers"

HOOKS: tuple[Hook, ...] = table(
    """
vllm.v1.engine:EngineCoreOutput request_id new_token_ids kv_transfer_params
    the last is the free-form field in which notes of a step cross to the API process
    ! a request that asks is told nothing of its exits or tiers
vllm.v1.engine:EngineCoreOutputs outputs
    the outputs of a step that notes are added to
    ! a request that asks is told nothing of its exits or tiers
vllm.v1.engine.output_processor:RequestState make_request_output _new_completion_output
        detokenizer
    wrapped to take notes of a step, and to add what came of them to what it makes
    ! a request that asks is told nothing of its exits or tiers
vllm.v1.engine.detokenizer:IncrementalDetokenizer num_output_tokens
    how many tokens a request has, behind all stop checks
    ! values could stand beside the wrong tokens
vllm.outputs:RequestOutput add outputs
    wrapped: values are merged as tokens are, where a client is slower than the engine
    ! values of some tokens of a stream would be missing
vllm.outputs:CompletionOutput index token_ids finish_reason
    what values are added to
    ! a request that asks is told nothing of its exits or tiers
vllm.entrypoints.openai.completion.serving:OpenAIServingCompletion
        request_output_to_completion_response completion_stream_generator
    wrapped to add values to a response and to its chunks
    ! a request that asks is told nothing of its exits or tiers
vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat chat_completion_full_generator
        chat_completion_stream_generator
    wrapped to add values to a response and to its chunks
    ! a request that asks is told nothing of its exits or tiers
vllm.entrypoints.openai.chat_completion.batch_serving:OpenAIServingChatBatch
        chat_completion_full_generator_batch
    wrapped to add values to the answers of a batch of chats
    ! a request that asks is told nothing of its exits or tiers
vllm.entrypoints.scale_out.token_in_token_out.serving:ServingTokens serve_tokens
    wrapped to refuse what its answers have no place for
    ! what a request asks to be told of its tokens is dropped without a word
vllm.entrypoints.openai.completion.protocol:CompletionResponse choices metrics
    where they are added
    ! a request that asks is told nothing of its exits or tiers
vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionResponseStreamChoice token_ids
    its key tells chunks with tokens from others
    ! a request that asks is told nothing of its exits or tiers
# What a request asks for, before its answer begins.
vllm.entrypoints.openai.responses.serving:OpenAIServingResponses _generate_with_builtin_tools
    wrapped to check per-request overrides before a streamed response has begun
    ! a bad override of a streamed response would be answered with 200 and an error event
vllm.entrypoints.openai.completion.protocol:CompletionRequest to_beam_search_params
    wrapped to refuse a beam search with options of N-vium or of VIA-SD
    ! they are dropped without a word
vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionRequest to_beam_search_params
    wrapped to refuse a beam search with options of N-vium or of VIA-SD
    ! they are dropped without a word
vllm.entrypoints.speech_to_text.transcription.protocol:TranscriptionRequest to_beam_search_params
    wrapped to refuse a beam search with options of N-vium or of VIA-SD
    ! they are dropped without a word
vllm.entrypoints.speech_to_text.translation.protocol:TranslationRequest to_beam_search_params
    wrapped to refuse a beam search with options of N-vium or of VIA-SD
    ! they are dropped without a word
vllm.entrypoints.openai.completion.protocol:CompletionRequest vllm_xargs
    per-request overrides, which a beam search would drop
    ! they are dropped without a word
vllm.entrypoints.generate.base.serving:GenerateBaseServing engine_client
    has the configuration that overrides of a streamed response are checked with
    ! a bad override of a streamed response would be answered with 200 and an error event
"""
)
