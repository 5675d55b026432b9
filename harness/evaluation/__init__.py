"""What an evaluation needs.

    weights     the ResNet in a file of weights, wherever it is there
    backbones   a backbone: out of a file, or untrained, and into files of other programs
    features    features of many images, counting hits, the images that count, a network that stays frozen
    result      what an evaluation says of itself: on the screen, and in files
"""
