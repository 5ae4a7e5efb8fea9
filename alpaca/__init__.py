"""What train.py, generate_instruction.py, weight_diff.py and scripts/ are made of. A wing imports only what stands
below it (tests/test_layout.py):

    evaluation
    training     inference    datagen
    models       packing      weights      completions
    data
    common
"""
