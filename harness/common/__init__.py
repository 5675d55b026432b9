"""What every room may use.

    errors      what the programs say when they can't go on, and the signals that end a run
    draws       random numbers as a hash of (seed, epoch, image, view, draw), and the order of an epoch
    files       files that are whole at every instant, and reading them with suspicion
    progress    the line with the time left, and lines on stderr
    pictures    contact sheets, training curves, nearest neighbours
    machine     the machine: its cores, memory and fastest layout, and numbers on their way to and from a GPU
"""
