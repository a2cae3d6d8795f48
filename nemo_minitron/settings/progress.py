"""What a worker's line of progress begins with; the launcher passes such lines on to the screen."""

PROGRESS = "  > "
