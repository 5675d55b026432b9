"""What an evaluation needs.

    weights     the ResNet in a file of weights, wherever it is there
    features    features of many images, counting hits, the images that count, whether a network is frozen
"""
