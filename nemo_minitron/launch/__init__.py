"""The processes of a job: one, torchrun's, those of other hosts; and one command a folder."""
