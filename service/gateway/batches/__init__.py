"""Files of requests that are worked through in the background: OpenAI's Files and Batch APIs."""
