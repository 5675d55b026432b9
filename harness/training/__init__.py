"""A run: its processes, its folder and log, its options, and how it ends.

    processes   joining the processes of a run, sums over them
    batchnorm   batch normalisation over the batches of all processes
    per_image   a vector for each image, kept by the processes together
    run         a task, and a run that does it: how far it is, when it saves, and what ends it
    folder      the folder of a run: its name, who may write there, and its checkpoints
    log         log.jsonl: a record a line
    method      what a run asks of a method of pre-training
    recipes     from a method's tables and the command line to the settings of a run
    options     the command line that the scripts share, and its limits
    ends        how a program ends, and hints at why
"""
