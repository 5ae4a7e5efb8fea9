"""Asking any model for many completions.

api             what is asked and answered, and the errors of it
runner          many requests at a time, each answered once
servers         several servers as one model
batch_runner    many requests in files, answered within a day
batch_endpoint  such a file, and its way through a batch endpoint
rows            the rows of a file, answered
journal         answers on disk as they come; a rerun continues
budget          dollars and progress
"""
