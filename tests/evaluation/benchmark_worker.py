"""Runs command lines given as JSON, one after the other, on the ranks of one torchrun job."""

from __future__ import annotations

import json
import sys

from megavlm import cli

for words in json.loads(sys.argv[1]):
    code = cli.main(words)
    assert code == 0, (code, words)
