"""``megavlm inspect``: a page of a data set's samples and packs as they will be trained."""
