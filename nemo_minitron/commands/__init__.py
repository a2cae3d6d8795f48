"""What the commands and the stages of a job do: each reads files, calls one room and leaves files."""
