"""``megavlm quickstart``: the whole job on generated images. Uses the other rooms as their users do."""
