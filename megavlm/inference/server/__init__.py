"""The HTTP server: OpenAI's chat completions, and a web page. Imports the rest of ``inference``."""
