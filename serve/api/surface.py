"""vLLM's handlers that take a model's name, and the way that each of their methods goes through the gateway.

A handler is an attribute of `app.state`. One that is not listed reaches no expert: to vLLM itself there is none.
"""

# Handlers on app.state and the method that generates for a request: it goes through the gateway.
HANDLERS = {
    "openai_serving_chat": "create_chat_completion",
    "openai_serving_completion": "create_completion",
    "openai_serving_responses": "create_responses",
    "anthropic_serving_messages": "create_messages",
    "openai_serving_chat_batch": "create_batch_chat_completion",
    "cohere_serving_chat_v2": "create_chat_v2",
    "serving_generative_scoring": "create_generative_scoring",
    "serving_tokens": "serve_tokens",
}
# Methods that read a request as an expert would, and generate nothing.
READING = {
    "serving_tokenization": ("create_tokenize", "create_detokenize"),
    "anthropic_serving_messages": ("count_tokens",),
    "serving_render": (
        "render_chat_request",
        "render_messages_request",
        "render_completion_request",
        "render_responses_request",
    ),
    "serving_derender": (
        "derender_chat_response",
        "derender_completion_response",
        "derender_chat_stream_response",
        "derender_completion_stream_response",
    ),
}
# Methods that answer with the base alone: their handlers have no engine that could be a request's own.
BASE_ONLY = {"serving_structured_decisions": ("create_decision",)}
# Methods that take the id of a response.
OWNED = {"openai_serving_responses": ("retrieve_responses", "cancel_responses")}
ROUTED = dict.fromkeys((*HANDLERS, *READING, *BASE_ONLY, *OWNED))
