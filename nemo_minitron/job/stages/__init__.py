"""The stages of a job: what each reads, calls and leaves in the run folder."""
