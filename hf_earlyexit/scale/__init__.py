"""Answers from many processes and machines."""
