"""The stages of a job: what each one reads, calls and leaves in the run folder."""
