"""``megavlm render-text``: pictures of text in English and Chinese, with what they say and where."""
