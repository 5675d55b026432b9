"""For all the other folders.

    errors      errors that end a program, the signals that end a run, text that is safe to print
    draws       random numbers as a hash of (seed, epoch, image, view, draw), and the order of an epoch
    files       files that are whole at every instant, and reading them with suspicion
    progress    the start block, the line with the time left, and lines on stderr
    pictures    contact sheets, training curves, nearest neighbours
    machine     its cores, memory, precision and fastest layout, and numbers on their way to and from a GPU
"""
