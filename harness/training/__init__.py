"""A run: its processes, its folder and log, its options, and how it ends.

    processes   joining the processes of a run, sums over them
    batchnorm   batch normalisation over the batches of all processes
    per_image   a vector for each image, kept by the processes together
    job         what a program knows before it computes anything
    run         how far a run is, when it saves, and what ends it
    folder      which folder a run has, that nobody else writes there, and its checkpoints
    log         log.jsonl: a record a line
    options     the command line that the scripts share, and its limits
    ends        how a program ends, and hints at why
"""
