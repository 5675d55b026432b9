"""What an evaluation needs.

    weights     the ResNet in a file of weights, wherever it is
    backbones   a backbone: from a file, or untrained; into a run, and into files of other programs
    features    features of many images, counting hits, the images that count, a frozen network
    report      a run's start block, its record of each epoch, and its curves
    result      an evaluation's start block, and the files of its result
"""
