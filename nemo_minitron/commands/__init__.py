"""The work of the commands, which the stages of a job share: each one reads files, calls one room and leaves files."""
