"""``python -m wantrt.cli``, where the console script is not installed."""

from wantrt.cli import main

main()
