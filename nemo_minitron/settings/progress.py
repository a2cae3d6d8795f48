"""The prefix of a worker's lines of progress. The launcher prints such lines on the screen."""

PROGRESS = "  > "
