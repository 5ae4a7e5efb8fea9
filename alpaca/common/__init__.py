"""What every wing stands on.

errors         a user's mistake, shown as one message
files          files and folders that are whole or absent; hashes of them
arguments      the command line of commands made of dataclasses
commands       the command line of commands made of functions
distributed    the processes of a run: barriers, one voice, the end
"""
