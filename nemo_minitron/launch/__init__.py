"""Starts and ends the processes of a job, on one machine or on many, and keeps other commands out of its folder."""
