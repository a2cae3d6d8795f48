"""The variable that names the host. Workers import this file before they take signals, so it imports nothing."""

HOST = "MINITRON_HOST"  # names the host of this process and of those that it starts
