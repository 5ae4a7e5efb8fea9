"""The library behind train.py, generate_instruction.py and weight_diff.py: one concern a file."""
