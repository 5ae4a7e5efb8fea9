"""Asking any model for many completions.

api        what is asked and answered, and the errors of it
runner     many requests at a time, each answered once
rows       the rows of a file, answered
batch_endpoint  many requests in a file, answered within a day
journal    answers on disk as they come; a rerun continues
budget     dollars and progress
servers    several servers as one model
"""
