"""The engine over HTTP, as OpenAI's API has it: a tenant is the `model` of a request."""
